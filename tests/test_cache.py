"""BoundedCache: bounded, exact, and clear about what it cannot do."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dynamask import BoundedCache, CacheRollbackError, InvalidInputError, interval_attention, key_expiry
from dynamask.cache import BoundedLayer, LayeredCache, check_consistent
from dynamask.models import new_cache
from tests.conftest import tiny_config, tiny_model


class Text(NamedTuple):
    """Random inputs of one layer over a whole text, in float64, and what the layer must give."""

    query: Tensor
    key: Tensor
    value: Tensor
    ranks: Tensor | None
    mask: Tensor | None
    bias: bool
    windows: tuple[int, ...]
    local: int
    sinks: int

    @property
    def length(self) -> int:
        return self.query.shape[2]

    def expiry(self) -> Tensor:
        ranks = torch.zeros(self.key.shape[:3], dtype=torch.float64) if self.ranks is None else self.ranks
        return key_expiry(ranks, self.windows, local=self.local, sinks=self.sinks, key_mask=self.mask)

    def expected(self) -> Tensor:
        """(B, H, N, Dv) without a cache; rows of padding are zero."""
        bias = self.ranks if self.bias else None
        return self.masked(interval_attention(self.query, self.key, self.value, self.expiry(), bias=bias), 0)

    def masked(self, output: Tensor, start: int) -> Tensor:
        if self.mask is None:
            return output
        return output * self.mask[:, None, start : start + output.shape[2], None]

    def step(self, layer: BoundedLayer, start: int, stop: int) -> Tensor:
        part = slice(start, stop)
        output = layer.attend(
            self.query[:, :, part],
            self.key[:, :, part],
            self.value[:, :, part],
            None if self.ranks is None else self.ranks[:, :, part],
            key_mask=None if self.mask is None else self.mask[:, part],
            bias_is_rank=self.bias,
        )
        return self.masked(output, start)

    def rows(self, index: Tensor) -> Text:
        tensors = {name: getattr(self, name) for name in ("query", "key", "value", "ranks", "mask")}
        return self._replace(**{name: None if t is None else t[index] for name, t in tensors.items()})

    def layer(self) -> BoundedLayer:
        return BoundedLayer(self.windows, local=self.local, sinks=self.sinks)


def text(
    length: int,
    windows: tuple[int, ...],
    *,
    batch: int = 2,
    local: int = 0,
    sinks: int = 0,
    bias: bool = False,
    ranked: bool = True,
    padding: str = "none",
    share: int = 2,
    dim: int = 4,
    seed: int = 0,
) -> Text:
    """See `Text`. `padding`: none, left, or holes anywhere. Few distinct ranks: ties are where evictions go wrong."""
    random = torch.Generator().manual_seed(seed)
    groups = len(windows)
    query = torch.randn(batch, groups * share, length, dim, generator=random, dtype=torch.float64)
    key = torch.randn(batch, groups, length, dim, generator=random, dtype=torch.float64)
    value = torch.randn(batch, groups, length, dim - 1, generator=random, dtype=torch.float64)
    ranks = torch.randint(-2, 3, (batch, groups, length), generator=random).double() if ranked else None
    mask = None
    if padding == "holes":
        mask = torch.rand(batch, length, generator=random) < 0.6
    elif padding == "left":
        mask = torch.arange(length) >= torch.randint(0, length, (batch, 1), generator=random)
    return Text(query, key, value, ranks, mask, bias and ranked, windows, local, sinks)


@st.composite
def texts(draw: st.DrawFn) -> tuple[Text, list[int]]:
    pieces = draw(st.lists(st.sampled_from([1, 1, 1, 2, 5, 9]), min_size=1, max_size=14))
    windows = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    local = draw(st.integers(0, min(windows)))
    made = text(
        sum(pieces),
        windows,
        batch=draw(st.integers(1, 3)),
        local=local,
        sinks=draw(st.integers(0, min(windows) - local)),
        bias=draw(st.booleans()),
        ranked=draw(st.sampled_from([True, True, False])),
        padding=draw(st.sampled_from(["none", "left", "holes"])),
        share=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**16)),
    )
    return made, pieces


@settings(max_examples=80, deadline=None)
@given(drawn=texts(), room=st.booleans())
@torch.no_grad()
def test_attention_from_the_cache_is_attention_over_the_text(drawn: tuple[Text, list[int]], room: bool) -> None:
    given_text, pieces = drawn
    layer = given_text.layer()
    outputs = [
        given_text.step(layer, stop - piece, stop)
        for piece, stop in zip(pieces, itertools.accumulate(pieces), strict=True)
    ]
    torch.testing.assert_close(torch.cat(outputs, 2), given_text.expected(), rtol=1e-12, atol=1e-12)
    assert layer.get_seq_length() == given_text.length
    # It holds exactly what the last real token leaves.
    alive = given_text.expiry() == given_text.length
    for group, (start, stop) in enumerate(itertools.pairwise(layer.offsets)):
        assert stop - start <= given_text.windows[group]
        assert torch.equal((layer.positions[:, start:stop] >= 0).sum(-1), alive[:, group].sum(-1))


@settings(max_examples=25, deadline=None)
@given(drawn=texts())
@torch.no_grad()
def test_live_keys_are_the_keys_a_query_sees(drawn: tuple[Text, list[int]]) -> None:
    """`extend`, for mixers that need the keys themselves."""
    given_text, pieces = drawn
    length = given_text.length
    names = torch.arange(length).double().expand(*given_text.key.shape[:2], length)[..., None].contiguous()
    layer, expiry, done = given_text.layer(), given_text.expiry(), 0
    for piece in pieces:
        part = slice(done, done + piece)
        ranks = None if given_text.ranks is None else given_text.ranks[:, :, part]
        mask = None if given_text.mask is None else given_text.mask[:, part]
        live = layer.extend(names[:, :, part], names[:, :, part], ranks, mask)
        width = live.key.shape[2]
        for b, g, t in itertools.product(range(names.shape[0]), range(names.shape[1]), range(piece)):
            query, place = done + t, width - piece + t
            if mask is not None and not mask[b, t]:
                continue
            wanted = {j for j in range(query + 1) if expiry[b, g, j] > query}
            if piece == 1:  # its slots are in no order, and the query sees them all
                place = width - 1
            seen = live.expiry[b, g, : place + 1] > place
            assert set(live.key[b, g, : place + 1, 0][seen].long().tolist()) == wanted
        done += piece


@pytest.mark.parametrize("start", [0, 1, 7, 20])
@torch.no_grad()
def test_text_grows_slot_by_slot_into_uneven_windows(start: int) -> None:
    """Through several enlargements of the pools, with heads that are full while others are not."""
    given_text = text(150, (3, 40, 120), local=2, sinks=1, padding="holes", bias=True)
    layer = given_text.layer()
    outputs = [given_text.step(layer, 0, start)] if start else []
    outputs += [given_text.step(layer, t, t + 1) for t in range(start, 150)]
    torch.testing.assert_close(torch.cat(outputs, 2), given_text.expected(), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the kernels of a step")
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_steps_on_a_gpu(padding: str, bias: bool) -> None:
    given_text = text(300, (9, 40, 200), local=3, sinks=2, padding=padding, bias=bias, dim=32)
    tensors = {name: getattr(given_text, name) for name in ("query", "key", "value", "ranks", "mask")}
    moved = {name: t if t is None else t.cuda() for name, t in tensors.items()}
    narrow = {name: t.float() if name != "mask" and t is not None else t for name, t in moved.items()}
    there = given_text._replace(**narrow)
    for start in (0, 50, 250):
        layer = there.layer()
        outputs = [there.step(layer, 0, start)] if start else []
        outputs += [there.step(layer, t, t + 1) for t in range(start, 300)]
        torch.testing.assert_close(torch.cat(outputs, 2).double().cpu(), given_text.expected(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_memory_is_the_sum_of_the_windows_and_less_for_short_texts() -> None:
    given_text = text(400, (10, 20, 300), batch=1)
    layer = given_text.layer()
    given_text.step(layer, 0, 100)
    assert layer.keys.shape[1] < 10 + 20 + 200
    for start in range(100, 400, 50):
        given_text.step(layer, start, start + 50)
    assert layer.offsets == (0, 10, 30, 330)
    assert (layer.keys.shape, layer.values.shape, layer.ranks.shape) == ((1, 330, 4), (1, 330, 3), (1, 330))
    full = layer.num_bytes
    given_text.step(layer, 0, 1)
    assert layer.num_bytes == full == 330 * (7 * 8 + 8 + 4) + 3 * 8


@torch.no_grad()
def test_ranks_keep_float32_whatever_the_keys_have() -> None:
    layer = BoundedLayer(2)
    key = torch.zeros(1, 1, 3, 4, dtype=torch.bfloat16)
    ranks = torch.tensor([[[1.0001, 1.0, 1.0002]]])
    layer.attend(key, key, key, ranks)
    assert sorted(layer.positions[0].tolist()) == [0, 2]
    layer.attend(key[:, :, :1], key[:, :, :1], key[:, :, :1], ranks[:, :, 1:2])
    assert (layer.keys.dtype, layer.ranks.dtype) == (torch.bfloat16, torch.float32)
    assert sorted(layer.positions[0].tolist()) == [0, 2]


@torch.no_grad()
def test_a_rank_that_is_not_finite_is_no_bias() -> None:
    given_text = text(12, (3, 4), bias=True)
    assert given_text.ranks is not None
    given_text.ranks[:, :, ::3] = float("nan")
    given_text.ranks[:, :, 1::4] = float("inf")
    layer = given_text.layer()
    outputs = torch.cat([given_text.step(layer, 0, 6), *(given_text.step(layer, t, t + 1) for t in range(6, 12))], 2)
    bias = given_text.ranks.nan_to_num(nan=0.0, posinf=0.0)
    expected = interval_attention(given_text.query, given_text.key, given_text.value, given_text.expiry(), bias=bias)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


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
    slots = sum(model.config.head_windows[0])
    assert all(layer.keys.shape[1] == slots for layer in cache.layers)


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("filled", [6, 30])
@torch.no_grad()
def test_rows_are_reordered_selected_and_repeated(padding: str, filled: int) -> None:
    given_text = text(40, (3, 9, 20), batch=3, local=1, sinks=1, padding=padding)
    order = torch.tensor([2, 0, 0, 1])
    wanted = given_text.rows(order)
    layer = given_text.layer()
    given_text.step(layer, 0, filled)
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    layer.batch_repeat_interleave(2)  # 2 2 0 0 1 1
    layer.batch_select_indices(torch.tensor([1, 2, 3, 4]))
    outputs = [wanted.step(layer, filled, filled + 3), wanted.step(layer, filled + 3, filled + 4)]
    torch.testing.assert_close(torch.cat(outputs, 2), wanted.expected()[:, :, filled : filled + 4])
    layer.batch_select_indices(torch.tensor([False, True, True, False]))
    assert layer.keys.shape[0] == layer.clock.shape[0] == 2


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
def test_offloaded_and_prefetched() -> None:
    given_text = text(30, (3, 9), padding="left")
    layer = given_text.layer()
    given_text.step(layer, 0, 20)
    layer.offload()
    layer.prefetch()
    outputs = given_text.step(layer, 20, 30)
    torch.testing.assert_close(outputs, given_text.expected()[:, :, 20:])


@torch.no_grad()
def test_crop_before_any_eviction_is_exact_and_past_one_is_refused() -> None:
    model = tiny_model("dma", windows=16)
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = BoundedCache(model.config)
    model(ids[:, :12], past_key_values=cache, use_cache=True)
    cache.crop(8)
    rest = model(ids[:, 8:20], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, model(ids[:, :20], use_cache=False).logits[:, 8:])
    with pytest.raises(CacheRollbackError, match="cannot return to length 10"):
        cache.crop(10)
    with pytest.raises(CacheRollbackError, match="cannot return to length 19"):
        cache.crop(-1)
    for nothing in (20, 100, 0):  # 0 removes nothing, as in transformers' caches
        cache.crop(nothing)
    assert cache.get_seq_length() == 20


def test_a_crop_that_one_layer_refuses_changes_none() -> None:
    text = torch.randn(1, 1, 8, 4)
    cache = LayeredCache(layers=[DynamicLayer(), BoundedLayer(12), BoundedLayer(6)])
    cache.update(text, text, 0)
    for layer in cache.layers[1:]:
        layer.attend(text, text, text, None)
    for arguments in ({"max_length": 5}, {"tokens_to_remove": -3}):
        with pytest.raises(CacheRollbackError, match="cannot return to length 5"):
            cache.crop(**arguments)
        assert [layer.get_seq_length() for layer in cache.layers] == [8, 8, 8]
    narrow = LayeredCache(layers=cache.layers[:2])
    narrow.crop(-3)
    assert [layer.get_seq_length() for layer in narrow.layers] == [5, 5]


@settings(max_examples=20, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([1, 1, 3]), min_size=1, max_size=8),
    padding=st.sampled_from(["none", "left", "holes"]),
    back=st.integers(1, 12),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_what_is_cropped_is_forgotten(pieces: list[int], padding: str, back: int, seed: int) -> None:
    given_text = text(40, (24, 30), local=3, sinks=2, padding=padding, seed=seed)
    layer, length = given_text.layer(), sum(pieces)
    for piece, stop in zip(pieces, itertools.accumulate(pieces), strict=True):
        given_text.step(layer, stop - piece, stop)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.crop(-back)
    left = max(0, length - back)
    assert layer.get_seq_length() == left
    steps = [*range(left, 40, 5), 40]
    outputs = [given_text.step(layer, start, stop) for start, stop in itertools.pairwise(steps)]
    torch.testing.assert_close(torch.cat(outputs, 2), given_text.expected()[:, :, left:])


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


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_filled_in_one_mode_and_continued_in_another(first: type, then: type) -> None:
    given_text = text(30, (3, 9), bias=True)
    for tensor in (given_text.key, given_text.ranks):
        assert tensor is not None
        tensor.requires_grad_()
    layer = given_text.layer()
    with first():
        before = given_text.step(layer, 0, 8)
    with then():
        outputs = [given_text.step(layer, t, t + 1) for t in range(8, 12)] + [given_text.step(layer, 12, 30)]
    assert given_text.ranks is not None
    torch.testing.assert_close(torch.cat(outputs, 2).detach(), given_text.expected()[:, :, 8:].detach())
    # What was written since does not touch what the first part's backward pass needs.
    if first is torch.enable_grad:
        before.sum().backward()
        assert given_text.key.grad is not None


def test_gradients_reach_the_keys_of_earlier_calls() -> None:
    given_text = text(12, (3, 9), local=1, sinks=1, bias=True)
    leaves = [
        t.requires_grad_()
        for t in (given_text.query, given_text.key, given_text.value, given_text.ranks)
        if t is not None
    ]
    layer = given_text.layer()
    outputs = torch.cat([given_text.step(layer, 0, 6), given_text.step(layer, 6, 7), given_text.step(layer, 7, 12)], 2)
    weights = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad((outputs * weights).sum(), leaves)
    expected = torch.autograd.grad((given_text.expected() * weights).sum(), leaves)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@torch.no_grad()
def test_under_autocast_the_cache_has_its_dtype() -> None:
    given_text = text(20, (3, 9))
    layer = given_text.layer()
    parts = [t.float() for t in (given_text.query, given_text.key, given_text.value)]
    assert given_text.ranks is not None
    outputs = []
    with torch.autocast("cpu", torch.bfloat16):
        for part in (slice(0, 15), *(slice(t, t + 1) for t in range(15, 20))):
            outputs.append(layer.attend(*(t[:, :, part] for t in parts), given_text.ranks[:, :, part].float()))
    assert layer.keys.dtype == layer.values.dtype == outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(outputs, 2).double(), given_text.expected(), rtol=0.03, atol=0.03)


def test_windows_of_every_form() -> None:
    layers = BoundedCache(windows=[[3, 4], [5, 6], [7, 7]], local=1, sinks=2).layers
    assert [layer.windows for layer in layers] == [(3, 4), (5, 6), (7, 7)]
    assert [(layer.local, layer.sinks) for layer in layers] == [(1, 2)] * 3
    assert [layer.windows for layer in BoundedCache(windows=[3, 4]).layers] == [(3,), (4,)]
    assert [layer.windows for layer in BoundedCache(windows=np.array([3, 4])).layers] == [(3,), (4,)]
    assert [layer.windows for layer in BoundedCache(windows=np.int64(8), num_hidden_layers=2).layers] == [(8,), (8,)]
    config = SimpleNamespace(head_windows=((3, 4), (5, 6)), local=1, sinks=1, num_hidden_layers=2, window=99)
    assert [layer.windows for layer in BoundedCache(config).layers] == [(3, 4), (5, 6)]
    assert BoundedCache(config).layers[0].sinks == 1
    layer = BoundedLayer(np.int64(3))
    with torch.no_grad():
        layer.attend(*[torch.zeros(1, 2, 5, 4)] * 3, None)
    assert layer.windows == (3, 3)
    assert layer.offsets == (0, 3, 6)


def test_what_it_cannot_serve_is_named() -> None:
    with pytest.raises(InvalidInputError, match="attention 'mha'"):
        BoundedCache(tiny_config("mha"))
    with pytest.raises(InvalidInputError, match="needs a config"):
        BoundedCache(SimpleNamespace())
    with pytest.raises(InvalidInputError, match="one entry per layer"):
        BoundedCache(windows=[3, 4], num_hidden_layers=3)
    with pytest.raises(InvalidInputError, match="left dense"):
        BoundedCache(windows=[3, None], num_hidden_layers=2)  # type: ignore[list-item]
    with pytest.raises(InvalidInputError, match="at most the smallest window"):
        BoundedLayer([4, 9], local=3, sinks=2)
    with pytest.raises(InvalidInputError, match="carries no scores"):
        BoundedLayer(4).update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    zeros = torch.zeros
    with pytest.raises(InvalidInputError, match="per key/value head"):
        BoundedLayer([4, 5]).extend(zeros(2, 3, 3, 2), zeros(2, 3, 3, 2), None, None)
    layer = BoundedLayer(4)
    layer.extend(zeros(2, 1, 3, 2), zeros(2, 1, 3, 2), None, None)
    with pytest.raises(InvalidInputError, match="holds 2 sequences and was given 3"):
        layer.extend(zeros(3, 1, 1, 2), zeros(3, 1, 1, 2), None, None)
    with pytest.raises(InvalidInputError, match="another model"):
        layer.extend(zeros(2, 1, 1, 4), zeros(2, 1, 1, 4), None, None)
    with pytest.raises(InvalidInputError, match="ranks must be float"):
        layer.extend(zeros(2, 1, 1, 2), zeros(2, 1, 1, 2), zeros(2, 1, 2), None)
    with pytest.raises(InvalidInputError, match="key_mask must be bool"):
        layer.extend(zeros(2, 1, 1, 2), zeros(2, 1, 1, 2), None, zeros(2, 1))
    assert layer.get_seq_length() == 3


def test_a_cache_for_other_windows_is_refused() -> None:
    layer = BoundedLayer([3, 4], local=1)
    layer.check_fits((3, 4), local=1)
    layer.check_fits([3, 4], local=1)
    for windows, local, sinks in (((3, 5), 1, 0), (3, 1, 0), ((3, 4), 0, 0), ((3, 4), 1, 1)):
        with pytest.raises(InvalidInputError, match="was made for windows"):
            layer.check_fits(windows, local=local, sinks=sinks)
    BoundedLayer(3).check_fits((3, 3))
    with pytest.raises(InvalidInputError, match="was made for windows"):
        BoundedLayer(3).check_fits((3, 4))
    cache = BoundedCache(windows=[3, 4])
    cache.check_fits([3, (4, 4)])
    with pytest.raises(InvalidInputError, match="2 layers and the model has 3"):
        cache.check_fits([3, 4, 4])
    model = tiny_model("dma", windows=16)
    with pytest.raises(InvalidInputError, match="was made for windows"), torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long), past_key_values=BoundedCache(tiny_config("dma", windows=8)))


@torch.no_grad()
def test_a_cache_left_by_an_interrupted_forward_is_refused() -> None:
    given_text = text(10, (3, 4))
    cache = BoundedCache(windows=[[3, 4], [3, 4]])
    for layer in cache.layers:
        given_text.step(layer, 0, 5)
    cache.check_consistent()
    given_text.step(cache.layers[0], 5, 6)
    with pytest.raises(InvalidInputError, match="different numbers of tokens \\(5 to 6\\)"):
        check_consistent(cache)
    cache.reset()
    cache.check_consistent()


@pytest.mark.parametrize("attention", ["dma", "mha", "mla", "nsa", ["mha", "swa"], ["dma", "mha"]])
@torch.no_grad()
def test_caches_of_models_start_over(attention: str | list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing layers, too, are empty behind a reset, and show that a forward was interrupted."""
    model = tiny_model(attention)
    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    cache = new_cache(model.config)
    model(tokens[:, :20].flip(1), past_key_values=cache)
    cache.reset()
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens[:, :20], past_key_values=cache).logits, expected[:, :20])
    for interrupted in (cache, DynamicCache()):
        if interrupted is not cache:
            model(tokens[:, :20], past_key_values=interrupted)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1], "forward", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(tokens[:, 20:], past_key_values=interrupted)
        with pytest.raises(InvalidInputError, match="different numbers of tokens \\(20 to 24\\)"):
            model(tokens[:, 20:], past_key_values=interrupted)
    cache.reset()
    torch.testing.assert_close(model(tokens, past_key_values=cache).logits, expected)


