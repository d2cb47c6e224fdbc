"""Named configurations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        context = config.max_position_embeddings
        mean = context // 16 if name in ("even", "paper") else context * 9 // 128
        assert mean - 1 <= config.budget <= mean
    check_window_schedule(recipes.get(name).training.get("window_schedule", []))


@pytest.mark.parametrize("context", [64, 512, 8192])
def test_windows_go_with_the_context(context: int) -> None:
    config = recipes.apply("default", "30m", context)
    assert config.dense_layers(context) == []
    assert config.max_position_embeddings == max(2048, context)
    assert config.hidden_size == preset("30m").hidden_size


@pytest.mark.parametrize("name", ["default", "sliding", "recall"])
@pytest.mark.parametrize(("context", "narrow", "wide"), [(4096, 64, 1408), (1024, 16, 352)])
def test_one_layer_of_six_is_wide(name: str, context: int, narrow: int, wide: int) -> None:
    """The fields that the lab's studies scratch and needle measured."""
    config = recipes.apply(name, "tiny", context, num_hidden_layers=12)
    assert config.windows == 2 * [*3 * [narrow], wide, *2 * [narrow]]
    assert (config.sinks, config.attention) == (4, "dma" if name == "recall" else "swa")
    if name == "recall":
        assert (config.ranking, config.local, config.slopes) == ("learned", narrow - 4, None)


@given(layers=st.integers(1, 40), context=st.integers(1, 5000), name=st.sampled_from(["default", "recall"]))
def test_any_context_gives_a_model_whose_wide_layers_choose(layers: int, context: int, name: str) -> None:
    config = recipes.apply(name, "tiny", context, num_hidden_layers=layers)
    widest = max(window for windows in config.head_windows for window in windows)
    assert config.local + config.sinks <= min(window for windows in config.head_windows for window in windows)
    if context >= 64:
        assert config.dense_layers(context) == []
    if name == "recall":
        assert config.local + config.sinks < widest or context < 4


def test_shapes_and_overrides() -> None:
    base = tiny_config("mla", max_position_embeddings=256)
    config = recipes.apply("paper", base, sinks=None, windows=8)
    assert (config.ranking, config.windows, config.local, config.sinks) == ("paper", 8, 0, 0)
    assert (config.hidden_size, config.vocab_size) == (base.hidden_size, base.vocab_size)
    assert config.attention == "dma"
    assert recipes.apply("recall", "tiny", windows=8).local == 4
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
