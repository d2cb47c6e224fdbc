"""Saved models open where dynamask is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dynamask import convert
from dynamask.models.auto_code import FILE
from tests.conftest import tiny_model

TOKENS = torch.arange(3, 15)[None]


def _models() -> dict[str, Any]:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return {"native": tiny_model("dma").float(), "converted": convert.upcycle(dense, 8, local=3, sinks=1)}


@pytest.mark.parametrize("name", ["native", "converted"])
def test_own_classes_are_taken_where_dynamask_is_imported(name: str, tmp_path: Path) -> None:
    model = _models()[name]
    model.save_pretrained(tmp_path)
    assert "dynamask-attention" in (tmp_path / FILE).read_text()
    for trust in (None, True):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(loaded) is type(model)
        loaded.save_pretrained(tmp_path / "again")
        assert {path.suffix for path in (tmp_path / "again").iterdir()} == {".json", ".safetensors", ".py"}
        assert AutoConfig.from_pretrained(tmp_path / "again").auto_map == model.config.auto_map


@pytest.mark.slow
@pytest.mark.parametrize("name", ["native", "converted"])
def test_opens_without_an_import(name: str, tmp_path: Path) -> None:
    model = _models()[name]
    model.save_pretrained(tmp_path)
    expected = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "out = model.generate(torch.arange(3, 15)[None], max_new_tokens=6, do_sample=False, pad_token_id=0)\n"
        "model.save_pretrained(sys.argv[1] + '/again')\n"
        "print(out[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
