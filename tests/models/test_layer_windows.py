"""Windows that differ from layer to layer: as many keys in all, held by mixers, cache and saved models alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamask import BoundedCache, DynamaskConfig, DynamaskForCausalLM, InvalidInputError
from dynamask.models import new_cache, uneven_windows
from tests.conftest import tiny_config, tiny_model

WINDOWS = [3, 9]


@given(
    layers=st.integers(1, 40),
    window=st.integers(1, 4096),
    every=st.integers(1, 8),
    first=st.integers(0, 7),
)
def test_uneven_windows_keep_as_many_keys(layers: int, window: int, every: int, first: int) -> None:
    windows = uneven_windows(layers, window, every=every, first=first)
    narrow = max(1, min(window // 4, 32))
    wide = [index for index in range(layers) if index % every == min(first, layers - 1) % every]
    assert len(windows) == layers
    assert layers * window - len(wide) < sum(windows) <= layers * window
    assert all(own == narrow for index, own in enumerate(windows) if index not in wide)
    assert len({windows[index] for index in wide}) == 1
    assert windows[wide[0]] >= window


def test_the_narrow_layers_window_can_be_given() -> None:
    assert uneven_windows(6, 512) == [32, 32, 32, 2912, 32, 32]
    assert uneven_windows(6, 512, narrow=128) == [128, 128, 128, 2432, 128, 128]
    for narrow, message in ((0, "at least 1"), (513, "see less than window=512 keys; got narrow=513")):
        with pytest.raises(InvalidInputError, match=message):
            uneven_windows(6, 512, narrow=narrow)


def test_uneven_is_a_word_of_the_configuration(tmp_path: Path) -> None:
    config = DynamaskConfig(num_hidden_layers=6, window=128, layer_windows="uneven")
    assert config.layer_windows == [32, 32, 32, 608, 32, 32]
    assert config.layer_locals == [16, 16, 16, 304, 16, 16]
    config.save_pretrained(tmp_path)
    assert DynamaskConfig.from_pretrained(tmp_path).layer_windows == config.layer_windows


def test_slopes_and_local_shares_go_with_the_window() -> None:
    fields = {"recency_spread": 4.0, "ranking": "attention"}
    model = tiny_model("dma", layer_windows=WINDOWS, rank_recency=0.2, **fields)
    even = [tiny_model("dma", window=window, rank_recency=0.2 * 6 / window, **fields) for window in WINDOWS]
    for layer, (window, alone) in enumerate(zip(WINDOWS, even, strict=True)):
        mixer, expected = model.model.layers[layer].mixer, alone.model.layers[layer].mixer
        assert (mixer.layer_window, mixer.layer_local) == (window, window // 2)
        torch.testing.assert_close(mixer.gate.log_recency, expected.gate.log_recency)
        torch.testing.assert_close(mixer.gate.log_rank_recency, expected.gate.log_rank_recency)
    penalised = tiny_model("swa", layer_windows=WINDOWS, distance_penalty=0.2)
    slopes = [layer.mixer.penalty.log_slope.exp()[0].item() for layer in penalised.model.layers]
    assert slopes == pytest.approx([0.2 * 6 / window for window in WINDOWS])


@torch.no_grad()
def test_a_layer_of_another_window_is_a_layer_of_a_model_with_that_window() -> None:
    """Layer by layer against models whose layers all have the one window, given the same states."""
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    model = tiny_model("dma", layer_windows=WINDOWS)
    states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    for layer, window in enumerate(WINDOWS):
        alone = tiny_model("dma", window=window)
        alone.load_state_dict(model.state_dict())
        theirs = alone(inputs_embeds=states[layer], use_cache=False, output_hidden_states=True).hidden_states
        if layer == 0:
            torch.testing.assert_close(theirs[1], states[1])
        else:  # the second layer's input goes in first
            first, second = alone.model.layers
            alone.model.layers = torch.nn.ModuleList([second, first])
            second.mixer.layer_idx = 0
            swapped = alone(inputs_embeds=states[1], use_cache=False, output_hidden_states=True).hidden_states
            other = model.model.norm(swapped[1])
            torch.testing.assert_close(other, states[2])


@pytest.mark.parametrize("attention", ["dma", "swa"])
@torch.no_grad()
def test_caches_hold_each_layers_own_window(attention: str) -> None:
    model = tiny_model(attention, layer_windows=WINDOWS)
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    for cache in (BoundedCache(model.config), new_cache(model.config)):
        model(ids, past_key_values=cache, use_cache=True)
        assert [set(layer.windows) for layer in cache.layers] == [{window} for window in WINDOWS]
    mixed = DynamaskForCausalLM(tiny_config("dma", layer_attention=["mha", "dma"], layer_windows=WINDOWS)).eval()
    cache = mixed(ids, use_cache=True).past_key_values
    assert (cache.layers[0].keys.shape[2], set(cache.layers[1].windows)) == (40, {9})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_windows": [6]}, "layer_windows gives the window of each of the 2 layers; got 1"),
        ({"layer_windows": [6, 0]}, "window must be an integer of at least 1"),
        ({"layer_windows": "wide"}, "a window per layer or \"uneven\"; got 'wide'"),
        ({"layer_windows": [6, 6], "attention": "nsa"}, "nsa takes the same window in all layers"),
    ],
)
def test_windows_that_do_not_fit_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tiny_config(**fields)
