"""What an export can hold is exported; exports that would change the model are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from dynamask import InvalidInputError, convert
from tests.conftest import tiny_model


def converted() -> Any:
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return convert.upcycle(LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).eval(), 8, local=2, sinks=1)


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("make", [tiny_model, converted], ids=["native", "converted"])
def test_onnx_is_refused(make: Any, tmp_path: Path) -> None:
    model = make()
    ids = torch.arange(6)[None]
    with pytest.raises(InvalidInputError, match=r"cannot be exported to ONNX: .* expire"):
        torch.onnx.export(model, (ids,), str(tmp_path / "model.onnx"), dynamo=False)
    assert not (tmp_path / "model.onnx").exists()
    model(ids)  # and not outside of an export


@pytest.mark.parametrize("make", [tiny_model, converted], ids=["native", "converted"])
@pytest.mark.parametrize("form", ["gguf", "onnx", "tensorflow"])
def test_other_formats_are_refused_before_anything_is_written(make: Any, form: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="save_format must be" if form == "tensorflow" else form.upper()):
        make().save_pretrained(tmp_path / "model", save_format=form)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter, and of untrained ranks
@pytest.mark.parametrize("make", [tiny_model, converted], ids=["native", "converted"])
@torch.no_grad()
def test_an_exported_program_computes_the_same_at_every_length(make: Any) -> None:
    """Past the windows, with padding, without a cache."""
    model = make().eval()
    if hasattr(model.model.layers[0], "self_attn"):
        torch.nn.init.normal_(model.model.layers[0].self_attn.rank_predictor.down.weight)
    given = {"input_ids": torch.arange(30)[None] % 50, "attention_mask": torch.ones(1, 30, dtype=torch.int64)}
    length = torch.export.Dim("length", min=9, max=64)  # past the narrowest window
    shapes = {name: {1: length} for name in given}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()
    for size in (12, 41):
        tokens, mask = torch.randint(3, 50, (1, size)), torch.ones(1, size, dtype=torch.int64)
        mask[0, :3] = 0
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(program(input_ids=tokens, attention_mask=mask).logits[:, 3:], expected[:, 3:])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [tiny_model, converted], ids=["native", "converted"])
def test_a_bounded_cache_is_not_exported(make: Any) -> None:
    model, tokens = make().eval(), torch.arange(6)[None]
    with pytest.raises(InvalidInputError, match=r"torch.export cannot hold a bounded cache.*use_cache=False"):
        torch.export.export(model, (), {"input_ids": tokens, "use_cache": True}, strict=False)
    with mock.patch("torch.compiler.is_exporting", return_value=True):
        static = StaticCache(config=model.config, max_cache_len=16)
        with pytest.raises(InvalidInputError, match="static cache"):
            model(tokens, past_key_values=static)