def _interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_rows_are_selected_by_one_bool_each() -> None:
    layer = BoundedLayer(4)
    zeros = torch.zeros(3, 1, 3, 2)
    layer.extend(zeros, zeros, None, None)
    for rows in (2, 4):
        with pytest.raises(InvalidInputError, match="holds 3 sequences; got a mask of shape"):
            layer.batch_select_indices(torch.ones(rows, dtype=torch.bool))
    layer.batch_select_indices(torch.tensor([True, False, True]))
    assert layer.keys.shape[0] == layer.clock.shape[0] == 2


@torch.no_grad()
def test_what_empty_slots_were_made_of_reaches_no_query() -> None:
    """Padding that holds NaN stands where the pools are packed from; a crop leaves slots behind."""
    made = text(12, (9, 14), padding="left", local=2, sinks=1)
    assert made.mask is not None
    for tensor in (made.key, made.value):
        tensor.transpose(1, 2)[~made.mask] = float("nan")
    layer = made.layer()
    outputs = [made.step(layer, 0, 5).nan_to_num(), *(made.step(layer, t, t + 1).nan_to_num() for t in range(5, 12))]
    clean = made._replace(key=made.key.nan_to_num(), value=made.value.nan_to_num())
    torch.testing.assert_close(torch.cat(outputs, 2), clean.expected(), rtol=1e-12, atol=1e-12)

    made = text(12, (14, 20), local=2, sinks=1)
    layer = made.layer()
    made.step(layer, 0, 5)
    bad = made._replace(key=made.key * float("nan"), value=made.value * float("nan"))
    bad.step(layer, 5, 6)
    layer.crop(5)
    outputs = [made.step(layer, t, t + 1) for t in range(5, 12)]
    torch.testing.assert_close(torch.cat(outputs, 2), made.expected()[:, :, 5:], rtol=1e-12, atol=1e-12)
