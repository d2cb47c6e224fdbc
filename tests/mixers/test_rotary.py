"""Rotary embeddings: those of transformers' Qwen3, scaled or not."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dynamask import DynamaskConfig, InvalidInputError
from dynamask.mixers.rotary import RotaryFrequencies
from tests.conftest import tiny_config, tiny_model

SCALED = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 500.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_angles_are_qwen3s(kind: str) -> None:
    fields = {"head_dim": 16, "max_position_embeddings": 256}
    ours = DynamaskConfig(rope_parameters=dict(SCALED[kind]), **fields)
    theirs = Qwen3RotaryEmbedding(Qwen3Config(rope_parameters=dict(SCALED[kind]), **fields))
    positions = torch.tensor([[0, 1, 63, 64, 255], [7, 100, 101, 5000, 30000]])
    expected = theirs(torch.zeros(1), positions)
    for got, wanted in zip(RotaryFrequencies(ours, 16).angles(positions, torch.float32), expected, strict=True):
        torch.testing.assert_close(got.squeeze(1), wanted, rtol=0, atol=1e-6)


def test_scaled_embeddings_survive_a_cast_and_a_round_trip(tmp_path) -> None:
    ids = torch.arange(20)[None]
    model = tiny_model("mha", rope_parameters=dict(SCALED["yarn"])).float()
    plain = tiny_model("mha", rope_theta=500.0).float()
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    torch.testing.assert_close(model.bfloat16().float()(ids).logits, model(ids).logits)
    assert again.config.rope_parameters == model.config.rope_parameters


@torch.no_grad()
@pytest.mark.parametrize("attention", ["dma", "mla"])
def test_scaled_embeddings_decode_from_a_cache(attention: str) -> None:
    ids = torch.arange(30)[None]
    model = tiny_model(attention, rope_parameters=dict(SCALED["llama3"]))
    expected = model(ids, use_cache=False).logits
    cache = model(ids[:, :20]).past_key_values
    torch.testing.assert_close(model(ids[:, 20:], past_key_values=cache).logits, expected[:, 20:])


def test_rope_theta_and_rope_parameters_agree() -> None:
    config = tiny_config(rope_theta=500.0)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    assert tiny_config(rope_parameters=dict(SCALED["linear"])).rope_theta == 500.0
    old = tiny_config(rope_scaling={"type": "linear", "factor": 2.0})
    assert (old.rope_parameters["rope_type"], old.rope_parameters["rope_theta"]) == ("linear", 100.0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "rope_type must be one of default, .*; got .dynamic.",
        ),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor of at least 1; got 0.5"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta must be a number above 0"),
    ],
)
def test_what_cannot_be_computed_is_refused(parameters: dict, message: str) -> None:
    with pytest.raises((InvalidInputError, KeyError), match=message):
        tiny_config(rope_parameters=parameters)
