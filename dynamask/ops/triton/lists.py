"""Which keys a block of queries can see, as one list of positions per (batch, key/value head, block).

A row of the list holds, from its front, the keys that every query of the block sees, in order of position, and,
from its back, those that only some of them see (born or expiring inside the block). The attention kernels test
the interval for the second kind alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128
"""Rows of a query tile: the query heads of one key/value head times the queries of a block."""

_CHUNK = 1024
"""Keys of a list looked at in one step."""

_COARSE = 512
"""Queries of a large block. All keys are scanned once per large block, whose list the blocks inside pick from:
scanning them once per block took a fifth of the forward's time at N = 32K, and more at longer ones."""

_FAN = 16
"""Large blocks that share one scan of all keys when there are many of them."""


class KeyLists(NamedTuple):
    """Lists of visible keys.

    Attributes:
        index: (B·G, blocks, capacity) int32 positions: whole-block keys from the front, the others from the back.
        whole: (B·G, blocks) int32, how many stand at the front.
        partial: (B·G, blocks) int32, how many at the back.
        block: queries per block.
    """

    index: Tensor  # type: ignore[assignment]  # not the tuple method
    whole: Tensor
    partial: Tensor
    block: int


def block_of(ratio: int, rows: int = ROWS) -> int:
    """Queries per block for H / G query heads on one key/value head, so that a tile has `rows` rows."""
    return max(16, rows // triton.next_power_of_2(ratio))


def rows_of(dim: int, element_size: int) -> int:
    """Rows of a tile whose queries, keys, values and gradients fit Hopper's 227 KiB of shared memory.

    Args:
        dim: the wider of the key's and the value's head width.
        element_size: bytes per number.
    """
    return ROWS if dim <= 128 else ROWS * 2 // (2 * element_size)


def build_lists(expiry: Tensor, num_queries: int, block: int, max_live: int) -> KeyLists:
    """Build the lists.

    Args:
        expiry: (B, G, N) int32, contiguous.
        num_queries: Nq; the queries are the last Nq positions.
        block: queries per block, at most `_COARSE`.
        max_live: no query sees more keys than this; 0 if unknown, which costs a synchronisation.
    """
    batch, groups, length = expiry.shape
    rows = batch * groups
    large = _COARSE // block * block  # no block lies in two large ones
    blocks, coarse_blocks = triton.cdiv(num_queries, block), triton.cdiv(num_queries, large)
    flat = expiry.view(rows, length)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expiry.device)

    first = length - num_queries
    # A chunk of keys none of which outlives a block's first query needs no second look.
    # A scan is a chain of loads, one per chunk: long rows take long chunks.
    chunk, warps = (_CHUNK, 4) if length <= 16 * _CHUNK else (4 * _CHUNK, 8)
    chunks = triton.cdiv(length, chunk)
    chunk_last = empty(rows, chunks)
    _chunk_maximum[(chunks, rows)](flat, chunk_last, length, chunks, CHUNK=chunk, num_warps=warps)
    counts = empty(rows, coarse_blocks)
    grid = (coarse_blocks, rows)
    scan = (flat, chunk_last, length, first, coarse_blocks, chunks)
    # Scanning all keys once per large block grows with the square of the length; long rows scan them once per
    # _FAN large blocks and let each pick from that list.
    fan = _FAN if max_live and coarse_blocks >= 8 * _FAN else 1
    if max_live:
        capacity = min(max_live + large, length)
        fine_capacity = min(max_live + block, length)
    else:
        _coarse[grid](*scan, flat, counts, 0, BLOCK=large, CHUNK=chunk, WRITE=False, num_warps=warps)
        fine_capacity = capacity = max(1, int(counts.max()))
    coarse = empty(rows, coarse_blocks, capacity)
    if fan == 1:
        _coarse[grid](*scan, coarse, counts, capacity, BLOCK=large, CHUNK=chunk, WRITE=True, num_warps=warps)
    else:
        huge, huge_blocks = large * fan, triton.cdiv(num_queries, large * fan)
        huge_capacity = min(max_live + huge, length)
        huge_lists, huge_counts = empty(rows, huge_blocks, huge_capacity), empty(rows, huge_blocks)
        _coarse[(huge_blocks, rows)](
            flat,
            chunk_last,
            length,
            first,
            huge_blocks,
            chunks,
            huge_lists,
            huge_counts,
            huge_capacity,
            BLOCK=huge,
            CHUNK=chunk,
            WRITE=True,
            num_warps=warps,
        )
        _pick[grid](
            flat,
            huge_lists,
            huge_counts,
            length,
            first,
            huge_blocks,
            huge_capacity,
            coarse_blocks,
            coarse,
            counts,
            capacity,
            BLOCK=large,
            FAN=fan,
            CHUNK=_CHUNK,
            num_warps=4,
        )
    index, whole, partial = empty(rows, blocks, fine_capacity), empty(rows, blocks), empty(rows, blocks)
    _fine[(blocks, rows)](
        flat,
        coarse,
        counts,
        length,
        first,
        coarse_blocks,
        capacity,
        blocks,
        index,
        whole,
        partial,
        fine_capacity,
        BLOCK=block,
        COARSE=large,
        CHUNK=_CHUNK,
        num_warps=4,
    )
    return KeyLists(index, whole, partial, block)


