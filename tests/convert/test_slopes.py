"""Ranks that rise with the position: every way to run a model still chooses the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from dynamask import BoundedCache, DynamaskConfig, DynamaskForCausalLM, InvalidInputError, convert
from dynamask.inspect.key_ranks import ranked_layers
from dynamask.mixers.rank_predictor import RankPredictor, slope_on_grid, sloped_ranks
from tests.conftest import tiny_config, tiny_model

SLOPES = [[0.0625, 0.0], [0.25, 1.5]]


def sloped(llama: Any, slopes: Any = SLOPES) -> Any:
    model = convert.upcycle(llama, 12, local=4, sinks=2)
    for module in model.modules():
        if isinstance(module, RankPredictor):
            torch.nn.init.normal_(module.down.weight)
    convert.set_windows(model, [[8, 12], [16, 9]])
    convert.set_slopes(model, slopes)
    model.config.trained_ranks = True
    return model


@torch.no_grad()
def test_cached_padded_and_packed_rows_choose_as_one_row_alone(llama: Any) -> None:
    model, close = sloped(llama), {"atol": 1e-4, "rtol": 1e-4}
    tokens = torch.randint(3, 300, (2, 60))
    whole = model(tokens, use_cache=False).logits
    assert not torch.allclose(whole, sloped(llama, None)(tokens, use_cache=False).logits, atol=1e-2)
    for cache in (BoundedCache(model.config), DynamicCache()):
        parts, start = [], 0
        for size in (23, 1, 1, 9, 1, 25):
            parts.append(model(tokens[:, start : start + size], past_key_values=cache, use_cache=True).logits)
            start += size
        torch.testing.assert_close(torch.cat(parts, 1), whole, **close)
    # Left padding, positions given and not; then one more token.
    rows = torch.cat([torch.zeros(2, 7, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(2, 7, dtype=torch.long), torch.ones_like(tokens)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for given in (None, positions):
        cache = BoundedCache(model.config)
        first = {} if given is None else {"position_ids": given[:, :60]}
        last = {} if given is None else {"position_ids": given[:, 60:]}
        before = model(rows[:, :60], attention_mask=mask[:, :60], past_key_values=cache, **first).logits
        after = model(rows[:, 60:], attention_mask=mask, past_key_values=cache, **last).logits
        torch.testing.assert_close(torch.cat([before[:, 7:], after], 1), whole, **close)
    packed = torch.cat([torch.arange(21), torch.arange(60)])[None]
    both = model(torch.cat([tokens[1:, :21], tokens[:1]], 1), position_ids=packed, use_cache=False).logits
    torch.testing.assert_close(both[0, :21], whole[1, :21], **close)
    torch.testing.assert_close(both[0, 21:], whole[0], **close)


@torch.no_grad()
def test_a_steep_slope_keeps_the_newest_keys(llama: Any) -> None:
    model, tokens = sloped(llama, [[1000.0] * 2] * 2), torch.randint(3, 300, (1, 60))
    steep = model(tokens).logits
    for module in model.modules():
        if isinstance(module, RankPredictor):
            module.initialize_parameters()
    convert.set_slopes(model, None)
    torch.testing.assert_close(steep, model(tokens).logits)


def test_sums_are_exact_wherever_the_text_begins() -> None:
    slope = slope_on_grid(0.0019)
    ranks = (torch.randn(1, 1, 400) * 4 * 64).round() / 64
    positions = torch.arange(400)[None]
    near, far = (sloped_ranks(ranks, (slope,), positions + start) for start in (0, 1_000_000))
    assert torch.equal(near.argsort(stable=True), far.argsort(stable=True))
    assert torch.equal(far - far[..., :1], near - near[..., :1])
    assert sloped_ranks(ranks, None, positions) is ranks
    assert sloped_ranks(ranks, (0.0,), positions) is ranks


@torch.no_grad()
def test_they_are_saved_and_shown(llama: Any, tmp_path: Path) -> None:
    model, tokens = sloped(llama), torch.randint(3, 300, (1, 60))
    model.save_pretrained(tmp_path / "model")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert loaded.config.head_slopes == model.config.head_slopes == ((0.0625, 0.0), (0.25, 1.5))
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    convert.save_ranks(model, tmp_path / "ranks.safetensors")
    other = convert.upcycle(llama, 200)
    convert.load_ranks(other, tmp_path / "ranks.safetensors")
    torch.testing.assert_close(other(tokens).logits, model(tokens).logits)
    flat = sloped(llama, None)
    convert.save_ranks(flat, tmp_path / "flat.safetensors")
    convert.load_ranks(other, tmp_path / "flat.safetensors")
    assert other.config.slopes is None
    rise = ranked_layers(model, tokens)[1].ranks - ranked_layers(flat, tokens)[1].ranks
    assert rise.shape == (1, 2, 60)
    assert bool((rise[0, 1].diff() > 0).any())


def test_allocation_chooses_a_slope_where_keys_only_age(llama: Any) -> None:
    model = sloped(llama)
    blocks = [torch.randint(3, 300, (2, 64))]
    convert.allocate_windows(model, blocks, 20, method="loss", slopes=(0.0, 0.5))
    assert model.config.slopes is None or {s for layer in model.config.slopes for s in layer or ()} <= {0.0, 0.5}
    convert.allocate_windows(model, blocks, 20, method="loss", slopes=(0.5,))
    assert model.config.slopes == [[0.5, 0.5]] * 2
    convert.allocate_windows(model, blocks, 20, method="threshold")
    assert model.config.slopes is None
    for bad in ((), (1e-9,), (-1.0,)):
        with pytest.raises(InvalidInputError, match="slopes must be numbers of at least 0"):
            convert.allocate_windows(model, blocks, 20, method="loss", slopes=bad)


def test_bad_slopes_leave_the_model_unchanged(llama: Any) -> None:
    model = sloped(llama)
    for slopes in (
        [[0.5, 0.5]],
        [[0.5], [0.5, 0.5]],
        [[0.5, -1.0]] * 2,
        [[0.5, float("inf")]] * 2,
        3,
        [3, 3],
        [["a", 0.0], None],
        [[True, 0.0], None],
        [[1e-9, 0.5], None],
    ):
        with pytest.raises(InvalidInputError, match="slopes"):
            convert.set_slopes(model, slopes)
    assert model.config.slopes == SLOPES


@torch.no_grad()
def test_slopes_do_not_change_under_a_filled_cache(llama: Any) -> None:
    model, tokens = sloped(llama), torch.randint(3, 300, (1, 61))
    cache = BoundedCache(model.config)
    model(tokens[:, :60], past_key_values=cache)
    convert.set_slopes(model, [[1.0, 1.0]] * 2)
    with pytest.raises(InvalidInputError, match="slopes were changed"):
        model(tokens[:, 60:], past_key_values=cache)
    cache.reset()
    model(tokens[:, :60], past_key_values=cache)


def test_slopes_of_a_new_model_are_not_set_behind_its_layers() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = DynamaskConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=8, windows=8)
    with pytest.raises(InvalidInputError, match=r"DynamaskConfig\(slopes"):
        convert.set_slopes(DynamaskForCausalLM(config), [[0.5, 0.5]])
    assert config.slopes is None


def test_slopes_need_a_layer_that_ranks() -> None:
    slopes = [[0.5, 0.5]] * 2
    for attention in ("swa", "mha", ["swa", "mha"]):
        with pytest.raises(InvalidInputError, match="no layer ranks any"):
            tiny_config(attention, slopes=slopes)
    assert tiny_config("swa", slopes=[[0.0, 0.0]] * 2).head_slopes == (None, None)
    assert tiny_config(["swa", "dma"], slopes=slopes).head_slopes == ((0.5, 0.5),) * 2


def test_slopes_changed_behind_a_new_model_are_refused() -> None:
    model, tokens = tiny_model(slopes=[[0.5, 0.0]] * 2), torch.arange(9)[None]
    model(tokens)
    model.config.slopes[0][1] = 0.5  # type: ignore[index]
    with pytest.raises(InvalidInputError, match=r"slopes was changed .* build DynamaskForCausalLM"):
        model(tokens)
    rebuilt = DynamaskForCausalLM(model.config)
    rebuilt.load_state_dict(model.state_dict())
    rebuilt(tokens)
