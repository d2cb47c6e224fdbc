"""The Triton kernels against float64: on a GPU, or small on a CPU under TRITON_INTERPRET=1.

`test_triton.py` runs this file in a process of its own with the interpreter on, because Triton decides at import.
"""

from __future__ import annotations

import os

import pytest
import torch

from dynamask import key_expiry
from dynamask.cache import BoundedLayer
from dynamask.ops import attend
from dynamask.ops.reference import interval_attention_reference
from dynamask.ops.triton.replace import replace_lowest_kernel

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)
# numpy, which the interpreter computes with, has no bfloat16.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def scores_of(kind: str, shape: tuple, generator: torch.Generator) -> torch.Tensor:
    scores = torch.randn(shape, generator=generator)
    if kind == "rising":  # every new key outranks all: a sliding window
        return scores.sort(-1).values
    if kind == "falling":  # no new key is ever kept: the first ones stay
        return scores.sort(-1, descending=True).values
    if kind == "large":  # exp of it is no float32: only differences may be taken
        return scores + 300
    return (scores * 2).round() if kind == "ties" else scores


def check(
    heads=4, groups=2, queries=None, length=150, dim=32, window=40, local=0, dtype=torch.float32, kind="random",
    packed=False, padded=False, bias=True, known=True, value_dim=None,
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
    expiry = key_expiry(scores.detach(), window, local=local, segment_ids=segments, key_mask=mask)
    inputs = (query, key, value) + ((scores,) if bias else ())
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = interval_attention_reference(*wide[:3], expiry, wide[3] if bias else None, dim**-0.5)
    actual = attend(
        query, key, value, expiry, bias=scores if bias else None, backend="triton", max_live=window if known else 0
    )
    grad = torch.randn(expected.shape, generator=generator).to(dtype).to(DEVICE)
    pairs = [(actual, expected)]
    pairs += zip(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, wide, grad.double()), strict=True
    )
    for got, wanted in pairs:
        error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-9)
        assert error < TOLERANCE[dtype], error
    return actual


@pytest.mark.parametrize("kind", ["random", "rising", "falling", "ties"])
@pytest.mark.parametrize("known", [True, False])
def test_score_patterns(kind: str, known: bool) -> None:
    check(kind=kind, known=known)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_dtypes_and_head_ratios(dtype: torch.dtype, heads: int, groups: int) -> None:
    check(heads=heads, groups=groups, dtype=dtype, length=100)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256] if GPU else [64, 96])
@pytest.mark.parametrize("dtype", DTYPES if GPU else [torch.float32])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(dim=dim, length=300 if GPU else 60, dtype=dtype)


def test_packed_padded_and_both() -> None:
    check(packed=True)
    check(padded=True)
    check(packed=True, padded=True, local=7, known=False)


@pytest.mark.parametrize("queries", [1, 3, 8, 9, 77])
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


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["random", "rising", "falling", "ties"])
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


@pytest.mark.parametrize("length", [1, 2, 37, 1500])
@pytest.mark.parametrize("kind", ["random", "ties", "rising", "falling"])
def test_expiry_is_the_cpu_definition(length: int, kind: str) -> None:
    from dynamask.expiry import _contested_expiry, key_rank, segment_bounds
    from dynamask.ops.triton.expiry import contested_expiry

    generator = torch.Generator().manual_seed(length)
    scores = scores_of(kind, (2, 2, length), generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.05] = float("nan")
    segments = (torch.rand(2, length, generator=generator) < 0.05).long().cumsum(-1)
    for ids in (None, segments):
        start, end = segment_bounds(ids, 2, length, scores.device)
        for count in (1, 5, 400):
            rank = key_rank(scores)
            expected = _contested_expiry(rank, start, end, count)
            actual = contested_expiry(*(t.to(DEVICE) for t in (rank, start, end)), count)
            torch.testing.assert_close(actual.cpu().long(), expected)


@pytest.mark.parametrize("kind", ["random", "ties", "rising", "falling"])
@pytest.mark.parametrize(("length", "count"), [(2, 1), (37, 5), (700, 699), (700, 3), (1500, 400), (2600, 1030)])
def test_unpacked_expiry_is_the_cpu_definition(length: int, count: int, kind: str) -> None:
    from dynamask.expiry import sortable_scores
    from dynamask.ops.triton.expiry_unpacked import unpacked_expiry

    generator = torch.Generator().manual_seed(length)
    scores = scores_of(kind, (2, 2, length), generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.05] = float("nan")
    order = sortable_scores(scores).sort(dim=-1, stable=True).indices.to(DEVICE)
    for local in (0, 9):
        expected = key_expiry(scores, count + local, local=local)
        assert torch.equal(unpacked_expiry(order, count, local).cpu(), expected)