@triton.jit
def _chunk_maximum(expiry, chunk_last, length, chunks, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    key = chunk * CHUNK + tl.arange(0, CHUNK)
    dies = tl.load(expiry + row.to(tl.int64) * length + key, mask=key < length, other=0)
    tl.store(chunk_last + row * chunks + chunk, tl.max(dies, 0))


@triton.jit
def _coarse(
    expiry,
    chunk_last,
    length,
    first_query,
    blocks,
    chunks,
    index,
    counts,
    capacity,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WRITE: tl.constexpr,
):
    """All keys that any query of a large block sees, in order of position."""
    block = tl.program_id(0)
    row = tl.program_id(1)
    start = first_query + block * BLOCK
    stop = tl.minimum(start + BLOCK, length)
    expiry += row.to(tl.int64) * length
    chunk_last += row.to(tl.int64) * chunks
    out = index + (row.to(tl.int64) * blocks + block) * capacity
    count = 0
    for chunk in range(0, tl.cdiv(stop, CHUNK)):
        if tl.load(chunk_last + chunk) > start:
            key = chunk * CHUNK + tl.arange(0, CHUNK)
            dies = tl.load(expiry + key, mask=key < stop, other=0)
            seen = (key < stop) & (dies > tl.maximum(start, key))
            if WRITE:
                place = count + tl.cumsum(seen.to(tl.int32), 0) - 1
                tl.store(out + place, key, mask=seen & (place < capacity))
            count += tl.sum(seen.to(tl.int32), 0)
    tl.store(counts + row * blocks + block, count)


@triton.jit
def _pick(
    expiry,
    source,
    source_counts,
    length,
    first_query,
    source_blocks,
    source_capacity,
    blocks,
    index,
    counts,
    capacity,
    BLOCK: tl.constexpr,
    FAN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The list of a large block, picked from that of `FAN` of them."""
    block = tl.program_id(0)
    row = tl.program_id(1)
    start = first_query + block * BLOCK
    stop = tl.minimum(start + BLOCK, length)
    expiry += row.to(tl.int64) * length
    parent = row.to(tl.int64) * source_blocks + block // FAN
    listed = tl.load(source_counts + parent)
    out = index + (row.to(tl.int64) * blocks + block) * capacity
    count = 0
    for begin in range(0, listed, CHUNK):
        entry = begin + tl.arange(0, CHUNK)
        there = entry < listed
        key = tl.load(source + parent * source_capacity + entry, mask=there, other=0)
        dies = tl.load(expiry + key, mask=there, other=0)
        seen = there & (key < stop) & (dies > tl.maximum(start, key))
        place = count + tl.cumsum(seen.to(tl.int32), 0) - 1
        tl.store(out + place, key, mask=seen & (place < capacity))
        count += tl.sum(seen.to(tl.int32), 0)
    tl.store(counts + row * blocks + block, count)


@triton.jit
def _fine(
    expiry,
    coarse,
    counts,
    length,
    first_query,
    coarse_blocks,
    coarse_capacity,
    blocks,
    index,
    whole,
    partial,
    capacity,
    BLOCK: tl.constexpr,
    COARSE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The list of one block, picked from the large block's: whole-block keys from the front, others from the back."""
    block = tl.program_id(0)
    row = tl.program_id(1)
    start = first_query + block * BLOCK
    stop = tl.minimum(start + BLOCK, length)
    expiry += row.to(tl.int64) * length
    source = row.to(tl.int64) * coarse_blocks + block // (COARSE // BLOCK)
    listed = tl.load(counts + source)
    out = index + (row.to(tl.int64) * blocks + block) * capacity
    num_whole = 0
    num_partial = 0
    for begin in range(0, listed, CHUNK):
        entry = begin + tl.arange(0, CHUNK)
        there = entry < listed
        key = tl.load(coarse + source * coarse_capacity + entry, mask=there, other=0)
        dies = tl.load(expiry + key, mask=there, other=0)
        seen = there & (key < stop) & (dies > tl.maximum(start, key))
        all_see = seen & (key <= start) & (dies >= stop)
        some_see = seen & (all_see == 0)
        place = num_whole + tl.cumsum(all_see.to(tl.int32), 0) - 1
        tl.store(out + place, key, mask=all_see & (place < capacity))
        place = capacity - num_partial - tl.cumsum(some_see.to(tl.int32), 0)
        tl.store(out + place, key, mask=some_see & (place >= 0))
        num_whole += tl.sum(all_see.to(tl.int32), 0)
        num_partial += tl.sum(some_see.to(tl.int32), 0)
    tl.store(whole + row * blocks + block, num_whole)
    tl.store(partial + row * blocks + block, num_partial)
