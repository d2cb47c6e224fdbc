"""The Triton kernels against float64: on a GPU, or small on a CPU under TRITON_INTERPRET=1.

`test_triton.py` runs this file in a process of its own with the interpreter on, because Triton decides at import.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamask import key_expiry
from dynamask.ops.expiry import key_expiry_by_definition
from dynamask.ops.hopper import dispatch
from dynamask.ops.hopper.row_sums import RowSums
from dynamask.ops.interval.api import attend
from dynamask.ops.interval.reference import interval_attention_reference
from tests.ops.checks import LOWEST, spoilt_reaches_only_its_queries, weights_sum_to_one

GPU = torch.cuda.is_available()
NAN = math.nan
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)
# numpy, which the interpreter computes with, has no bfloat16.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]


def slow(*values: Any) -> Any:
    """The parameters of a case that the interpreter runs in the whole suite alone; a GPU runs it always."""
    return pytest.param(*values, marks=[] if GPU else [pytest.mark.slow])


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def quick_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes seconds over each `tl.sort`, whose exclusive ors it does one number at a time."""
    if GPU:
        return
    from triton.runtime.interpreter import TensorHandle

    def sort(x: tl.tensor, dim: int | None = None, descending: bool = False) -> tl.tensor:
        data = np.sort(x.handle.data)
        data = data[::-1].copy() if getattr(descending, "value", descending) else data
        return tl.tensor(TensorHandle(data, x.handle.dtype), x.type)

    monkeypatch.setattr(tl, "sort", sort)


@pytest.fixture(autouse=True)
def no_kernel_gives_way() -> Iterator[None]:
    """A Hopper kernel that fails its check at first use leaves its place to another, whose results would pass."""
    yield
    assert not dispatch._distrusted


def scores_of(kind: str, shape: tuple, generator: torch.Generator) -> torch.Tensor:
    scores = torch.randn(shape, generator=generator)
    if kind == "rising":  # every new key outranks all: a sliding window
        return scores.sort(-1).values
    if kind == "falling":  # no new key is ever kept: the first ones stay
        return scores.sort(-1, descending=True).values
    if kind == "large":  # exp of it is no float32: only differences may be taken
        return scores + 300
    return (scores * 2).round() if kind == "ties" else scores


def head_windows(scores: torch.Tensor, windows: Sequence[int], sinks: int = 0, local: int = 0, **facts) -> torch.Tensor:
    """Expiry with a window of its own for every head; the first `sinks` keys never expire, whatever the window."""
    heads = [
        key_expiry(scores[:, g : g + 1], window, local=min(local, window), **facts) for g, window in enumerate(windows)
    ]
    expiry = torch.cat(heads, 1)
    expiry[:, :, :sinks] = scores.shape[-1]
    return expiry


def check(
    heads=4, groups=2, queries=None, length=150, dim=32, window=40, local=0, dtype=torch.float32, kind="random",
    packed=False, padded=False, bias=True, known=True, value_dim=None, sinks=0,
):  # fmt: skip
    queries = length if queries is None else queries
    generator = torch.Generator().manual_seed(heads * 1000 + length)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE).requires_grad_()

    query, key = draw(2, heads, queries, dim), draw(2, groups, length, dim)
    value = draw(2, groups, length, value_dim or dim)
    scores = scores_of(kind, (2, groups, length), generator).to(DEVICE).requires_grad_()
    segments = (torch.rand(2, length, generator=generator) < 0.03).long().cumsum(-1).to(DEVICE) if packed else None
    mask = (torch.rand(2, length, generator=generator) < 0.8).to(DEVICE) if padded else None
    windows = window if isinstance(window, tuple) else (window,) * groups
    expiry = head_windows(scores.detach(), windows, sinks, local=local, segment_ids=segments, key_mask=mask)
    inputs = (query, key, value) + ((scores,) if bias else ())
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = interval_attention_reference(*wide[:3], expiry, wide[3] if bias else None, dim**-0.5)
    actual = attend(
        query, key, value, expiry, bias=scores if bias else None, backend="triton",
        max_live=tuple(window + sinks for window in windows) if known else 0,
    )  # fmt: skip
    grad = torch.randn(expected.shape, generator=generator).to(dtype).to(DEVICE)
    pairs = [(actual, expected)]
    pairs += zip(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, wide, grad.double()), strict=True
    )
    for got, wanted in pairs:
        error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-9)
        assert error < TOLERANCE[dtype], error
    return actual


