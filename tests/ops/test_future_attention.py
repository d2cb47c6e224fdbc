"""Future attention: the CPU path is the definition, its edges hold, bad input is named, torch.compile takes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask import InvalidInputError, future_attention
from dynamask.ops.future_attention import (
    _blocked,
    future_attention_by_definition,
    future_attention_op,
    future_attention_with_lse,
)


def draw(batch=2, heads=4, groups=2, length=40, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, groups, length, dim, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def brute_force(query, key, local, first_query, segments, mask):
    """The docstring's words as loops over queries, heads and keys."""
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    result = torch.zeros(batch, groups, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for i in range(first_query, length):
                if not mask[b, i]:
                    continue
                seen = [j for j in range(i + 1) if segments[b, j] == segments[b, i] and mask[b, j]]
                logits = [float(query[b, h, i] @ key[b, g, j]) / math.sqrt(dim) for j in seen]
                total = sum(math.exp(x) for x in logits)
                for j, x in zip(seen, logits, strict=True):
                    if i >= j + local:
                        result[b, g, j] = max(float(result[b, g, j]), math.exp(x) / total)
    return result


@pytest.mark.parametrize(("local", "first_query"), [(0, 0), (3, 0), (0, 5), (2, 7)])
def test_definition_is_the_docstring(local: int, first_query: int) -> None:
    query, key = draw(length=12, dim=3)
    segments = torch.tensor([[0] * 5 + [1] * 7, [2] * 12])
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) < 0.8
    expected = brute_force(query, key, local, first_query, segments, mask)
    actual = future_attention_by_definition(
        query, key, local=local, first_query=first_query, segment_ids=segments, key_mask=mask
    )
    torch.testing.assert_close(actual, expected)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 60),
    ratio=st.integers(1, 3),
    groups=st.integers(1, 2),
    rows=st.integers(1, 30),
    local=st.integers(0, 70),
    first_query=st.integers(0, 70),
    packed=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocked_path_is_the_definition(
    length: int,
    ratio: int,
    groups: int,
    rows: int,
    local: int,
    first_query: int,
    packed: bool,
    padded: bool,
    seed: int,
) -> None:
    query, key = draw(heads=groups * ratio, groups=groups, length=length, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    segments = (torch.rand(2, length, generator=generator) < 0.1).long().cumsum(-1) if packed else None
    mask = torch.rand(2, length, generator=generator) < 0.7 if padded else None
    expected = future_attention_by_definition(
        query, key, local=local, first_query=first_query, segment_ids=segments, key_mask=mask, scale=0.7
    )
    actual = _blocked(query, key, local, first_query, segments, mask, 0.7, rows=rows)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    query, key = draw(dtype=dtype)
    expected = future_attention_by_definition(query.double(), key.double())
    for backend in ("auto", "torch", "reference"):
        actual = future_attention(query, key, backend=backend)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-5)
    assert future_attention(query.double(), key.double()).dtype == torch.float64


