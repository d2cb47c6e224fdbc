"""The conversion study's forms: what is trained, what is kept, and what stays the dense model's."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dynamask.errors import UsageError
from dynamask_lab.studies.conversion import levers
from dynamask_lab.studies.conversion.forms import (
    LOCAL,
    SINKS,
    OutOfTime,
    Schedule,
    Spec,
    TailMeans,
    Workshop,
    predictors,
)
from dynamask_lab.studies.conversion.jobs import Job

BUDGET = LOCAL + SINKS + 12
SCHEDULE = Schedule(block=256, batch=1, rank_steps=3, distil_rate=1e-2, calibration=2)


@pytest.fixture
def told() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def workshop(tmp_path: Path, told: list[tuple[str, str]]) -> Workshop:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(0, 64, 4096).astype(np.uint16)
    np.save(tmp_path / "train.npy", tokens)
    np.save(tmp_path / "validation.npy", tokens[:1024].reshape(4, 256))
    return _workshop(tmp_path, told)


def _workshop(folder: Path, told: list[tuple[str, str]]) -> Workshop:
    def report(spec: Spec, what: str, result: dict[str, Any]) -> None:
        assert result["seconds"] > 0
        told.append((spec.name, what))

    return Workshop(folder / "model", folder, folder / "state", SCHEDULE, "cpu", report)


def test_learned_windows_have_the_budget_and_are_kept(
    workshop: Workshop, told: list[tuple[str, str]], tmp_path: Path
) -> None:
    spec = Spec("converted", BUDGET)
    model = workshop.form(spec).model
    windows = np.array(model.config.head_windows)
    assert windows.shape == (2, 2)
    assert windows.mean() == BUDGET
    assert [what for _, what in told] == ["learn_ranks", "allocate_windows"]
    again = _workshop(tmp_path, told).form(spec).model
    assert len(told) == 2, "nothing is trained twice"
    tokens = torch.arange(256)[None] % 64
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_newest_keys_use_the_same_windows_with_equal_ranks(workshop: Workshop) -> None:
    learned = workshop.form(Spec("converted", BUDGET)).model
    newest = workshop.form(Spec("converted", BUDGET, ranks="newest")).model
    assert newest.config.head_windows == learned.config.head_windows
    hidden = torch.randn(1, 8, 32, dtype=torch.bfloat16)
    for module in predictors(newest).values():
        assert not module(hidden).any()
    assert any(module(hidden).any() for module in predictors(learned).values())
    equal = workshop.form(Spec("converted", BUDGET, ranks="newest", windows="equal")).model
    assert equal.config.head_windows == ((BUDGET, BUDGET),) * 2


def test_slopes_are_kept_with_the_windows(workshop: Workshop, told: list[tuple[str, str]], tmp_path: Path) -> None:
    spec = Spec("converted", BUDGET, allocation="loss", slopes=True)
    model = workshop.form(spec).model
    flat = workshop.form(replace(spec, slopes=False)).model
    assert flat.config.slopes is None
    assert np.array(flat.config.head_windows).mean() == BUDGET
    for _ in range(2):
        again = _workshop(tmp_path, told).form(spec).model
        assert again.config.slopes == model.config.slopes
        assert again.config.head_windows == model.config.head_windows
        kept = json.loads((tmp_path / "state" / f"windows-{BUDGET}-hidden-seed0-loss-learned-slopes.json").read_text())
        windows = kept["windows"] if isinstance(kept, dict) else kept
        rising = {"windows": windows, "slopes": [[0.125, 0.0], None]}  # whatever was chosen: both are read back
        (tmp_path / "state" / f"windows-{BUDGET}-hidden-seed0-loss-learned-slopes.json").write_text(json.dumps(rising))
        model.config.slopes = rising["slopes"]
    newest = workshop.form(Spec("converted", BUDGET, ranks="newest", allocation="loss")).model
    assert newest.config.slopes is None
    assert [name for name, what in told if what == "allocate_windows"] == [
        f"converted-{BUDGET}-heads-learned-loss-slopes-frozen",
        f"converted-{BUDGET}-heads-learned-loss-frozen",
        f"converted-{BUDGET}-heads-newest-loss-frozen",
    ]


def test_later_fields_leave_earlier_lines_alone() -> None:
    earlier = Job(Spec("converted", 512, distilled=True), "loss", {"corpus": "text", "blocks": 100})
    assert earlier.key == "30064be39d2c28ab"
    assert Spec("converted", 512, allocation="loss").facts()["allocation"] == "loss"
    listed = levers.jobs()
    assert len({job.key for job in listed}) == len(listed)
    assert len({job.spec.name for job in listed}) == len({job.spec for job in listed})
    assert set(levers.lanes(listed).values()) == {"converted", "dense"}


@pytest.mark.parametrize("predictor", ["linear", "values"])
def test_other_predictors_learn(workshop: Workshop, predictor: str) -> None:
    model = workshop.form(Spec("converted", BUDGET, predictor=predictor)).model
    found = predictors(model)
    assert len(found) == 2
    for module in found.values():
        ranks = module(torch.randn(1, 8, 32, dtype=torch.bfloat16))
        assert ranks.shape == (1, 2, 8)
        assert ranks.std(dim=-1).min() > 0


def test_training_leaves_the_dense_model_alone(workshop: Workshop, told: list[tuple[str, str]], tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in workshop.dense().state_dict().items()}
    distilled = workshop.form(Spec("converted", BUDGET, distilled=True, steps=2)).model
    trained = workshop.form(Spec("dense trained", steps=2)).model
    for name, parameter in workshop.dense().state_dict().items():
        assert torch.equal(parameter, before[name])
    for model in (distilled, trained):
        assert any(not torch.equal(p, before[name]) for name, p in model.state_dict().items() if name in before)
    newest = workshop.form(Spec("converted", BUDGET, ranks="newest", distilled=True, steps=2)).model
    for module in predictors(newest).values():
        assert not module(torch.randn(1, 8, 32, dtype=torch.bfloat16)).any(), "its ranks must not learn"
    assert [what for _, what in told].count("train") == 3
    again = _workshop(tmp_path, told).form(Spec("converted", BUDGET, distilled=True, steps=2)).model
    assert [what for _, what in told].count("train") == 3
    for name, parameter in distilled.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name])


def test_a_dense_model_is_trained_in_the_loop_of_distillation(workshop: Workshop) -> None:
    before = {name: p.clone() for name, p in workshop.dense().state_dict().items()}
    spec = Spec("dense trained", steps=2, loop="distil")
    trained = workshop.form(spec).model
    assert trained.state_dict().keys() == before.keys(), "without predictors"
    assert all(torch.equal(p, before[name]) for name, p in workshop.dense().state_dict().items())
    assert any(not torch.equal(p, before[name]) for name, p in trained.state_dict().items())
    origin = Spec("converted", BUDGET, distilled=True, steps=2, origin="dense trained", loop="distil")
    workshop.form(origin)
    assert workshop.ready(spec)
    assert workshop.ready(origin)


def test_ranks_and_windows_are_learned_at_a_longer_context(workshop: Workshop, tmp_path: Path) -> None:
    context = 2 * workshop.schedule.block
    spec = Spec("converted", BUDGET, distilled=True, steps=2, rope=2, context=context)
    assert next(workshop.blocks(0, context=context)).shape[1] == context
    assert workshop.calibration(context)[0].shape == (1, context)
    model = workshop.form(spec).model
    assert model.config.rope_parameters["factor"] == 2
    assert workshop.ready(spec)
    assert not workshop.ready(Spec("converted", BUDGET, distilled=True, steps=2)), "files of its own"


def test_only_what_is_missing_takes_time(workshop: Workshop) -> None:
    spec = Spec("converted", BUDGET, distilled=True, steps=2)
    assert workshop.seconds_to_make(Spec("dense")) == 0
    before = workshop.seconds_to_make(spec)
    assert before > workshop.seconds_to_make(replace(spec, distilled=False)) > 0
    workshop.ranks(spec)
    assert 0 < workshop.seconds_to_make(spec) < before
    workshop.deadline = time.monotonic() + 1
    with pytest.raises(OutOfTime):
        workshop.form(spec)


def test_what_another_schedule_trained_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give another folder"):
        Workshop(tmp_path / "model", tmp_path, tmp_path / "state", Schedule(), "cpu", lambda *_: None)


def test_longer_positions_are_scaled(workshop: Workshop) -> None:
    assert workshop.dense(4).config.max_position_embeddings == 2048
    assert workshop.dense(4).config.rope_parameters["rope_type"] == "yarn"
    assert workshop.dense().config.rope_parameters["rope_type"] == "default"


def test_means_and_mixtures_lie_between_what_was_trained_and_the_dense_model(workshop: Workshop) -> None:
    spec = Spec("converted", BUDGET, distilled=True, steps=10, embeddings=False, beginning_share=0.5)
    trained = {n: p.detach().clone() for n, p in workshop.form(spec).model.named_parameters()}
    dense = dict(workshop.dense().named_parameters())
    assert torch.equal(trained["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    mean = dict(workshop.form(replace(spec, average=0.5)).model.named_parameters())[name]
    torch.testing.assert_close(mean, trained[name], msg="of ten steps, only the last lies in the last half's fifths")
    mixed = dict(workshop.form(replace(spec, mixed=0.75)).model.named_parameters())[name]
    expected = dense[name].float().lerp(trained[name].float(), 0.75)
    torch.testing.assert_close(mixed.float(), expected, atol=1e-3, rtol=1e-2)
    assert not torch.equal(mixed, trained[name])


def test_tail_means_are_means_of_the_last_weights() -> None:
    layer = nn.Linear(2, 1)
    means = TailMeans(layer, 20, (0.5, 0.25))
    for step in range(1, 21):
        with torch.no_grad():
            layer.weight.fill_(step)
        if step % 5 == 0:
            means.add(step)
    assert float(means.state(0.5, layer.state_dict())["weight"][0, 0]) == 17.5
    assert float(means.state(0.25, layer.state_dict())["weight"][0, 0]) == 20
