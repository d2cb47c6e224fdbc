"""`dynamask convert` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from tests.cli.conftest import Command


def test_convert(dynamask: Command, tmp_path: Path) -> None:
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path / "dense")
    target = tmp_path / "sparse"
    done = dynamask("convert", "upcycle", str(tmp_path / "dense"), str(target), "--window", "8")
    assert done.returncode == 0, done.stderr
    assert json.loads((target / "config.json").read_text())["model_type"] == "dynamask_llama"
    again = dynamask("convert", "upcycle", str(tmp_path / "dense"), str(target), "--window", "8")
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    assert dynamask("convert", "doge", str(tmp_path / "dense"), str(tmp_path / "x")).returncode == 2
    assert not (tmp_path / "x").exists()


def test_a_model_that_is_not_there(dynamask: Command, tmp_path: Path) -> None:
    done = dynamask("convert", "upcycle", "/no/such/model", str(tmp_path / "y"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
