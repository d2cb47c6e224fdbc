"""Fixtures of the conversion tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large weights: attention must matter enough for a wrong mask to show.
    "initializer_range": 0.5,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shape() -> dict[str, Any]:
    """Sizes of a tiny model, for any architecture's configuration."""
    return dict(SHAPE)


@pytest.fixture
def llama() -> Any:
    """A tiny dense Llama with random weights."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
