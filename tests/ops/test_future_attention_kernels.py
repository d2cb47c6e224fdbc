"""The kernels of future attention against float64: on a GPU, or small on a CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

from dynamask.ops.future_attention import future_attention, future_attention_by_definition, future_attention_with_lse
from dynamask.ops.triton.future_attention import Tiles, future_attention_launch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TMA = not GPU or torch.cuda.get_device_capability()[0] >= 9
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)
# Several tiles of each part of a walk in a row that the interpreter can bear; on a GPU what it is called with.
SMALL = {"sum_tiles": Tiles(32, 16, 4, 2, tma=True), "max_tiles": Tiles(16, 32, 4, 2, tma=True)}


def check(
    batch=1, heads=1, groups=1, length=700 if GPU else 85, dim=32, dtype=torch.float32, local=0, first_query=0,
    packed=False, mask=None, spread=1.0, tiles=None, tolerance=2e-5,
):  # fmt: skip
    generator = torch.Generator().manual_seed(length + dim)
    query = (torch.randn(batch, heads, length, dim, generator=generator) * spread).to(dtype)
    key = torch.randn(batch, groups, length, dim, generator=generator).to(dtype)
    segments = (torch.rand(batch, length, generator=generator) < 0.04).long().cumsum(-1) if packed else None
    if mask is not None:
        query = query.masked_fill(~mask[:, None, :, None], float("nan"))
        key = key.masked_fill(~mask[:, None, :, None], float("nan"))
    options = {"local": local, "first_query": first_query, "segment_ids": segments, "key_mask": mask}
    expected = future_attention_by_definition(query.double(), key.double(), **options)
    query, key, segments, mask = (None if t is None else t.to(DEVICE) for t in (query, key, segments, mask))
    tiles = tiles or ({} if GPU else SMALL)
    actual = future_attention_launch(query, key, None, local, first_query, segments, mask, dim**-0.5, **tiles)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double().cpu(), expected, atol=tolerance, rtol=0)
    return expected


@pytest.mark.parametrize(
    ("local", "first_query"), [(0, 0), (7, 0), (0, 40), (20, 33), (84, 0), (0, 84)] if GPU else [(0, 0), (7, 40)]
)
def test_later_queries(local: int, first_query: int) -> None:
    check(local=local, first_query=first_query)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (9, 3), (8, 1)] if GPU else [(3, 1), (4, 2)])
def test_head_ratios(heads: int, groups: int) -> None:
    check(batch=2, heads=heads, groups=groups, length=200 if GPU else 36)


@pytest.mark.parametrize("dim", [8, 32, 64, 80, 96, 128, 192, 256] if GPU else [48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float16])
def test_head_dims_and_dtypes(dim: int, dtype: torch.dtype) -> None:
    check(dim=dim, dtype=dtype, heads=2, length=500 if GPU else 40)


@pytest.mark.parametrize("local", [0, 5])
def test_packed(local: int) -> None:
    check(packed=True, local=local)


def test_padding_has_no_influence() -> None:
    length = 700 if GPU else 85
    position = torch.arange(length)
    check(mask=(position >= 37)[None], local=3)
    check(mask=(position < length - 23)[None], first_query=12)
    check(mask=torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 0.8, packed=True)
    check(mask=torch.zeros(1, length, dtype=torch.bool))
    # A hole in the main part of both walks.
    check(mask=((position < 20) | (position > 22))[None])


@pytest.mark.parametrize("length", [1, 2, 33, 129])
def test_short_rows(length: int) -> None:
    check(length=length, heads=2, tiles=None if GPU else SMALL)


def test_pointers_as_well_as_the_memory_accelerator() -> None:
    pointers = {name: Tiles(t.queries, t.keys, t.warps, t.stages) for name, t in SMALL.items()}
    if GPU:
        pointers = {"sum_tiles": Tiles(128, 64, 4, 3), "max_tiles": Tiles(64, 128, 4, 3)}
    check(dim=64 if GPU else 20, dtype=torch.float16, heads=2, groups=1, length=300 if GPU else 60, tiles=pointers)
    if GPU and TMA:
        fast = {"sum_tiles": Tiles(128, 64, 4, 3, tma=True), "max_tiles": Tiles(64, 128, 4, 3, tma=True)}
        check(dim=64, dtype=torch.float16, heads=2, groups=1, length=300, tiles=fast)


def test_logits_far_above_the_diagonal() -> None:
    """The main part overflows its reference point and is walked again."""
    length = 300 if GPU else 85
    query = torch.ones(1, 1, length, 32)
    key = torch.linspace(60, -60, length)[None, None, :, None].expand(1, 1, length, 32).contiguous()
    expected = future_attention_by_definition(query.double(), key.double())
    tiles = {} if GPU else SMALL
    actual = future_attention_launch(query.to(DEVICE), key.to(DEVICE), None, 0, 0, None, None, 32**-0.5, **tiles).cpu()
    torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=0)
    assert actual[0, 0, 0] == 1


def test_values_that_are_not_finite() -> None:
    length = 300 if GPU else 85
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, length, 32, generator=generator) for _ in range(2))
    tiles = {} if GPU else SMALL
    broken = query.clone()
    broken[0, 0, 70] = float("nan")
    result = future_attention_launch(broken.to(DEVICE), key.to(DEVICE), None, 0, 0, None, None, 0.2, **tiles).cpu()
    assert torch.equal(result[0, 0].isnan(), torch.arange(length) <= 70)
    far = key.clone()
    far[0, 0, 3] = -float("inf")
    result = future_attention_launch(query.abs().to(DEVICE), far.to(DEVICE), None, 0, 0, None, None, 0.2, **tiles)
    assert result[0, 0, 3] == 0
    assert result.isfinite().all()


def test_public_function_and_a_known_log_sum_exp() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 40, 32, generator=generator)
    key = torch.randn(1, 1, 40, 32, generator=generator)
    expected = future_attention_by_definition(query.double(), key.double(), local=3)
    options = {"local": 3, "backend": "triton"}
    actual = future_attention(query.to(DEVICE), key.to(DEVICE), **options)
    torch.testing.assert_close(actual.double().cpu(), expected, atol=2e-5, rtol=0)
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    lse = (query @ key.mT / 32**0.5).masked_fill(hidden, -float("inf")).logsumexp(-1)
    actual = future_attention_with_lse(query.to(DEVICE), key.to(DEVICE), lse.to(DEVICE), **options)
    torch.testing.assert_close(actual.double().cpu(), expected, atol=2e-5, rtol=0)