@pytest.mark.parametrize("kind", ["random", slow("rising"), slow("falling"), "ties"])
@pytest.mark.parametrize("known", [slow(True), False])
def test_score_patterns(kind: str, known: bool) -> None:
    check(kind=kind, known=known)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), [slow(1, 1), slow(4, 4), (6, 2), slow(8, 1)])
def test_dtypes_and_head_ratios(dtype: torch.dtype, heads: int, groups: int) -> None:
    check(heads=heads, groups=groups, dtype=dtype, length=100)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256] if GPU else [slow(64), 96])
@pytest.mark.parametrize("dtype", DTYPES if GPU else [torch.float32])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(dim=dim, length=300 if GPU else 60, dtype=dtype)


@pytest.mark.parametrize(("dim", "value_dim"), [slow(8, 8), slow(1, 4), slow(4, 40)])
@pytest.mark.parametrize("dtype", DTYPES if GPU else [torch.float16])
def test_heads_narrower_than_a_product_on_tensor_cores(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check(dim=dim, value_dim=value_dim, length=300 if GPU else 40, dtype=dtype)
    if GPU:
        check(dim=dim, value_dim=value_dim, queries=3, dtype=dtype)


@pytest.mark.parametrize(("packed", "padded"), [slow(True, False), slow(False, True), (True, True)])
def test_packed_padded_and_both(packed: bool, padded: bool) -> None:
    both = {"local": 7, "known": False} if packed and padded else {}
    check(packed=packed, padded=padded, **both)


@pytest.mark.parametrize("queries", [1, slow(3), slow(8), 9, slow(77)])
def test_fewer_queries_than_keys(queries: int) -> None:
    if queries <= 8:
        with torch.no_grad():
            query, key, value = (torch.randn(2, h, n, 32, device=DEVICE) for h, n in ((4, queries), (2, 700), (2, 700)))
            scores = torch.randn(2, 2, 700, device=DEVICE)
            expiry = key_expiry(scores, 300, local=20)
            actual = attend(query, key, value, expiry, bias=scores, backend="triton")
            expected = interval_attention_reference(
                query.double(), key.double(), value.double(), expiry, scores.double(), 32**-0.5
            )
            torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    check(queries=queries)


@pytest.mark.slow
def test_without_bias_and_with_another_value_width() -> None:
    check(bias=False)
    check(value_dim=16)


def test_query_without_keys() -> None:
    query, key, value = (torch.randn(1, 2, 40, 32, device=DEVICE).requires_grad_() for _ in range(3))
    expiry = torch.arange(40, device=DEVICE).int().expand(1, 2, 40).contiguous()
    expiry[:, :, 20:] = 40
    output = attend(query, key, value, expiry, backend="triton")
    assert (output[:, :, :20] == 0).all()
    output.sum().backward()
    for tensor in (query, key, value):
        assert (tensor.grad[:, :, :20] == 0).all()
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("known", [slow(True), False])
def test_head_windows(known: bool) -> None:
    """A window of one key beside one of all keys, in one call."""
    if known:
        check(heads=6, groups=3, window=(1, 150, 20), sinks=4)
    else:
        check(heads=3, groups=3, window=(150, 1, 30), known=False, bias=False, queries=70)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["random", "rising", "falling", "ties"])
@pytest.mark.slow
def test_deterministic_gradients(deterministic: None, kind: str) -> None:
    check(kind=kind)
    check(kind=kind, heads=6, groups=2, queries=90, packed=True, padded=True, bias=kind != "ties", value_dim=16)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256] if GPU else [64])
@pytest.mark.parametrize("dtype", DTYPES if GPU else [torch.float16])
def test_deterministic_head_dims(deterministic: None, dim: int, dtype: torch.dtype) -> None:
    check(dim=dim, length=300 if GPU else 60, dtype=dtype)


