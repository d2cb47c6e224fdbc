"""Parameter groups, schedule and loss: what decays, how rates rise and fall, and what a mean is taken over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dynamask.data import PackedDataset
from dynamask.errors import InvalidInputError, UsageError
from dynamask.mixers.rank_predictor import RankPredictor
from dynamask.models.modeling import AUXILIARY_WEIGHT
from dynamask.training import TrainConfig, open_corpus, open_run, parameter_groups, train
from dynamask.training import loss as loss_module
from dynamask.training.loss import next_token_losses, use_chunked_loss
from dynamask.training.schedule import SCHEDULES, learning_rate_share
from tests.conftest import tiny_model
from tests.training.test_training import MODEL, losses, settings, text  # noqa: F401 -- a fixture


class WithPredictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model(ranking="paper")
        self.predictor = RankPredictor(32, 2)
        self.bias = nn.Parameter(torch.zeros(3))


def test_norms_gates_slopes_biases_and_predictors_do_not_decay() -> None:
    model = WithPredictor()
    groups = parameter_groups(model, learning_rate=0.1, weight_decay=0.3, gate_rate=2.0, rank_rate=5.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}
    assert set(found) == set(names.values())
    for name, (decay, rate) in found.items():
        flat = model.get_parameter(name).dim() < 2
        assert decay == (0.0 if flat or name.startswith("predictor.") else 0.3), name
        assert rate == (0.5 if name.startswith("predictor.") else 0.2 if ".gate." in name else 0.1), name
    assert any(name.endswith("gate.gate") for name in found)
    own = tiny_model()
    named = {id(p): name for name, p in own.named_parameters()}
    for group in parameter_groups(own, learning_rate=0.1, weight_decay=0.3, rank_rate=5.0):
        for parameter in group["params"]:
            predicts = ".rank_predictor." in named[id(parameter)]
            assert group["lr"] == (0.5 if predicts else 0.1)
            assert group["weight_decay"] == (0.0 if predicts or parameter.dim() < 2 else 0.3)


def test_parameters_that_are_frozen_are_left_out() -> None:
    model = tiny_model().requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    (group,) = parameter_groups(model, learning_rate=0.1, weight_decay=0.3)
    assert group["params"] == [model.model.norm.weight]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_rise_and_fall(schedule: str) -> None:
    rates = [learning_rate_share(schedule, step, 100, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx({"cosine": 0.1, "wsd": 0.0, "constant": 1.0}[schedule])
    with pytest.raises(InvalidInputError, match="schedule must be one of"):
        learning_rate_share("linear", 0, 1, 0)


@pytest.mark.parametrize("limit", [1 << 30, 50 * 7])
def test_the_loss_in_parts_is_the_models_own(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(loss_module, "MOST_LOGITS", limit)
    model = tiny_model()
    ids = torch.randint(50, (3, 12))
    labels = torch.where(torch.rand(3, 12) < 0.3, -100, ids)
    expected = model(input_ids=ids, labels=labels).loss
    logits = model(input_ids=ids).logits
    expected.backward()
    gradient = model.model.norm.weight.grad.clone()
    model.zero_grad()
    losses = next_token_losses(model, ids)
    use_chunked_loss(model)
    output = model(input_ids=ids, labels=labels)
    output.loss.backward()
    torch.testing.assert_close(output.loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.model.norm.weight.grad, gradient, rtol=1e-4, atol=1e-6)
    counts = labels[:, 1:].ne(-100).sum(-1)
    assert output.row_counts.tolist() == counts.tolist()
    torch.testing.assert_close(output.row_losses.sum() / counts.sum(), output.loss.detach().float())
    half = model(input_ids=ids, labels=labels, num_items_in_batch=2 * counts.sum()).loss
    torch.testing.assert_close(half, output.loss / 2)
    torch.testing.assert_close(model(input_ids=ids).logits, logits)
    assert losses.shape == (3, 11)


def test_the_auxiliary_loss_scales_with_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    ids = torch.randint(50, (2, 12))
    use_chunked_loss(model)
    plain = model(input_ids=ids, labels=ids).loss
    own = model.model.forward

    def forward(*args, **kwargs):  # type: ignore[no-untyped-def]
        outputs = own(*args, **kwargs)
        outputs["aux_loss"] = torch.tensor(0.5)
        return outputs

    monkeypatch.setattr(model.model, "forward", forward)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, plain + 0.5 * AUXILIARY_WEIGHT)
    torch.testing.assert_close(
        model(input_ids=ids, labels=ids, num_items_in_batch=44).loss, (plain + 0.5 * AUXILIARY_WEIGHT) / 2
    )


def test_the_validation_loss_is_the_mean_per_token(
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches of unequal numbers of predicted tokens: the last one is smaller, and documents begin unevenly."""
    monkeypatch.chdir(text)  # the names of the documents, whose hash holds them out, are then the same everywhere
    result = train(settings(text, tmp_path / "run", data=["."], steps=2, batch_size=8, context=33), quiet=True)
    blocks = PackedDataset(open_corpus(tmp_path / "run"), "validation", 33)
    assert len(blocks) % 8, "the last batch must be a smaller one"
    model, _ = open_run(tmp_path / "run")
    model.requires_grad_(False)
    total = count = 0.0
    for block in DataLoader(blocks, batch_size=1):
        labels = block["shift_labels"]
        logits = model(block["input_ids"], position_ids=block["position_ids"], use_cache=False).logits
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != -100).sum())
    assert result.loss == pytest.approx(total / count, rel=1e-5)