def test_lists_of_long_rows_are_those_of_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many large blocks the keys are scanned once for several of them; the lists are the same."""
    from dynamask.ops.triton import lists

    expiry = key_expiry(torch.randn(1, 2, 1500, generator=torch.Generator().manual_seed(0)), 40, local=3).to(DEVICE)
    expected = lists.build_lists(expiry, 1400, 16, 40)
    monkeypatch.setattr(lists, "_COARSE", 32)
    monkeypatch.setattr(lists, "_FAN", 4)
    actual = lists.build_lists(expiry, 1400, 16, 40)
    assert torch.equal(actual.whole, expected.whole)
    assert torch.equal(actual.partial, expected.partial)
    for row in range(2):
        for block in range(actual.whole.shape[1]):
            whole, partial = int(actual.whole[row, block]), int(actual.partial[row, block])
            got, wanted = actual.index[row, block], expected.index[row, block]
            assert torch.equal(got[:whole], wanted[:whole])
            assert torch.equal(got[len(got) - partial :], wanted[len(wanted) - partial :])


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (8, 2), (6, 2), (8, 1)])
def test_hopper_backward(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dim: int, heads: int, groups: int
) -> None:
    """The walk, which short rows would not take by themselves, cut into pieces and not."""
    from dynamask.ops.triton import backward, backward_hopper

    monkeypatch.setattr(backward, "_walk_kernel", lambda *_: backward_hopper.walk_kernel_launch)
    monkeypatch.setattr(backward_hopper, "_SHORTEST_PIECE", 128)
    for kind in ("random", "rising", "falling", "large"):
        check(heads=heads, groups=groups, dim=dim, dtype=dtype, length=700, window=150, kind=kind)
    check(heads=heads, groups=groups, dim=dim, dtype=dtype, length=300, queries=190, packed=True, padded=True)
    check(heads=heads, groups=groups, dim=dim, dtype=dtype, bias=False)


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (16, 4), (6, 2), (8, 1), (64, 1)])
def test_hopper_forward(dtype: torch.dtype, dim: int, heads: int, groups: int) -> None:
    """Many blocks, lists of several tiles that no tile divides, each score pattern."""
    from dynamask.ops.triton.gluon import hopper

    for kind, length, queries in (("random", 1100, 1100), ("rising", 515, 300), ("falling", 700, 700)):
        query = torch.randn(2, heads, queries, dim, device=DEVICE, dtype=dtype)
        key, value = (torch.randn(2, groups, length, dim, device=DEVICE, dtype=dtype) for _ in range(2))
        assert hopper("forward_hopper", query, value) is not None
        scores = scores_of(kind, (2, groups, length), torch.Generator().manual_seed(1)).to(DEVICE)
        expiry = key_expiry(scores, 200)
        actual = attend(query, key, value, expiry, bias=scores, backend="triton", max_live=200)
        expected = interval_attention_reference(
            query.double(), key.double(), value.double(), expiry, scores.double(), dim**-0.5
        )
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype], (kind, error)


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


@pytest.mark.parametrize("local", [0, 3, 40])
def test_replacing_in_one_launch_is_the_plain_step(local: int) -> None:
    """Many ties, NaN, infinities and both zeros; a new key given as a transposed view, as projections give it."""
    torch.manual_seed(0)
    batch, groups, slots, steps = 2, 3, 40, 60
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 2.0], device=DEVICE)
    plain, fused = (BoundedLayer(slots, local) for _ in range(2))
    score = values[torch.randint(8, (batch, groups, slots), device=DEVICE)]
    key = torch.randn(batch, groups, slots, 16, device=DEVICE)
    # Grown one by one in the CPU's way, so that both start from the same full layer.
    for layer in (plain, fused):
        with torch.no_grad():
            layer.extend(key, key[..., :8], score, None)
    clock = torch.full((batch, groups), slots, device=DEVICE)
    held = [getattr(fused, name).contiguous().clone() for name in ("keys", "values", "scores", "positions")]
    for _ in range(steps):
        new = torch.randn(batch, 1, groups, 16, device=DEVICE).transpose(1, 2)
        score = values[torch.randint(8, (batch, groups, 1), device=DEVICE)]
        plain._replace_plainly(new, new[..., :8], score)
        plain.advance()
        replace_lowest_kernel(new, new[..., :8], score, *held, clock, local)
        for name, tensor in zip(("keys", "values", "scores", "positions"), held, strict=True):
            assert torch.equal(getattr(plain, name).nan_to_num(nan=7.5), tensor.nan_to_num(nan=7.5)), name
    assert bool((clock == slots + steps).all())
