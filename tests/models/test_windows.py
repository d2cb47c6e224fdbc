"""Windows that differ between layers and KV heads: held by mixers, cache and saved models alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamask import BoundedCache, DynamaskConfig, InvalidInputError
from dynamask.models import new_cache, uneven_windows
from dynamask.models.window_schedule import check_window_schedule, scheduled_windows
from dynamask.models.windows import set_head_windows
from tests.conftest import tiny_config, tiny_model

WINDOWS = [3, 9]
IDS = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))


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


def test_windows_are_spelled_out(tmp_path: Path) -> None:
    assert tiny_config(windows=6).head_windows == ((6, 6), (6, 6))
    assert tiny_config(windows=[3, 9]).head_windows == ((3, 3), (9, 9))
    config = tiny_config(windows=[[3, 9], 5])
    assert config.head_windows == ((3, 9), (5, 5))
    assert config.budget == 5.5
    assert tiny_config(["mha", "dma"], windows=[3, 9]).budget == 9
    assert tiny_config("mha").budget is None
    config.save_pretrained(tmp_path)
    assert DynamaskConfig.from_pretrained(tmp_path).head_windows == config.head_windows


@pytest.mark.parametrize(("windows", "local", "sinks"), [(1024, 128, 4), (32, 16, 4), (6, 3, 1), (1, 0, 0)])
def test_defaults_go_with_the_smallest_window(windows: int, local: int, sinks: int) -> None:
    config = tiny_config(windows=[windows, 2 * windows])
    assert (config.local, config.sinks) == (local, sinks)
    paper = tiny_config(windows=windows, ranking="paper")
    assert (paper.local, paper.sinks) == (0, 0)


def test_dense_layers_are_named() -> None:
    config = tiny_config(["dma", "mha"], windows=[800, 800])
    assert config.dense_layers(512) == ["layer 0 sees 800 of 512: dense"]
    assert config.dense_layers(801) == []
    assert tiny_config(windows=[[4, 800], [801, 800]]).dense_layers(800) == ["layer 1 sees 800 of 800: dense"]


@torch.no_grad()
def test_a_layer_of_another_window_is_a_layer_of_a_model_with_that_window() -> None:
    """Layer by layer against models whose layers all have the one window, given the same states."""
    fields = {"local": 1, "sinks": 1}
    model = tiny_model("dma", windows=WINDOWS, **fields)
    states = model(IDS, use_cache=False, output_hidden_states=True).hidden_states
    for layer, window in enumerate(WINDOWS):
        alone = tiny_model("dma", windows=window, **fields)
        alone.load_state_dict(model.state_dict())
        if layer:  # the second layer's input goes in first
            alone.model.layers = torch.nn.ModuleList(reversed(alone.model.layers))
        output = alone(inputs_embeds=states[layer], use_cache=False, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(output if layer == 0 else model.model.norm(output), states[layer + 1])


@pytest.mark.parametrize("attention", ["dma", "swa"])
@torch.no_grad()
def test_caches_hold_each_heads_own_window(attention: str) -> None:
    model = tiny_model(attention, windows=[[3, 9], 5], sinks=1)
    for cache in (BoundedCache(model.config), new_cache(model.config)):
        model(IDS, past_key_values=cache, use_cache=True)
        assert [layer.keys.shape[1] for layer in cache.layers] == [12, 10]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windows": [6]}, "one entry for each of the 2 layers; got 1"),
        ({"windows": [6, 0]}, "at least 1"),
        ({"windows": [6, [6]]}, "windows of layer 1: .* each of the 2 KV heads; got 1"),
        ({"local": 5, "sinks": 2}, "local \\+ sinks must be at most the smallest window"),
        ({"local": -1}, "local must be an integer of at least 0"),
        ({"local": 3.0}, "local must be an integer"),
        ({"sinks": True}, "sinks must be an integer"),
        ({"windows": 1 << 31}, "at most 2147483647"),
        ({"ranking": "paper", "sinks": 1}, 'ranking="paper" keeps the best-scored keys alone'),
    ],
)
def test_windows_that_do_not_fit_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tiny_config(**fields)


def test_schedules_end_at_the_windows_that_are_saved() -> None:
    schedule = [[0, 4], [0.5, 1]]
    check_window_schedule(schedule)
    assert scheduled_windows(((3, 9), (5, 5)), schedule, 0, 10) == ((12, 36), (20, 20))
    assert scheduled_windows(((3, 9), (5, 5)), schedule, 5, 10) == ((3, 9), (5, 5))
    for bad in ([[0, 4]], [[0, 4], [2, 1]], [[0.5, 4], [0.5, 1]], [[0, 0], [0.5, 1]], [[0.5, 4], [0.2, 1]], [3]):
        with pytest.raises(InvalidInputError, match="window_schedule"):
            check_window_schedule(bad)


@torch.no_grad()
def test_windows_can_be_set_for_a_while() -> None:
    model, wide = tiny_model("dma"), tiny_model("dma", windows=12, local=3, sinks=1)
    expected = model(IDS, use_cache=False).logits
    set_head_windows(model, ((12, 12), (12, 12)))
    torch.testing.assert_close(model(IDS, use_cache=False).logits, wide(IDS, use_cache=False).logits)
    set_head_windows(model, model.config.head_windows)
    torch.testing.assert_close(model(IDS, use_cache=False).logits, expected)