def test_one_token_is_no_context() -> None:
    with pytest.raises(UsageError, match="context must be at least 2"):
        TrainConfig(context=1)


def test_the_context_is_the_models(text: Path, tmp_path: Path) -> None:  # noqa: F811
    config = settings(text, tmp_path / "run", context=64, steps=1, save_every=0)
    config.model["max_position_embeddings"] = 32
    with pytest.raises(UsageError, match=r"context=64 is longer than the model's max_position_embeddings=32"):
        train(config, quiet=True)
    config.context = None
    train(config, quiet=True)
    assert TrainConfig.load(tmp_path / "run" / "train.yaml").context == 32


@pytest.mark.parametrize(("steps", "warmup"), [(20, 50), (4, 4)])
def test_a_warmup_that_never_ends_is_refused(steps: int, warmup: int) -> None:
    with pytest.raises(UsageError, match="must be shorter than the training"):
        TrainConfig(steps=steps, warmup=warmup)
    assert TrainConfig(steps=steps).warmup_steps == steps // 10


@pytest.mark.slow
def test_accumulation_checkpointing_and_bf16_train_alike(text: Path, tmp_path: Path) -> None:  # noqa: F811
    """The same batch in parts, with layers computed again, has the same losses; bfloat16 nearly so."""
    sliding = MODEL | {"attention": "swa"}
    changes: dict[str, dict[str, object]] = {
        "whole": {"batch_size": 4},
        "parts": {"batch_size": 2, "gradient_accumulation": 2},
        "again": {"batch_size": 4, "gradient_checkpointing": True},
        "bf16": {"batch_size": 4, "precision": "bf16"},
        "whole, no ranks": {"batch_size": 4, "model": sliding},
        "parts, no ranks": {"batch_size": 2, "gradient_accumulation": 2, "model": sliding},
    }
    curves = {}
    for name, change in changes.items():
        config = settings(text, tmp_path / name, corpus=str(tmp_path / "corpus"), steps=3, save_every=0, **change)
        curves[name] = list(losses(train(config, quiet=True).history).values())
    assert curves["parts"] == pytest.approx(curves["whole"], rel=5e-2)  # ranks learn from other rows of a part
    assert curves["parts, no ranks"] == pytest.approx(curves["whole, no ranks"], rel=1e-5)
    assert curves["again"] == pytest.approx(curves["whole"], rel=1e-5)
    assert curves["bf16"] == pytest.approx(curves["whole"], rel=2e-2)
    assert curves["bf16"] != curves["whole"]