def test_packed_is_separate_and_padded_is_unpadded() -> None:
    query, key = draw(batch=1, length=30)
    segments = torch.tensor([[0] * 11 + [1] * 19])
    packed = future_attention(query, key, local=2, segment_ids=segments)
    parts = [future_attention(query[:, :, part], key[:, :, part], local=2) for part in (slice(0, 11), slice(11, 30))]
    torch.testing.assert_close(packed, torch.cat(parts, -1))
    for pad in ((7, 0), (0, 7)):
        wide = [torch.nn.functional.pad(t, (0, 0, *pad), value=float("nan")) for t in (query, key)]
        mask = torch.nn.functional.pad(torch.ones(1, 30, dtype=torch.bool), pad)
        padded = future_attention(*wide, local=2, key_mask=mask)
        assert (padded[..., ~mask[0]] == 0).all()
        torch.testing.assert_close(padded[..., mask[0]], future_attention(query, key, local=2))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_edges(backend: str) -> None:
    query, key = draw(length=20)
    assert future_attention(query[:, :, :0], key[:, :, :0], backend=backend).shape == (2, 2, 0)
    assert future_attention(query[:0], key[:0], backend=backend).shape == (0, 2, 20)
    assert (future_attention(query[:, :, :1], key[:, :, :1], backend=backend) == 1).all()
    for options in ({"local": 20}, {"first_query": 20}, {"local": 1 << 40}, {"first_query": 1 << 40}):
        assert (future_attention(query, key, backend=backend, **options) == 0).all()
    nothing = torch.zeros(2, 20, dtype=torch.bool)
    assert (future_attention(query, key, key_mask=nothing, backend=backend) == 0).all()
    last = future_attention(query, key, local=19, backend=backend)
    assert (last[..., 1:] == 0).all()
    assert (last[..., 0] > 0).all()
    # The last query alone: its weights.
    weights = (query[:, :, -1:] @ key.repeat_interleave(2, 1).mT / math.sqrt(8)).softmax(-1)
    only = future_attention(query, key, first_query=19, backend=backend)
    torch.testing.assert_close(only, weights.view(2, 2, 2, 20).amax(2))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_values_that_are_not_finite(backend: str) -> None:
    query, key = draw(batch=1, heads=1, groups=1, length=10)
    broken = query.clone()
    broken[0, 0, 6] = float("nan")
    result = future_attention(broken, key, backend=backend)[0, 0]
    assert result[:7].isnan().all()  # every key that query 6 sees
    assert result[7:].isfinite().all()
    far = key.clone()
    far[0, 0, 3] = -float("inf")
    result = future_attention(query.abs(), far, backend=backend)[0, 0]
    assert result[3] == 0
    assert result.isfinite().all()


def test_large_logits() -> None:
    query, key = draw(dtype=torch.float32)
    expected = future_attention_by_definition(query.double(), key.double(), scale=100.0)
    torch.testing.assert_close(future_attention(query, key, scale=100.0).double(), expected, atol=1e-3, rtol=1e-3)


def test_no_gradient_and_autocast() -> None:
    query, key = draw(dtype=torch.float32)
    result = future_attention(query.requires_grad_(), key.requires_grad_())
    assert not result.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = future_attention(query, key.bfloat16())
    torch.testing.assert_close(narrow, future_attention(query.bfloat16(), key.bfloat16()), atol=0, rtol=0)


def test_operator_is_sound_and_compiles() -> None:
    query, key = draw(length=12, dtype=torch.float32)
    mask = torch.ones(2, 12, dtype=torch.bool)
    segments = torch.zeros(2, 12, dtype=torch.long)
    torch.library.opcheck(future_attention_op, (query, key, None, 1, 2, segments, mask, 0.3, "torch"))

    def call(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return future_attention(query, key, local=2, key_mask=mask, segment_ids=segments) * 2

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, key), call(query, key))


def wrong(**changes: object) -> Callable[[], object]:
    query, key = draw(length=10)
    arguments = {"query": query, "key": key, "lse": None} | changes
    return lambda: future_attention_with_lse(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": [1.0]}, "query must be a torch.Tensor"),
        ({"key": torch.zeros(2, 2, 10, 8, dtype=torch.long)}, "key must be a float tensor"),
        ({"key": torch.zeros(2, 2, 9, 8).double()}, "key must be .*length=10"),
        ({"key": torch.zeros(2, 3, 10, 8).double()}, "multiple of the number of key/value heads"),
        ({"key": torch.zeros(2, 2, 10, 8)}, "share one dtype"),
        ({"local": -1}, "local must be an integer of at least 0"),
        ({"local": 1.5}, "local must be an integer of at least 0"),
        ({"first_query": True}, "first_query must be an integer of at least 0"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"scale": "large"}, "scale must be a finite number"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"lse": torch.zeros(2, 4, 9)}, "lse must be a float tensor"),
        ({"key_mask": torch.ones(2, 10)}, "key_mask must be a bool tensor"),
        ({"segment_ids": torch.zeros(2, 9, dtype=torch.long)}, "segment_ids must be integers"),
        ({"segment_ids": torch.arange(10, 0, -1).expand(2, 10)}, "segment_ids must not decrease"),
        ({"key_mask": torch.ones(2, 10, dtype=torch.bool, device="meta")}, "one device"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        wrong(**changes)()