def test_deterministic_mode_is_bitwise() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        grads = []
        for _ in range(100 if GPU else 2):
            generator = torch.Generator().manual_seed(0)
            inputs = [torch.randn(1, 2, 150, 32, generator=generator).to(DEVICE).requires_grad_() for _ in range(3)]
            expiry = key_expiry(torch.randn(1, 2, 150, generator=generator).to(DEVICE), 40)
            attend(*inputs, expiry, backend="triton").square().sum().backward()
            grads.append([t.grad for t in inputs])
        for other in grads[1:]:
            assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("level", "queries"), [slow(-1e7, 40), slow(1e30, 40), slow(LOWEST, 40), slow(-LOWEST, 3), (LOWEST, 3)]
)
def test_weights_sum_to_one_under_large_biases(level: float, queries: int, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        weights_sum_to_one("triton", level, queries, DEVICE)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("queries", [40, 2])
def test_keys_at_minus_infinity_alone_give_zeros(queries: int) -> None:
    query, key, value, bias = (torch.randn(1, 2, n, 16, device=DEVICE) for n in (queries, 40, 40, 40))
    bias = bias[..., 0].clone()
    bias[:, 0] = float("-inf")
    bias[:, 1, 5:] = float("-inf")
    leaves = [t.requires_grad_() for t in (query, key, value, bias)]
    output = attend(*leaves[:3], key_expiry(torch.zeros(1, 2, 40, device=DEVICE), 4), bias=bias, backend="triton")
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = interval_attention_reference(*wide[:3], key_expiry(torch.zeros(1, 2, 40), 4).to(DEVICE), wide[3], 0.25)
    assert (expected[:, 1, 8:] == 0).all()
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    grads = (torch.autograd.grad(o.square().sum(), t) for o, t in ((output, leaves), (expected, wide)))
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("which", "number", "queries"),
    [
        slow("value", NAN, 40),
        pytest.param("key", NAN, 40, marks=pytest.mark.slow),
        pytest.param("padding", NAN, 40, marks=pytest.mark.slow),
        slow("value", math.inf, 3),
        ("padding", NAN, 1),
    ],
)
def test_what_a_query_does_not_see_cannot_reach_it(
    which: str, number: float, queries: int, deterministic: bool
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        spoilt_reaches_only_its_queries("triton", number, which, DEVICE, torch.float32, 1e-4, queries)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, chunks and bins so short that a row that the interpreter can bear has many of each."""
    from dynamask.ops.triton import expiry, lists

    monkeypatch.setattr(expiry, "_RUNS", ((expiry.LONGEST, 64, 1),))
    monkeypatch.setattr(expiry, "_WAYS", 4)
    monkeypatch.setattr(expiry, "_CHUNKS", ((expiry.LONGEST, 32, 1),))
    monkeypatch.setattr(expiry, "_BINS", 3)
    monkeypatch.setattr(expiry, "_FLOORS", (8, 16, 32))
    monkeypatch.setattr(expiry, "_SIFTED", 32)
    monkeypatch.setattr(expiry, "_FILTERED_RUNS", ((expiry.LONGEST, 64, 1),))
    monkeypatch.setattr(expiry, "_FILTERED_CHUNKS", ((expiry.LONGEST, 32, 1),))
    monkeypatch.setattr(expiry, "_PROGRAMS", 3)
    monkeypatch.setattr(lists, "_SCAN_STEP", 64)
    monkeypatch.setattr(lists, "_RUNS", ((1 << 62, 32),))
    monkeypatch.setattr(lists, "_LARGE", ((1 << 62, 64),))


SPECIAL = [0.0, -0.0, 1.0, 1e-40, -1e-40, float("inf"), float("-inf"), float("nan")]


@st.composite
def expiry_problems(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], dict]:
    length = draw(st.sampled_from([2, 3, 31, 33, 64, 100, 257 if GPU else 130]))
    batch, groups = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    kind = draw(st.sampled_from(["random", "rising", "falling", "ties", "special"]))
    scores = scores_of(kind, (batch, groups, length), generator)
    if kind == "special":
        scores = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), scores.shape, generator=generator)]
    segments, mask = None, None
    if draw(st.booleans()):  # from one long document to one for every key
        opens = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.01, 0.1, 0.6, 1.0]))
        segments = opens.long().cumsum(-1) - 5
    if draw(st.booleans()):
        mask = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.8]))
    sinks, local = min(draw(st.sampled_from([0, 0, 1, 3])), length - 1), draw(st.sampled_from([0, 1, 7, length]))
    counts = draw(st.lists(st.integers(sinks, length + 2), min_size=groups, max_size=groups))
    counts[0] = draw(st.integers(max(1, sinks), length - 1))
    window = [max(1, count + local) for count in counts]
    return scores, window, {"local": local, "sinks": sinks, "segment_ids": segments, "key_mask": mask}


@settings(
    max_examples=200 if GPU else 7,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(expiry_problems())
def test_expiry_is_the_definition(small_cuts: None, problem: tuple[torch.Tensor, list[int], dict]) -> None:
    from dynamask.ops.triton import expiry as expiry_kernels
    from dynamask.ops.triton.expiry import contested_expiry

    scores, window, facts = problem
    expected = key_expiry_by_definition(scores, window, **facts)
    segments, mask = (None if t is None else t.to(DEVICE) for t in (facts["segment_ids"], facts["key_mask"]))
    counts = [each - facts["local"] for each in window]
    for filtered_from in (1, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(expiry_kernels, "_FILTER", (filtered_from, 0))
            actual = contested_expiry(scores.to(DEVICE), counts, facts["local"], facts["sinks"], segments, mask)
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("kind", ["random", slow("ties"), slow("rising"), slow("falling")])
@pytest.mark.parametrize(
    ("length", "count"), [(2600, 1030), (33000, 2048), (140000, 300), (1500, 30)] if GPU else [(300, 70)]
)
def test_expiry_of_long_rows(length: int, count: int, kind: str) -> None:
    """The lengths of runs, chunks and bins that are used, against the tensor operations."""
    from dynamask.ops.triton.expiry import contested_expiry

    generator = torch.Generator().manual_seed(length)
    scores = scores_of(kind, (1, 2, length), generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.05] = float("nan")
    segments = (torch.rand(1, length, generator=generator) < 3 / length).long().cumsum(-1)
    mask = torch.rand(1, length, generator=generator) < 0.9
    for facts in ((None, None), (segments, mask)) if GPU else ((segments, mask),):
        windows = [count - 11, count + 9]
        expected = key_expiry(scores, windows, local=9, sinks=4, segment_ids=facts[0], key_mask=facts[1])
        on_device = [None if t is None else t.to(DEVICE) for t in facts]
        actual = contested_expiry(scores.to(DEVICE), [count - 20, count], 9, 4, *on_device)
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.skipif(not GPU, reason="tensors on a CPU take the tensor operations")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_expiry_of_other_dtypes(dtype: torch.dtype) -> None:
    scores = torch.randn(2, 2, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.rand(2, 500, generator=torch.Generator().manual_seed(1)) < 0.8
    expected = key_expiry(scores, 70, key_mask=mask)
    assert torch.equal(key_expiry(scores.to(DEVICE), 70, key_mask=mask.to(DEVICE)).cpu(), expected)


def checked_lists(expiry: torch.Tensor, queries: int, block: int, max_live: Sequence[int]) -> None:
    """Each list holds exactly the keys of its block, at the end where they belong; twice the same."""
    from dynamask.ops.triton import lists as list_kernels
    from dynamask.ops.triton.lists import build_lists

    lists, again = (build_lists(expiry.to(DEVICE), queries, block, max_live) for _ in range(2))
    length = expiry.shape[-1]
    position = torch.arange(length)
    for row, dies in enumerate(expiry.flatten(0, 1)):
        for number in range(-(-queries // block)):
            start = length - queries + number * block
            stop = min(start + block, length)
            seen = (position < stop) & (dies > position.clamp(min=start))
            exact = length > list_kernels.DIRECT or not max_live
            by_all = seen & (position <= start) & (dies >= stop)
            whole, partial = int(lists.whole[row, number]), int(lists.partial[row, number])
            entries, others = lists.of(row, number).cpu(), again.of(row, number).cpu()
            front, back = entries[:whole].long(), entries[len(entries) - partial :].long()
            assert torch.equal(torch.cat([front, back]).sort().values, position[seen])
            assert by_all[front].all()
            # Lists that come from the runs test the keys that expire as the block ends.
            assert (~by_all | (dies == stop))[back].all()
            if exact:
                assert not by_all[back].any()
            assert torch.equal(entries[:whole], others[:whole])
            assert torch.equal(entries[len(entries) - partial :], others[len(others) - partial :])


@pytest.mark.parametrize("kind", ["random", slow("rising"), slow("falling")])
@pytest.mark.parametrize(
    ("length", "queries", "block", "window", "local"),
    [slow(200, 200, 16, 40, 0), slow(333, 170, 48, 100, 30), (90, 1, 16, 7, 7), (1, 1, 16, 1, 0)],
)
@pytest.mark.parametrize("way", ["scan", "runs", slow("large blocks")])
def test_lists(
    small_cuts: None,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    kind: str,
    length: int,
    queries: int,
    block: int,
    window: int,
    local: int,
) -> None:
    from dynamask.ops.triton import lists as list_kernels

    monkeypatch.setattr(list_kernels, "SCAN", 1 << 20 if way == "scan" else 0)
    if way == "large blocks":
        monkeypatch.setattr(list_kernels, "DIRECT", 0)
    scores = scores_of(kind, (1, 2, length), torch.Generator().manual_seed(0))
    mask = torch.rand(1, length, generator=torch.Generator().manual_seed(1)) < 0.9
    expiry = key_expiry(scores, window, local=local, key_mask=mask)
    checked_lists(expiry, queries, block, [window] * 2)
    if kind == "random" and way == "large blocks":
        checked_lists(expiry, queries, block, ())


@pytest.mark.parametrize("known", [slow(True), slow(False)])
def test_lists_of_head_windows(small_cuts: None, known: bool) -> None:
    """Each head's lists take the room that its own window asks for."""
    from dynamask.ops.triton.lists import build_lists

    windows = (1, 100, 37)
    expiry = head_windows(torch.randn(2, 3, 230, generator=torch.Generator().manual_seed(0)), windows, sinks=4)
    limits = [window + 4 for window in windows] if known else ()
    checked_lists(expiry, 201, 16, limits)
    lists = build_lists(expiry.to(DEVICE), 201, 16, limits)
    assert lists.table[2].tolist() == [1, 2, 0]
    if known:
        assert lists.capacities == (32, 128, 64)
        assert lists.index.numel() == 2 * 13 * (32 + 128 + 64)


@pytest.mark.skipif(not GPU, reason="too long for the interpreter")
@pytest.mark.parametrize(("length", "block"), [(9000, 48), (140000, 192)])
def test_lists_of_long_rows(length: int, block: int) -> None:
    segments = (torch.rand(1, length) < 3 / length).long().cumsum(-1)
    expiry = key_expiry(torch.randn(1, 2, length), 2048, local=512, segment_ids=segments)
    checked_lists(expiry, length - 13, block, [2048] * 2)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("kind", ["random", slow("rising"), slow("falling")])
def test_walking_order(monkeypatch: pytest.MonkeyPatch, kind: str, local: bool) -> None:
    """Every key once, long-lived ones first where others are many, slabs by expiry."""
    from dynamask.ops.triton import backward_walk

    monkeypatch.setattr(backward_walk, "_SLAB", 64)
    monkeypatch.setattr(backward_walk, "_LONG", 50)
    length = 500
    scores = scores_of(kind, (2, 2, length), torch.Generator().manual_seed(0)).to(DEVICE)
    expiry = key_expiry(scores, 60, local=30 if local else 0)
    expiry[1, 0] = torch.arange(length)  # a row in which nothing lives
    order = backward_walk.walking_order(expiry)
    position = torch.arange(length, device=DEVICE)
    assert torch.equal(order.sort(-1).values, position.int().expand_as(order))
    lives = expiry > position
    for row, dies, living in zip(*(t.view(4, -1) for t in (order, expiry, lives)), strict=True):
        short = living & (dies - position < 50)
        sections = [living & ~short, short] if int(short.sum()) * 4 >= length else [living]
        begin = 0
        for section in sections:
            by_birth = position[section]
            for start in range(0, len(by_birth), 64):
                slab = row[begin + start : begin + min(start + 64, len(by_birth))].long()
                assert torch.equal(slab.sort().values, by_birth[start : start + 64])
                assert torch.equal(dies[slab].sort().values, dies[slab])
            begin += len(by_birth)
        assert not living[row[begin:].long()].any()


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (8, 2), (6, 2), (12, 2), (8, 1)])
@pytest.mark.parametrize("what", ["patterns", "packed", "no bias", "other values"])
def test_hopper_backward(
    monkeypatch: pytest.MonkeyPatch, what: str, dtype: torch.dtype, dim: int, heads: int, groups: int
) -> None:
    """The walk, which short rows would not take by themselves. Each kind of call compiles kernels of its own."""
    from dynamask.ops.hopper import backward_dkv as backward_hopper
    from dynamask.ops.triton import backward

    monkeypatch.setattr(backward, "_walk_kernel", lambda *_: backward_hopper.walk_kernel_launch)
    monkeypatch.setattr(backward_hopper, "_CHUNK", 8)
    shape = {"heads": heads, "groups": groups, "dim": dim, "dtype": dtype}
    if what == "patterns":
        for kind in ("random", "rising", "falling", "large"):
            check(length=700, window=150, kind=kind, **shape)
    elif what == "packed":
        check(length=300, queries=190, packed=True, padded=True, **shape)
    elif what == "no bias":
        check(bias=False, **shape)
    else:
        check(value_dim={32: 128, 64: 32, 128: 64}[dim], length=300, **shape)


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize(
    ("chunk", "overhead", "fanout"),
    [
        pytest.param(1, 0, 256, id="a step a chunk"),
        pytest.param(1, 5, 4, id="chunks of overhead alone"),
        pytest.param(7, 2, 2, id="pieces end within spans"),
        pytest.param(100000, 1, 8, id="chunks of many legs"),
    ],
)
def test_hopper_backward_in_odd_pieces(
    monkeypatch: pytest.MonkeyPatch, programs: int, chunk: int, overhead: int, fanout: int
) -> None:
    """Every way for a chunk and a leg to meet, searches of one level and of many."""
    from dynamask.ops.hopper import backward_dkv as backward_hopper
    from dynamask.ops.triton import backward

    monkeypatch.setattr(backward, "_walk_kernel", lambda *_: backward_hopper.walk_kernel_launch)
    monkeypatch.setattr(backward_hopper, "_programs", lambda device: programs)
    monkeypatch.setattr(backward_hopper, "_CHUNK", chunk)
    monkeypatch.setattr(backward_hopper, "_OVERHEAD", overhead)
    monkeypatch.setattr(backward_hopper, "_FANOUT", fanout)
    for kind, length, window in (("random", 700, 30), ("rising", 515, 200), ("falling", 400, 5)):
        check(heads=8, groups=2, dim=64, dtype=torch.float16, kind=kind, length=length, window=window)
    check(heads=2, groups=2, dim=128, dtype=torch.bfloat16, length=300, queries=9)  # walks shorter than a step
    check(heads=6, groups=2, dim=32, dtype=torch.bfloat16, length=333, packed=True, padded=True, bias=False)


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dead", [(), (0,), (3,), (1, 2), (0, 1, 2, 3)])
def test_hopper_walk_of_rows_without_living_keys(dead: tuple[int, ...]) -> None:
    """They get zeros, and the rows beside them what they get without them."""
    from dynamask.ops.hopper import backward_dkv as backward_hopper
    from dynamask.ops.triton.inputs import AttentionInputs
    from dynamask.ops.triton.lists import build_lists_and_spans

    torch.manual_seed(0)
    query, grad = (torch.randn(2, 8, 400, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    key, value = (torch.randn(2, 2, 400, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(2, 2, 400, device=DEVICE)
    expiry = key_expiry(bias, 50)
    lse, delta = torch.full((2, 8, 400), 5.0, device=DEVICE), torch.randn(2, 8, 400, device=DEVICE)
    sums = RowSums(lse, torch.zeros_like(lse), delta)

    def walk(expiry: torch.Tensor) -> list[torch.Tensor]:
        spans = build_lists_and_spans(expiry, 400, 32, (50, 50))[1]
        inputs = AttentionInputs(query, key, value, expiry, bias, 0.1)
        results = backward_hopper.walk_kernel_launch(inputs, grad, sums, spans)
        return [t.flatten(0, 1) for t in results]

    whole = walk(expiry)
    expiry.flatten(0, 1)[list(dead)] = torch.arange(400, dtype=torch.int32, device=DEVICE)
    for got, expected in zip(walk(expiry), whole, strict=True):
        expected[list(dead)] = 0
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)  # a bit of bfloat16
        assert expected.any() == (len(dead) < 4)


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (16, 4), (6, 2), (12, 2), (8, 1), (64, 1)])
def test_hopper_forward(dtype: torch.dtype, dim: int, heads: int, groups: int) -> None:
    """Many blocks, lists of several tiles that no tile divides, each score pattern."""
    from dynamask.ops.hopper.dispatch import hopper

    batch = 1 if heads == 64 else 2  # the reference takes gigabytes, in as many processes as run tests
    for kind, length, queries in (("random", 1100, 1100), ("rising", 515, 300), ("falling", 700, 700)):
        query = torch.randn(batch, heads, queries, dim, device=DEVICE, dtype=dtype)
        key, value = (torch.randn(batch, groups, length, dim, device=DEVICE, dtype=dtype) for _ in range(2))
        assert hopper("forward", query, value) is not None
        scores = scores_of(kind, (batch, groups, length), torch.Generator().manual_seed(1)).to(DEVICE)
        expiry = key_expiry(scores, 200)
        actual = attend(query, key, value, expiry, bias=scores, backend="triton", max_live=200)
        expected = interval_attention_reference(
            query.double(), key.double(), value.double(), expiry, scores.double(), dim**-0.5
        )
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype], (kind, error)


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_hopper_head_windows(monkeypatch: pytest.MonkeyPatch, dim: int, walk: bool) -> None:
    """Windows from one key to all of them in one call, sinks, more items than programs, and rows of one block."""
    from dynamask.ops.hopper import backward_dkv
    from dynamask.ops.triton import backward

    if walk:
        monkeypatch.setattr(backward, "_walk_kernel", lambda *_: backward_dkv.walk_kernel_launch)
    options = {"dim": dim, "dtype": torch.bfloat16}
    for kind in ("random", "rising", "falling"):
        check(heads=16, groups=4, length=3000, window=(1, 136, 3000, 700), kind=kind, sinks=4, **options)
    check(heads=9, groups=3, length=1500, window=(150, 1500, 1), bias=False, sinks=4, **options)
    check(heads=4, groups=4, length=1200, window=(40, 1, 300, 1100), packed=True, padded=True, local=9, **options)
    check(heads=16, groups=4, length=40, queries=30, window=(40, 1, 7, 3), **options)


