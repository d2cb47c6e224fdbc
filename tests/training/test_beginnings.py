"""What a training starts from: a recipe, a saved model, a converted model and its teacher."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynamask import convert, recipes
from dynamask.convert.distillation_run import train_towards
from dynamask.errors import UsageError
from dynamask.models import DynamaskForCausalLM
from dynamask.training import TrainConfig, open_run, parameter_groups, train
from dynamask.training.loss import use_chunked_loss
from dynamask.training.run import _check_same_attention
from tests.training.test_training import MODEL, settings, text  # noqa: F401 -- a fixture

SHAPE = {name: value for name, value in MODEL.items() if name != "windows"}


def begun(text: Path, output: Path, **changes: object) -> TrainConfig:  # noqa: F811
    return settings(text, output, **{"steps": 1, "save_every": 0, "batch_size": 1} | changes)


def test_the_simplest_command_is_the_default_recipe(text: Path, tmp_path: Path) -> None:  # noqa: F811
    train(begun(text, tmp_path / "run", model=dict(SHAPE)), quiet=True)
    assert TrainConfig.load(tmp_path / "run" / "train.yaml").recipe == "default"
    expected = recipes.apply("default", "tiny", 32, **SHAPE)
    assert open_run(tmp_path / "run")[0].config.head_windows == expected.head_windows
    again = begun(text, tmp_path / "run", model=dict(SHAPE))
    assert train(again, quiet=True).trained == 0, "the run is known again"


def test_a_recipe_brings_its_training(
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = [[0.0, 4.0], [0.5, 1.0]]
    brought = replace(recipes.get("recall"), training={"window_schedule": schedule})
    monkeypatch.setitem(recipes.RECIPES, "recall", brought)
    train(begun(text, tmp_path / "run", model=dict(SHAPE), recipe="recall"), quiet=True)
    saved = TrainConfig.load(tmp_path / "run" / "train.yaml")
    assert saved.window_schedule == schedule
    with pytest.raises(UsageError, match="did you mean 'recall'"):
        train(begun(text, tmp_path / "other", recipe="recal"), quiet=True)


def test_other_attention_than_a_checkpoints_is_refused(tmp_path: Path) -> None:
    recall, sliding = (DynamaskForCausalLM(recipes.apply(name, "tiny", 32, **SHAPE)) for name in ("recall", "sliding"))
    recall.config.save_pretrained(tmp_path)
    _check_same_attention(recall, tmp_path)
    with pytest.raises(UsageError, match="attention was 'dma' and is 'swa'"):
        _check_same_attention(sliding, tmp_path)


@pytest.mark.slow
def test_a_recipe_that_changed_does_not_continue_a_run(
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = begun(text, tmp_path / "run", model=dict(SHAPE), recipe="recall", steps=2, save_every=1)
    train(run, quiet=True)
    shutil.rmtree(tmp_path / "run" / "model")  # as after a kill: checkpoints alone
    monkeypatch.setitem(recipes.RECIPES, "recall", recipes.get("sliding"))
    with pytest.raises(UsageError, match="was trained with other attention: attention was 'dma' and is 'swa'"):
        train(run, quiet=True)


def test_attention_of_ones_own_needs_no_recipe(text: Path, tmp_path: Path) -> None:  # noqa: F811
    train(begun(text, tmp_path / "run"), quiet=True)
    assert TrainConfig.load(tmp_path / "run" / "train.yaml").recipe is None
    assert open_run(tmp_path / "run")[0].config.windows == 8


@pytest.fixture(scope="module")
def converted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with a dense Llama, `dense`, and its conversion, `sparse`, with a tokenizer each."""
    folder = tmp_path_factory.mktemp("converted")
    train(begun(text, folder / "run"), quiet=True)
    tokenizer = open_run(folder / "run")[1]
    torch.manual_seed(0)
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    for name, model in (("dense", dense), ("sparse", convert.upcycle(dense, 8, local=4, sinks=1))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("start", ["run", "dense", "sparse"])
def test_a_training_starts_from_a_model(text: Path, converted: Path, tmp_path: Path, start: str) -> None:  # noqa: F811
    config = begun(text, tmp_path / "run", model={}, init=str(converted / start), learning_rate=1e-9)
    result = train(config, quiet=True)
    trained, tokenizer = open_run(tmp_path / "run")
    first = open_run(converted / start)[0]
    assert type(trained) is type(first)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert len(tokenizer) <= 300
    assert getattr(trained.config, "trained_ranks", True), "ranks learn beside the model"
    assert result.loss < 7


def test_the_context_is_the_initial_models(text: Path, converted: Path, tmp_path: Path) -> None:  # noqa: F811
    train(begun(text, tmp_path / "run", model={}, init=str(converted / "dense"), context=None), quiet=True)
    assert TrainConfig.load(tmp_path / "run" / "train.yaml").context == 64


def test_a_converted_model_has_its_own_loss(converted: Path) -> None:
    """The chunked loss is that of the class, with the ranks' part, documents apart."""
    model = open_run(converted / "sparse")[0].train()
    ids = torch.randint(300, (2, 24))
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, -1)
    labels = ids.clone()
    labels[:, 10] = -100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False)
        use_chunked_loss(model)
        chunked = model(input_ids=ids, labels=labels, position_ids=positions)
    torch.testing.assert_close(chunked.loss, own.loss)
    assert own.aux_loss is not None
    torch.testing.assert_close(chunked.aux_loss, own.aux_loss)
    chunked.loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()}
    assert any("rank_predictor" in name for name in moved)
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.5, rank_rate=3.0)
    named = {id(p): name for name, p in model.named_parameters()}
    rates = {named[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert all(rate == (3.0 if "rank_predictor" in name else 1.0) for name, rate in rates.items())


def test_a_converted_model_is_trained_towards_its_teacher(text: Path, converted: Path, tmp_path: Path) -> None:  # noqa: F811
    config = begun(
        text,
        tmp_path / "run",
        model={},
        init=str(converted / "sparse"),
        teacher=str(converted / "dense"),
        steps=8,
        save_every=4,
        learning_rate=3e-3,
        eval_every=1,
    )
    result = train_towards(config, quiet=True)
    divergences = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert 0 < result.loss < divergences[0]
    assert math.isnan(result.perplexity)  # of a divergence there is none
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| divergence from the teacher on held-out text | {result.loss:.3f} nats per token |" in card
    assert "loss on held-out text" not in card
    state = json.loads((tmp_path / "run" / "model" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
    assert train_towards(config, quiet=True).trained == 0


def test_beginnings_that_contradict_each_other_are_refused(text: Path, converted: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="leave out preset, recipe and model"):
        TrainConfig(init="x", recipe="default")
    with pytest.raises(UsageError, match=r"name it by init=FOLDER"):
        TrainConfig(teacher="x")
    with pytest.raises(UsageError, match="there is no folder nosuch"):
        train(begun(text, tmp_path / "run", model={}, init="nosuch"), quiet=True)
    sparse = str(converted / "sparse")
    with pytest.raises(UsageError, match="train_towards"):
        train(begun(text, tmp_path / "run", model={}, init=sparse, teacher=sparse), quiet=True)
    dense = str(converted / "dense")
    with pytest.raises(UsageError, match="'llama': convert it first"):
        train_towards(begun(text, tmp_path / "run", model={}, init=dense, teacher=dense), quiet=True)
    assert list(tmp_path.iterdir()) == []
