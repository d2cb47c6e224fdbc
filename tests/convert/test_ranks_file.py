"""Rank predictors in a file of their own: they come back whole, and only for the model that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynamask import InvalidInputError, convert
from dynamask.mixers.rank_predictor import RankPredictor


def trained(dense: Any, **settings: Any) -> Any:
    """Convert, with random predictors instead of trained ones and unequal windows."""
    model = convert.upcycle(dense, 24, **{"local": 4, "sinks": 2, **settings})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RankPredictor):
                for parameter in module.parameters():
                    parameter.normal_()
    convert.set_windows(model, [[6, 42], [16, 32]])
    model.config.trained_ranks = True
    return model


def state(model: Any) -> dict[str, Any]:
    """Everything that `load_ranks` may change, by value."""
    config = model.config
    settings = (repr(config.windows), config.local, config.sinks, config.trained_ranks, config.head_windows)
    return {"settings": settings} | {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


@pytest.fixture
def file(llama: Any, tmp_path: Path) -> Path:
    return convert.save_ranks(trained(llama), tmp_path / "deep" / "ranks.safetensors", notes={"model": "tiny"})


@pytest.mark.parametrize("settings", [{}, {"local": 20, "sinks": 4}, {"local": 1, "sinks": 0}])
def test_ranks_windows_local_and_sinks_come_back(
    llama: Any, tmp_path: Path, file: Path, settings: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    source = trained(llama)
    convert.save_ranks(source, file, notes={"model": "tiny"})
    target = convert.upcycle(llama, 30, **settings) if settings else convert.upcycle(llama, 200)
    notes = convert.load_ranks(target, file)
    assert notes["model"] == "tiny"
    assert same(state(source), state(target))
    tokens = torch.randint(3, 300, (1, 90))
    with torch.no_grad():
        assert torch.equal(source(tokens).logits, target(tokens).logits)
        assert not torch.allclose(target(tokens).logits, llama(tokens).logits, atol=1e-3)
    assert not list(file.parent.glob("*.partial"))


def test_a_fine_tuned_copy_in_another_dtype_is_the_same_model(llama: Any, file: Path) -> None:
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = convert.upcycle(llama.bfloat16(), 64, local=4, sinks=2)
    convert.load_ranks(model, file)
    assert model.config.trained_ranks
    assert {p.dtype for n, p in model.named_parameters() if "rank_predictor" in n} == {torch.bfloat16}


def test_other_models_are_refused_and_left_as_they_are(llama: Any, shape: dict[str, Any], file: Path) -> None:
    def another(**changes: Any) -> Any:
        return LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()

    cases = [
        (convert.upcycle(another(), 24, local=4, sinks=2), "other weights"),
        (convert.upcycle(another(num_hidden_layers=3), 24, local=4, sinks=2), "num_hidden_layers 2 .this model: 3"),
        (convert.upcycle(another(num_key_value_heads=4), 24, local=4, sinks=2), "num_key_value_heads"),
        (convert.upcycle(llama, 24, local=4, sinks=2, rank_predictor_width=8), "rank_predictor_width=None"),
        (convert.upcycle(llama, 24, local=4, sinks=2, dense_layers=[0]), "dense_layers"),
    ]
    for model, message in cases:
        before = state(model)
        with pytest.raises(InvalidInputError, match=message):
            convert.load_ranks(model, file)
        assert same(before, state(model)), message
    with pytest.raises(InvalidInputError, match="upcycle"):
        convert.load_ranks(llama, file)


def test_files_of_other_kinds_are_refused(llama: Any, file: Path, tmp_path: Path) -> None:
    model = convert.upcycle(llama, 24, local=4, sinks=2)
    with pytest.raises(InvalidInputError, match="there is no file"):
        convert.load_ranks(model, tmp_path / "nothing")
    cut = tmp_path / "cut"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidInputError, match="damaged"):
        convert.load_ranks(model, cut)
    llama.save_pretrained(tmp_path / "model")
    with pytest.raises(InvalidInputError, match="not written by save_ranks"):
        convert.load_ranks(model, tmp_path / "model" / "model.safetensors")
    assert not model.config.trained_ranks


def test_nothing_useless_is_saved(llama: Any, tmp_path: Path) -> None:
    file = tmp_path / "ranks"
    with pytest.raises(InvalidInputError, match="untrained"):
        convert.save_ranks(convert.upcycle(llama, 24, local=4, sinks=2), file)
    model = trained(llama)
    with pytest.raises(InvalidInputError, match="windows"):
        convert.save_ranks(model, file, notes={"windows": "all"})
    model.model.layers[1].self_attn.rank_predictor.down.bias.data[0] = float("nan")
    with pytest.raises(InvalidInputError, match="NaN"):
        convert.save_ranks(model, file)
    assert not list(tmp_path.iterdir())