@pytest.mark.parametrize(("bias", "consumers"), [slow(False, 2), (True, 2), slow(True, 3)])
def test_redoing_flagged_tiles(bias: bool, consumers: int) -> None:
    """Every other tile flagged: those get what the reference gives, the others stay as they were.

    Two consumers share the queries of a block, three its heads.
    """
    from dynamask.ops.hopper import redo
    from dynamask.ops.triton.backward import prepare
    from dynamask.ops.triton.inputs import AttentionInputs
    from dynamask.ops.triton.lists import build_lists

    batch, heads, groups, length, queries, dim, block = 1, 3, 1, 70, 50, 32, 32
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    query, grad = draw(batch, heads, queries, dim), draw(batch, heads, queries, dim)
    key, value, scores = draw(batch, groups, length, dim), draw(batch, groups, length, dim), draw(batch, groups, length)
    expiry = key_expiry(scores, 20)
    value[0, 0, 60], key[0, 0, 41] = float("nan"), float("inf")
    leaves = [t.detach().double().requires_grad_() for t in (query, key, value)]
    added = scores if bias else None
    wide = scores.double() if bias else None
    expected = interval_attention_reference(*leaves, expiry, wide, dim**-0.5)
    lists = build_lists(expiry, queries, block, [20])
    blocks = lists.whole.shape[1]
    flags = torch.arange(blocks * consumers, dtype=torch.int32, device=DEVICE) % 2
    output = torch.full_like(query, 7.0)
    largest, rest = (torch.full((batch, heads, queries), 7.0, device=DEVICE) for _ in range(2))
    inputs = AttentionInputs(query, key, value, expiry, added, dim**-0.5)
    results = (output, largest, rest)
    rows_for = 4 if consumers == 2 else 1
    redo.redo_forward(inputs, lists, flags, consumers, rows_for, results)
    head, place = torch.arange(heads, device=DEVICE)[:, None], torch.arange(queries, device=DEVICE)
    redone = place // (block // consumers) if consumers == 2 else place // block * consumers + head
    redone = (redone % 2).bool().expand(heads, queries)
    assert (output[:, ~redone] == 7).all()
    torch.testing.assert_close(output[:, redone].double(), expected[:, redone], equal_nan=True, atol=1e-5, rtol=1e-4)
    full = torch.ones_like(flags)
    redo.redo_forward(inputs, lists, full, consumers, rows_for, results)
    d_query = torch.full_like(query, 7.0)
    sums = prepare(grad, output, largest, rest, parted=bias)
    redo.redo_dq(inputs, grad, (largest, rest), sums.delta, lists, flags, consumers, rows_for, d_query)
    assert (d_query[:, ~redone] == 7).all()
    (wanted,) = torch.autograd.grad(expected, leaves[:1], grad.double())
    finite = redone & expected.isfinite().all(-1)[0]
    assert finite.any()
    torch.testing.assert_close(d_query[:, finite].double(), wanted[:, finite], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("ratio", [3, 4, 6])
@pytest.mark.parametrize("what", ["key", "value", "both", "infinite value"])
def test_hopper_keeps_nan_from_who_does_not_see_it(monkeypatch: pytest.MonkeyPatch, what: str, ratio: int) -> None:
    """Outputs and gradients of queries and keys beside a NaN are those without it."""
    from dynamask.ops.hopper import backward_dkv
    from dynamask.ops.triton import backward

    monkeypatch.setattr(backward, "_walk_kernel", lambda *_: backward_dkv.walk_kernel_launch)
    torch.manual_seed(0)
    query, grad = (torch.randn(1, 2 * ratio, 900, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    key, value = (torch.randn(1, 2, 900, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    expiry = key_expiry(torch.randn(1, 2, 900, device=DEVICE), 100)
    bad = torch.tensor([0, 310, 311, 700], device=DEVICE)
    position = torch.arange(900, device=DEVICE)
    sees = ((bad <= position[:, None]) & (position[:, None] < expiry[..., None, bad])).any(-1)  # (1, 2, 900)
    rows = ~sees.repeat_interleave(ratio, 1)
    results = []
    for poisoned in (False, True):
        inputs = [query.clone(), key.clone(), value.clone()]
        if poisoned and what in ("key", "both"):
            inputs[1][:, :, bad] = float("nan")
        if poisoned and what != "key":
            inputs[2][:, :, bad] = float("inf" if what == "infinite value" else "nan")
        for tensor in inputs:
            tensor.requires_grad_()
        output = attend(*inputs, expiry, backend="triton", max_live=100)
        clean = grad * rows[..., None]
        results.append([output, *torch.autograd.grad(output, inputs, clean)])
    (output, dq, dk, dv), (got, got_dq, got_dk, got_dv) = results
    torch.testing.assert_close(got[rows], output[rows], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(got_dq[rows], dq[rows], atol=3e-2, rtol=3e-2)
    assert not got[~rows].isfinite().all(-1).any()
    # Keys that no query sees together with a NaN: the others get gradients of rows that are NaN.
    beside = torch.zeros(2, 900, dtype=torch.bool, device=DEVICE)
    for g in range(2):
        lives = (position[:, None] <= position) & (position < expiry[0, g, :, None])
        beside[g] = (lives & sees[0, g]).any(-1)
    alone = ~beside & (expiry[0] > position)
    assert alone.any()
    for got_gradient, wanted in ((got_dk, dk), (got_dv, dv)):
        torch.testing.assert_close(got_gradient[0][alone], wanted[0][alone], atol=3e-2, rtol=3e-2)


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("height", [0.0, -1e5, 1e7, -1e7, torch.finfo(torch.float32).min])
def test_hopper_weights_sum_to_one_at_any_bias(monkeypatch: pytest.MonkeyPatch, height: float) -> None:
    """With values of one the output is one, and the gradients of the values sum to those of the output."""
    from dynamask.ops.hopper import backward_dkv
    from dynamask.ops.triton import backward

    monkeypatch.setattr(backward, "_walk_kernel", lambda *_: backward_dkv.walk_kernel_launch)
    torch.manual_seed(0)
    query = torch.randn(1, 8, 700, 64, device=DEVICE, dtype=torch.bfloat16)
    key = torch.randn(1, 2, 700, 64, device=DEVICE, dtype=torch.bfloat16)
    value = torch.ones(1, 2, 700, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    bias = torch.randn(1, 2, 700, device=DEVICE) + height if height > -1e30 else torch.full((1, 2, 700), height).cuda()
    expiry = key_expiry(torch.randn(1, 2, 700, device=DEVICE), 100)
    output = attend(query, key, value, expiry, bias=bias, backend="triton", max_live=100)
    torch.testing.assert_close(output, torch.ones_like(output), atol=1e-2, rtol=0)
    (gradient,) = torch.autograd.grad(output.sum(), value)
    torch.testing.assert_close(
        gradient.float().sum() / output.float().sum(), torch.ones((), device=DEVICE), atol=1e-2, rtol=0
    )
    bias[:, 0] = float("-inf")
    query.requires_grad_()
    output = attend(query, key, value, expiry, bias=bias, backend="triton", max_live=100)
    assert (output[:, :4] == 0).all()
    gradients = torch.autograd.grad(output.sum(), (query, value))
    assert all(t.isfinite().all() for t in gradients)
    assert (gradients[1][:, 0] == 0).all()


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
def test_hopper_passes_nan_on() -> None:
    """A query that is not a number gives NaN in its own row, and nothing waits for it."""
    query = torch.randn(1, 4, 600, 64, device=DEVICE, dtype=torch.bfloat16)
    key, value = (torch.randn(1, 1, 600, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    query[0, 2, 333, 5] = float("nan")
    query.requires_grad_()
    expiry = key_expiry(torch.randn(1, 1, 600, device=DEVICE), 100)
    output = attend(query, key, value, expiry, backend="triton", max_live=100)
    expected = torch.zeros(1, 4, 600, dtype=torch.bool, device=DEVICE)
    expected[0, 2, 333] = True
    assert torch.equal(output.isnan().any(-1), expected)
    (gradient,) = torch.autograd.grad(output[:, :2].sum(), query)
    assert not gradient[:, :2].isnan().any()
