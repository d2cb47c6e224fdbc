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
"""Keys looked at in one step of the scan."""


class KeyLists(NamedTuple):
    """Lists of visible keys.

    Attributes:
        index: (B·G, blocks, capacity) int32 positions: whole-block keys from the front, the others from the back.
        whole: (B·G, blocks) int32, how many stand at the front.
        partial: (B·G, blocks) int32, how many at the back.
        block: queries per block.
    """

    index: Tensor
    whole: Tensor
    partial: Tensor
    block: int


def block_of(ratio: int) -> int:
    """Queries per block for H / G query heads on one key/value head, so that a tile has `ROWS` rows."""
    return max(16, ROWS // triton.next_power_of_2(ratio))


def build_lists(expiry: Tensor, num_queries: int, ratio: int, max_live: int) -> KeyLists:
    """Build the lists.

    Args:
        expiry: (B, G, N) int32, contiguous.
        num_queries: Nq; the queries are the last Nq positions.
        ratio: H / G.
        max_live: no query sees more keys than this; 0 if unknown, which costs a synchronisation.
    """
    batch, groups, length = expiry.shape
    block = block_of(ratio)
    blocks = triton.cdiv(num_queries, block)
    flat = expiry.view(batch * groups, length)
    # A chunk of keys none of which outlives a block's first query needs no second look.
    pad = -length % _CHUNK
    chunk_last = torch.nn.functional.pad(flat, (0, pad)).view(batch * groups, -1, _CHUNK).amax(-1)
    counts = torch.empty(2, batch * groups, blocks, dtype=torch.int32, device=expiry.device)
    arguments = (flat, chunk_last, length, length - num_queries, blocks, chunk_last.shape[1])
    grid = (blocks, batch * groups)
    if max_live:
        capacity = min(max_live + block, length)
    else:
        _scan[grid](*arguments, flat, counts[0], counts[1], 0, BLOCK=block, CHUNK=_CHUNK, WRITE=False, num_warps=4)
        capacity = max(1, int((counts[0] + counts[1]).max()))
    index = torch.empty(batch * groups, blocks, capacity, dtype=torch.int32, device=expiry.device)
    _scan[grid](*arguments, index, counts[0], counts[1], capacity, BLOCK=block, CHUNK=_CHUNK, WRITE=True, num_warps=4)
    return KeyLists(index, counts[0], counts[1], block)


@triton.jit
def _scan(
    expiry,
    chunk_last,
    length,
    first_query,
    blocks,
    chunks,
    index,
    whole,
    partial,
    capacity,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WRITE: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1)
    start = first_query + block * BLOCK
    stop = tl.minimum(start + BLOCK, length)
    expiry += row.to(tl.int64) * length
    chunk_last += row.to(tl.int64) * chunks
    out = index + (row.to(tl.int64) * blocks + block) * capacity
    num_whole = 0
    num_partial = 0
    for chunk in range(0, tl.cdiv(stop, CHUNK)):
        if tl.load(chunk_last + chunk) > start:
            key = chunk * CHUNK + tl.arange(0, CHUNK)
            dies = tl.load(expiry + key, mask=key < stop, other=0)
            seen = (key < stop) & (dies > tl.maximum(start, key))
            all_see = seen & (key <= start) & (dies >= stop)
            some_see = seen & (all_see == 0)
            if WRITE:
                place = num_whole + tl.cumsum(all_see.to(tl.int32), 0) - 1
                tl.store(out + place, key, mask=all_see & (place < capacity))
                place = capacity - num_partial - tl.cumsum(some_see.to(tl.int32), 0)
                tl.store(out + place, key, mask=some_see & (place >= 0))
            num_whole += tl.sum(all_see.to(tl.int32), 0)
            num_partial += tl.sum(some_see.to(tl.int32), 0)
    tl.store(whole + row * blocks + block, num_whole)
    tl.store(partial + row * blocks + block, num_partial)
