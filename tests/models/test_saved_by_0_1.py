"""Configurations saved by dynamask 0.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamask import DynamaskConfig, InvalidInputError

_SHAPE = {"model_type": "dynamask", "transformers_version": "5.17.0", "num_hidden_layers": 2, "hidden_size": 64}
_SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 10000.0}


def load(folder: Path, **fields: Any) -> DynamaskConfig:
    (folder / "config.json").write_text(json.dumps(_SHAPE | fields))
    return DynamaskConfig.from_pretrained(folder)


def test_the_papers_form(tmp_path: Path) -> None:
    config = load(tmp_path, window=64, local=0, recency=0.0, layer_windows=[32, 96])
    assert (config.attention, config.ranking, config.windows) == ("dma", "paper", [32, 96])
    assert (config.local, config.sinks, config.rope_theta) == (0, 0, 10000.0)
    config.save_pretrained(tmp_path)
    again = DynamaskConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("attention", ["mha", "swa", "mla", "nsa"])
def test_rivals(attention: str, tmp_path: Path) -> None:
    fields = {"window": 64, "local": 32, "recency": 1 / 64}
    if attention == "mla":
        dimensions = {"kv_lora_rank": 40, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
        config = load(tmp_path, attention=attention, **fields, **dimensions)
        assert config.mla == dimensions | {"q_lora_rank": None}
    elif attention == "nsa":
        config = load(tmp_path, attention=attention, **fields, nsa_block_size=8, nsa_block_counts=5, nsa_window=30)
        assert config.nsa == {"block_size": 8, "block_counts": 5, "window": 30}
    else:
        config = load(tmp_path, attention=attention, **fields)
    assert (config.attention, config.windows, config.sinks) == (attention, 64, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"window": 64, "local": 32, "recency": 1 / 64},
            "recency=0.015625, local=32, which",
        ),
        ({"recency": 0.0, "local": 0, "score_form": "linear"}, "score_form='linear'"),
        ({"recency": 0.0, "local": 0, "ranking": "attention", "rank_recency": 0.1}, "ranking='attention'"),
        ({"attention": "swa", "recency": 0.1, "distance_penalty": 0.2}, "distance_penalty=0.2"),
        ({"attention": "swa", "recency": 0.1, "rope_layers": [True, False]}, "rope_layers"),
    ],
)
def test_what_is_gone_is_named(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        load(tmp_path, **fields)
