"""What each process of a group checks: its shard against the whole sequence in one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dynamask.errors import InvalidInputError
from dynamask.ops import dynamic_mask_attention, interval_attention, key_expiry
from dynamask.ops.context_parallel import context_parallel_attention, context_shards

TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("context",))


def inputs(seed: int, length: int, batch: int = 2, heads: int = 4, groups: int = 2, dim: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key = rows(batch, heads, length, dim), rows(batch, groups, length, dim)
    value, ranks = rows(batch, groups, length, dim + 1), rows(batch, groups, length)
    ranks = (ranks * 4).round() / 4  # many ties
    ranks[0, 0, :: max(1, length // 5)] = float("nan")
    ranks[-1, -1, 1 :: max(1, length // 3)] = float("inf")
    return [query, key, value, ranks]


def segments_of(seed: int, length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    opens = torch.rand(batch, length, generator=generator) < 3 / length
    opens[0, length // (dist.get_world_size() + 1)] = True  # a document that begins with a shard
    return opens.long().cumsum(-1)


def whole(tensors: list[Tensor], windows: Any, local: int, sinks: int, segments: Tensor | None, paper: bool) -> Tensor:
    query, key, value, ranks = tensors
    if paper:
        return dynamic_mask_attention(
            query, key, value, ranks, windows, local=local, sinks=sinks, segment_ids=segments, backend="reference"
        )
    expiry = key_expiry(ranks, windows, local=local, sinks=sinks, segment_ids=segments)
    return interval_attention(query, key, value, expiry, backend="reference")


def bounds_of(length: int, seed: int) -> list[int]:
    """Shards of uneven lengths, the first cuts near the beginning so that some are shorter than the window."""
    size = dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(length - 1, generator=generator)[: size - 1] + 1
    return [0, *sorted(cuts.tolist()), length]


def agrees(
    seed: int, length: int, windows: Any, local: int, sinks: int, packed: bool, paper: bool, even: bool, dtype: Any
) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = inputs(seed, length)
    if dtype == torch.float32:  # ranks are compared in 32 bits then
        tensors = [each.to(dtype) for each in tensors]
    segments = segments_of(seed, length) if packed else None
    for each in tensors[: 4 if paper else 3]:
        each.requires_grad_()
    expected = whole(tensors, windows, local, sinks, segments, paper)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    expected.backward(grad)
    bounds = [length * i // size for i in range(size + 1)] if even else bounds_of(length, seed)
    own = slice(bounds[rank], bounds[rank + 1])
    shard = [each.detach()[:, :, own].clone().requires_grad_(each.requires_grad) for each in tensors]
    output = context_parallel_attention(
        *shard,
        windows,
        mesh=mesh(),
        local=local,
        sinks=sinks,
        segment_ids=None if segments is None else segments[:, own],
        bias_is_rank=paper,
    )
    tolerance = TIGHT if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(output, expected.detach()[:, :, own], **tolerance)
    output.backward(grad[:, :, own])
    for name, part, full in zip(("query", "key", "value", "ranks"), shard, tensors, strict=True):
        if full.grad is not None:
            assert part.grad is not None
            torch.testing.assert_close(part.grad, full.grad[:, :, own], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def attention(how_many: str = "12") -> None:
    """Many small sequences, each against one process."""
    kinds = itertools.product((False, True), (False, True), (True, False))
    shapes = [(7, 0, 0), ((3, 9), 1, 2), ((16, 5), 2, 0), (6, 3, 3), ((4, 40), 0, 1), (200, 5, 2)]
    cases = [(shape, kind) for kind in kinds for shape in shapes]
    step = max(1, len(cases) // int(how_many))
    for seed, ((windows, local, sinks), (packed, paper, even)) in enumerate(cases[::step]):
        dtype = torch.float32 if seed % 4 == 3 else torch.float64
        agrees(seed, 41 if seed % 2 else 97, windows, local, sinks, packed, paper, even, dtype)


def traffic() -> None:
    """The bytes sent depend on the windows, not on the length."""
    size, rank, group = dist.get_world_size(), dist.get_rank(), mesh()
    sent = []
    for length in (64 * size, 256 * size):
        query, key, value, ranks = inputs(0, length)
        own = slice(length // size * rank, length // size * (rank + 1))
        shard = [each[:, :, own].clone().requires_grad_() for each in (query, key, value)]
        shards = context_shards(group, 2, length // size, torch.device("cpu"))
        context_parallel_attention(*shard, ranks[:, :, own], (8, 24), shards=shards, local=4, sinks=2).sum().backward()
        sent.append((shards.traffic.forward, shards.traffic.backward))
    assert sent[0] == sent[1], sent
    key_bytes = 2 * (8 + 24) * 8 * (4 + 5)  # rows, keys, float64, widths of key and value
    others = 2 * (8 + 24) * (8 + 4)  # ranks and positions
    steps = (1 if rank + 1 < size else 0) + sum(1 for d in (1, 2, 4) if d < size - 1 and rank >= 1 and rank + d < size)
    assert sent[0][0] == steps * (key_bytes + others), (sent, steps)
    back = (1 if rank else 0) + sum(1 for d in (1, 2, 4) if d < size - 1 and rank - d >= 1)
    assert sent[0][1] == back * key_bytes, (sent, back)


def refusals() -> None:
    """Mistakes are named, in every process."""
    size, rank, group = dist.get_world_size(), dist.get_rank(), mesh()
    query, key, value, ranks = inputs(0, 16)
    with pytest.raises(InvalidInputError, match="exactly one of mesh and shards"):
        context_parallel_attention(query, key, value, ranks, 4)
    with pytest.raises(InvalidInputError, match="same shard"):
        context_parallel_attention(query[:, :, 1:], key, value, ranks, 4, mesh=group)
    with pytest.raises(InvalidInputError, match="DeviceMesh or a ProcessGroup"):
        context_parallel_attention(query, key, value, ranks, 4, mesh=size)
    two = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "context"))
    with pytest.raises(InvalidInputError, match="one-dimensional mesh"):
        context_parallel_attention(query, key, value, ranks, 4, mesh=two)
    shards = context_shards(group, 2, 8, query.device)
    with pytest.raises(InvalidInputError, match="were made for 8 tokens"):
        context_parallel_attention(query, key, value, ranks, 4, shards=shards)
    if size == 1:
        return
    with pytest.raises(InvalidInputError, match=r"process 0: batch 1, length 4.* process 1: batch 2, length 4"):
        context_shards(group, 1 if rank == 0 else 2, 4, query.device)
    with pytest.raises(InvalidInputError, match="must not decrease along the whole sequence"):
        context_shards(group, 1, 4, query.device, segment_ids=torch.full((1, 4), 2 if rank == 0 else 1))


def everything(how_many: str = "12") -> None:
    attention(how_many)
    traffic()
    refusals()
