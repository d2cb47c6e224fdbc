"""Named configurations."""

from __future__ import annotations

import pytest

from dynamask import recipes
from dynamask.errors import UsageError
from dynamask.models import PRESETS, preset
from dynamask.models.window_schedule import check_window_schedule
from tests.conftest import tiny_config


@pytest.mark.parametrize("name", recipes.RECIPES)
@pytest.mark.parametrize("shape", PRESETS)
def test_every_recipe_is_sparse_at_every_presets_context(name: str, shape: str) -> None:
    config = recipes.apply(name, shape)
    assert config.dense_layers(config.max_position_embeddings) == []
    if name != "dense":
        share = 8 if name == "recall" else 16
        assert config.max_position_embeddings // share - 1 <= config.budget <= config.max_position_embeddings // share
    check_window_schedule(recipes.get(name).training.get("window_schedule", []))


@pytest.mark.parametrize("context", [64, 512, 8192])
def test_windows_go_with_the_context(context: int) -> None:
    config = recipes.apply("default", "30m", context)
    assert config.dense_layers(context) == []
    assert config.max_position_embeddings == max(2048, context)
    assert config.hidden_size == preset("30m").hidden_size


def test_shapes_and_overrides() -> None:
    base = tiny_config("mla", max_position_embeddings=256)
    config = recipes.apply("paper", base, sinks=None, windows=8)
    assert (config.ranking, config.windows, config.local, config.sinks) == ("paper", 8, 0, 0)
    assert (config.hidden_size, config.vocab_size) == (base.hidden_size, base.vocab_size)
    assert config.attention == "dma"
    assert recipes.apply("default", "tiny", 512, num_hidden_layers=2).head_windows[0][0] == 8


def test_unknown_names_are_named() -> None:
    with pytest.raises(UsageError, match="did you mean 'recall'"):
        recipes.apply("recal", "tiny")
    with pytest.raises(UsageError, match="unknown preset"):
        recipes.apply("default", "tinny")
    with pytest.raises(UsageError, match="unknown model field"):
        recipes.apply("default", "tiny", windws=3)
    with pytest.raises(UsageError, match="context must be"):
        recipes.apply("default", "tiny", 0)
