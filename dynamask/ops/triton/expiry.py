"""Expiry on a GPU: the wavelet-matrix descent of `dynamask.expiry` in three small kernels.

Plain torch spends some fifteen launches a level on it, more than the attention takes. Here a level of the matrix
costs two launches, and the descent and the final search are one kernel over all positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 1024


def contested_expiry(rank: Tensor, start: Tensor, end: Tensor, count: int) -> Tensor:
    """Where `count` keys of the segment's prefix first outrank each key.

    Args:
        rank: (B, G, N) permutation of 0..N-1 per row, any integer dtype.
        start, end: (B, N) bounds of each position's segment.
        count: places in the contest, 1 <= count.

    Returns:
        (B, G, N) int32, at most the end of the segment; the key's own position if it is dead on arrival.
    """
    batch, groups, length = rank.shape
    rows = batch * groups
    levels = max(length - 1, 1).bit_length()
    chunks = triton.cdiv(length, _CHUNK)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=rank.device)

    sequence = rank.to(torch.int32).contiguous().view(rows, length)
    original = sequence
    ones, spare, chunk_ones = empty(levels, rows, length), empty(2, rows, length), empty(levels, rows, chunks)
    grid = (chunks, rows)
    for level in range(levels):
        bit = levels - 1 - level
        _count_ones[grid](sequence, chunk_ones[level], bit, length, chunks, CHUNK=_CHUNK, num_warps=4)
        target = spare[level % 2]
        _partition[grid](
            sequence,
            target,
            ones[level],
            chunk_ones[level],
            bit,
            length,
            chunks,
            CHUNK=_CHUNK,
            CHUNKS_PAD=triton.next_power_of_2(chunks),
            num_warps=4,
        )
        sequence = target
    zeros = (length - chunk_ones.sum(-1)).to(torch.int32)
    threshold = empty(rows, length)
    start, end = start.to(torch.int32).contiguous(), end.to(torch.int32).contiguous()
    block = 256
    grid = (triton.cdiv(length, block), rows)
    _descend[grid](ones, zeros, start, threshold, count, length, rows, groups, levels, BLOCK=block, num_warps=4)
    expiry = empty(rows, length)
    _search[grid](
        original, threshold, start, end, expiry, length, groups, length.bit_length(), BLOCK=block, num_warps=4
    )
    return expiry.view(batch, groups, length)


@triton.jit
def _count_ones(sequence, chunk_ones, bit, length, chunks, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(sequence + row.to(tl.int64) * length + place, mask=place < length, other=0)
    tl.store(chunk_ones + row * chunks + chunk, tl.sum((value >> bit) & 1, 0))


@triton.jit
def _partition(sequence, target, ones, chunk_ones, bit, length, chunks, CHUNK: tl.constexpr, CHUNKS_PAD: tl.constexpr):
    """One level: `ones[i]` = ones among the first i + 1, and the sequence stably split, zeros first."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    base = row.to(tl.int64) * length
    c = tl.arange(0, CHUNKS_PAD)
    per_chunk = tl.load(chunk_ones + row * chunks + c, mask=c < chunks, other=0)
    zeros = length - tl.sum(per_chunk, 0)
    before = tl.sum(tl.where(c < chunk, per_chunk, 0), 0)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    there = place < length
    value = tl.load(sequence + base + place, mask=there, other=0)
    is_one = (value >> bit) & 1
    through = before + tl.cumsum(is_one, 0)
    tl.store(ones + base + place, through, mask=there)
    to = tl.where(is_one == 1, zeros + through - 1, place - through)
    tl.store(target + base + to, value, mask=there)


@triton.jit
def _descend(ones, zeros, start, threshold, count, length, rows, groups, levels, BLOCK: tl.constexpr):
    """The `count`-th best rank among positions start[i]..i, for every i; -1 where there are fewer."""
    row = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < length
    low = tl.load(start + (row // groups).to(tl.int64) * length + i, mask=there, other=0)
    high = i + 1
    enough = high - low >= count
    wanted = tl.zeros([BLOCK], tl.int32) + count
    found = tl.zeros([BLOCK], tl.int32)
    for level in range(0, levels):
        base = ones + (level * rows + row).to(tl.int64) * length
        split = tl.load(zeros + level * rows + row)
        low_ones = tl.load(base + low - 1, mask=there & (low > 0), other=0)
        high_ones = tl.load(base + high - 1, mask=there & (high > 0), other=0)
        inside = high_ones - low_ones
        take = inside >= wanted
        found = found * 2 + take.to(tl.int32)
        wanted = tl.where(take, wanted, wanted - inside)
        low = tl.where(take, split + low_ones, low - low_ones)
        high = tl.where(take, split + high_ones, high - high_ones)
    tl.store(threshold + row.to(tl.int64) * length + i, tl.where(enough, found, -1), mask=there)


@triton.jit
def _search(rank, threshold, start, end, expiry, length, groups, steps, BLOCK: tl.constexpr):
    """First position of the segment whose threshold is above the key's rank, by bisection; never before the key."""
    row = tl.program_id(1)
    base = row.to(tl.int64) * length
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = j < length
    own = tl.load(rank + base + j, mask=there, other=0)
    last = tl.load(end + (row // groups).to(tl.int64) * length + j, mask=there, other=0)
    low = j
    high = last
    for _ in range(0, steps):
        middle = (low + high) // 2
        value = tl.load(threshold + base + middle, mask=there & (middle < last), other=0)
        above = (value > own) | (low >= high)
        high = tl.where(above & (low < high), middle, high)
        low = tl.where(above, low, middle + 1)
    tl.store(expiry + base + j, low, mask=there)
