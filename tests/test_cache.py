"""BoundedCache: bounded, exact, and clear about what it cannot do."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask import BoundedCache, CacheRollbackError, InvalidInputError, key_expiry
from dynamask.cache import BoundedLayer
from tests.conftest import tiny_config, tiny_model


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    window=st.integers(1, 6),
    pieces=st.lists(st.sampled_from([1, 1, 2, 5]), min_size=1, max_size=12),
    data=st.data(),
)
@torch.no_grad()
def test_holds_exactly_the_keys_a_query_sees(seed: int, window: int, pieces: list[int], data: st.DataObject) -> None:
    local = data.draw(st.integers(0, window))
    length = sum(pieces)
    # Few distinct values: ties are where an eviction goes wrong.
    scores = torch.randint(-2, 3, (2, 2, length), generator=torch.Generator().manual_seed(seed)).double()
    expiry = key_expiry(scores, window, local=local)
    names = torch.arange(length).double().expand(2, 2, length)[..., None].contiguous()
    layer, done = BoundedLayer(window, local), 0
    for piece in pieces:
        part = slice(done, done + piece)
        live = layer.extend(names[:, :, part], names[:, :, part], scores[:, :, part], None)
        width = live.key.shape[2]
        for b in range(2):
            for g in range(2):
                for t in range(piece):
                    query, place = done + t, width - piece + t
                    wanted = {j for j in range(query + 1) if expiry[b, g, j] > query}
                    seen = live.expiry[b, g, : place + 1] > place
                    assert set(live.key[b, g, : place + 1, 0][seen].long().tolist()) == wanted
        done += piece
        assert layer.keys.shape[2] <= window
        assert layer.get_seq_length() == done


@pytest.mark.parametrize("attention", ["dma", "swa"])
@torch.no_grad()
def test_memory_is_flat(attention: str) -> None:
    model = tiny_model(attention)
    cache = BoundedCache(model.config)
    ids = torch.randint(0, 50, (2, 200), generator=torch.Generator().manual_seed(0))
    sizes = []
    for start in range(0, 200, 20):
        model(ids[:, start : start + 20], past_key_values=cache, use_cache=True)
        sizes.append(cache.num_bytes)
    assert len(set(sizes)) == 1
    assert all(layer.keys.shape[2] == model.config.window for layer in cache.layers)


@torch.no_grad()
def test_beams_are_reordered_with_everything_that_belongs_to_them() -> None:
    model = tiny_model("dma")
    ids = torch.randint(0, 50, (3, 25), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 0])
    cache, expected = BoundedCache(model.config), BoundedCache(model.config)
    model(ids[:, :20], past_key_values=cache, use_cache=True)
    cache.reorder_cache(order)
    model(ids[order, :20], past_key_values=expected, use_cache=True)
    for step in range(20, 25):
        first, second = (
            model(ids[order, step : step + 1], past_key_values=c, use_cache=True).logits for c in (cache, expected)
        )
        torch.testing.assert_close(first, second)


@torch.no_grad()
def test_repeat_select_and_reset() -> None:
    model = tiny_model("dma")
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = BoundedCache(model.config)
    model(ids, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(3)
    assert cache.layers[0].keys.shape[0] == 6
    cache.batch_select_indices(torch.tensor([0, 3]))
    next_token = ids[:, :1]
    continued = model(next_token, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(continued, model(torch.cat([ids, next_token], 1), use_cache=False).logits[:, -1:])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.num_bytes == 0
    model(ids, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_crop_before_any_eviction_is_exact_and_past_one_is_refused() -> None:
    model = tiny_model("dma", window=16)
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = BoundedCache(model.config)
    model(ids[:, :12], past_key_values=cache, use_cache=True)
    cache.crop(8)
    rest = model(ids[:, 8:20], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, model(ids[:, :20], use_cache=False).logits[:, 8:])
    with pytest.raises(CacheRollbackError, match="cannot return to length 10"):
        cache.crop(10)
    cache.crop(20)  # nothing to take back
    cache.crop(100)


@torch.no_grad()
def test_a_copy_is_the_way_back() -> None:
    model = tiny_model("dma")
    ids = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(0))
    cache = BoundedCache(model.config)
    model(ids[:, :20], past_key_values=cache, use_cache=True)
    saved = copy.deepcopy(cache)
    for step in range(20, 25):
        model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
    logits = model(ids[:, 20:], past_key_values=saved, use_cache=True).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, 20:])


def test_what_it_cannot_serve_is_named() -> None:
    with pytest.raises(InvalidInputError, match="attention 'mha'"):
        BoundedCache(tiny_config("mha"))
    with pytest.raises(InvalidInputError, match="needs a config"):
        BoundedCache(SimpleNamespace())
    with pytest.raises(InvalidInputError, match="carries no scores"):
        BoundedLayer(4).update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    layer = BoundedLayer(4)
    layer.extend(torch.zeros(2, 1, 3, 2), torch.zeros(2, 1, 3, 2), None, None)
    with pytest.raises(InvalidInputError, match="holds 2 sequences and was given 3"):
        layer.extend(torch.zeros(3, 1, 1, 2), torch.zeros(3, 1, 1, 2), None, None)
