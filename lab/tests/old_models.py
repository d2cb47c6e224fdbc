"""Small models of dynamask 0.1's mixers."""

from __future__ import annotations

import torch
from torch import nn

from dynamask import DynamaskConfig, DynamaskForCausalLM
from dynamask_lab.legacy import OldGate, config_of_0_1


def tiny_config(attention: str = "dma", **fields: object) -> DynamaskConfig:
    """Two layers of four heads over 50 tokens, with a window that a 40-token text overflows."""
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 100.0,
        "window": 6,
        "initializer_range": 0.2,
    }
    return config_of_0_1(attention=attention, **(shape | fields))


def tiny_model(attention: str = "dma", **fields: object) -> DynamaskForCausalLM:
    """A float64 model whose gates choose by content."""
    torch.manual_seed(0)
    model = DynamaskForCausalLM(tiny_config(attention, **fields)).double().eval()
    for module in model.modules():
        if isinstance(module, OldGate):
            nn.init.normal_(module.gate, std=2.0)
            nn.init.normal_(module.delta.weight, std=1.0)
            if module.ranking == "attention":
                nn.init.normal_(module.own_delta, std=1.0)
    return model
