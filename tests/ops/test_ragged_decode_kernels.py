"""The Triton kernels of decoding from a ragged cache, against float64: on a GPU, or under TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

from dynamask.ops.ragged_decode import ragged_decode, ragged_decode_op, ragged_decode_reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)
# numpy, which the interpreter computes with, has no bfloat16.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check(
    offsets, heads, queries=1, batch=2, dim=32, value_dim=None, dtype=torch.float32, live=0.8, bias=False, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    slots = offsets[-1]
    query, keys, values = (
        draw(batch, heads, queries, dim),
        draw(batch, slots, dim),
        draw(batch, slots, value_dim or dim),
    )
    mask = None
    if live is not None:
        mask = (torch.rand(batch, slots, generator=generator) < live).to(DEVICE)
        keys[~mask], values[~mask] = float("nan"), float("nan")
    added = torch.randn(batch, slots, generator=generator).to(DEVICE) if bias else None
    actual = ragged_decode(query, keys, values, mask, offsets, bias=added, backend="triton")
    expected = ragged_decode_reference(
        query.double(), keys.double(), values.double(), mask, offsets, None if added is None else added.double(),
        dim**-0.5,
    )  # fmt: skip
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("live", [None, 0.8])
def test_head_windows(dtype: torch.dtype, bias: bool, live: float | None) -> None:
    check((0, 40, 41, 700), heads=6, dtype=dtype, bias=bias, live=live)


@pytest.mark.slow
def test_shapes() -> None:
    check((0, 300), heads=1, batch=1)
    check((0, 0, 300, 300), heads=9, queries=3)
    check((0, 64, 200), heads=2, dim=48, value_dim=20, bias=True)
    check((0, 64, 200), heads=2, dim=8, value_dim=4, dtype=torch.float16)
    check((0, 1, 2), heads=2, live=None)
    check((0, 10, 150), heads=10, queries=15)  # more rows than a program takes
    check((0, 200, 210), heads=2, live=0.0)


@pytest.mark.skipif(not GPU, reason="too long for the interpreter")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("batch", [1, 16])
def test_long_caches(dim: int, batch: int) -> None:
    """A window of one slot beside one of as many as the context."""
    check((0, 1, 137, 537, 33305), heads=16, batch=batch, dim=dim, dtype=torch.bfloat16)
    check((0, 136, 272, 672, 4096), heads=16, batch=batch, dim=dim, dtype=torch.bfloat16, live=None, bias=True)


@pytest.mark.parametrize("height", [-1e7, 1e7, torch.finfo(torch.float32).min])
def test_weights_sum_to_one_at_any_bias(height: float) -> None:
    query, keys = torch.randn(1, 2, 1, 32, device=DEVICE), torch.randn(1, 300, 32, device=DEVICE)
    values, bias = torch.ones(1, 300, 32, device=DEVICE), torch.full((1, 300), height, device=DEVICE)
    output = ragged_decode(query, keys, values, None, (0, 140, 300), bias, backend="triton")
    torch.testing.assert_close(output, torch.ones_like(output))
    bias[:, :140] = float("-inf")
    output = ragged_decode(query, keys, values, None, (0, 140, 300), bias, backend="triton")
    assert (output[:, 0] == 0).all()
    torch.testing.assert_close(output[:, 1], torch.ones_like(output[:, 1]))


def test_operator() -> None:
    query, keys = torch.randn(1, 4, 1, 32, device=DEVICE), torch.randn(1, 90, 32, device=DEVICE)
    live = torch.rand(1, 90, device=DEVICE) < 0.5
    arguments = (query, keys, keys, live, [0, 20, 90], None, 0.2)
    torch.library.opcheck(ragged_decode_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(not GPU, reason="needs a CUDA graph")
def test_in_a_cuda_graph() -> None:
    """Capture without a run before it; the splits are not kept from a graph's memory."""
    from dynamask.ops.triton import tables

    query, keys = torch.randn(1, 4, 1, 64, device=DEVICE), torch.randn(1, 777, 64, device=DEVICE)
    tables._kept.clear()
    ragged_decode(query, keys, keys, None, (0, 100, 776), backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ragged_decode(query, keys, keys, None, (0, 100, 777), backend="triton")
    query.normal_()
    graph.replay()
    expected = ragged_decode(query, keys, keys, None, (0, 100, 777), backend="torch")
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    assert len(tables._kept) == 1
