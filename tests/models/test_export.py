"""Exports that would change the model are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
