"""Expiry of one document per row on a GPU: a sort and three launches, where the wavelet of `expiry.py` needs thirty.

Order the keys best first. Key number k of that order is outranked by exactly the k keys before it, so with `count`
places it expires where the `count`-th smallest position among them lies: T(k), which can only fall as k grows. Cut the
order after the first `count` keys (which never expire) into buckets. T at the buckets' bounds comes from a small table
of counts, and between two bounds T stays among the positions between its two values. Those intervals of positions do
not overlap, so all buckets together look at every position once, and each solves its own small problem by counting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 1024
"""Positions in a row of the table of counts, and looked at in one step."""

_BUCKET = 128
"""Keys of the order that one program resolves; twice as many for the longest rows, whose table halves with it."""

LONGEST = 1 << 21
"""Above this many keys the table, which grows with the square of the length, is no longer small."""


def unpacked_expiry(order: Tensor, count: int, local: int) -> Tensor:
    """`key_expiry` of unpacked, unpadded rows.

    Args:
        order: (B, G, N) int64, positions from the worst key to the best (a stable ascending argsort of the scores).
        count: places in the contest, 1 <= count < N <= `LONGEST`.
        local: added to every expiry, which then ends at N.

    Returns:
        (B, G, N) int32.
    """
    batch, groups, length = order.shape
    rows = batch * groups
    order = order.contiguous()
    bucket = _BUCKET if length <= 256 * _CHUNK else 2 * _BUCKET
    chunks, buckets = triton.cdiv(length, _CHUNK), triton.cdiv(length - count, bucket)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=order.device)

    place, expiry, table = empty(rows, length), empty(batch, groups, length), empty(rows, chunks, buckets)
    # A bucket's candidates: what T can fall through, at most as many old keys as new ones, and where it started.
    candidates = empty(rows, buckets, 2, 4 * bucket)
    _invert[(chunks, rows)](order, place, expiry, length, count, CHUNK=_CHUNK, num_warps=4)
    _count[(chunks, rows)](
        place,
        table,
        length,
        count,
        chunks,
        buckets,
        CHUNK=_CHUNK,
        BUCKET=bucket,
        BINS=triton.next_power_of_2(max(buckets, 2)),
        num_warps=4,
    )
    _resolve[(buckets, rows)](
        order,
        place,
        table,
        candidates,
        expiry,
        length,
        count,
        local,
        chunks,
        buckets,
        CHUNK=_CHUNK,
        CHUNKS_PAD=triton.next_power_of_2(chunks),
        BUCKET=bucket,
        ROOM=4 * bucket,
        GROUP=min(32, bucket),
        BATCH=16,
        num_warps=4,
    )
    return expiry


@triton.jit
def _invert(order, place, expiry, length, count, CHUNK: tl.constexpr):
    """place[j] = how many keys rank above key j; the first `count` never expire."""
    row = tl.program_id(1).to(tl.int64) * length
    rank = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    there = rank < length
    j = tl.load(order + row + rank, mask=there, other=0)
    above = length - 1 - rank
    tl.store(place + row + j, above, mask=there)
    tl.store(expiry + row + j, tl.zeros([CHUNK], tl.int32) + length, mask=there & (above < count))


@triton.jit
def _count(place, table, length, count, chunks, buckets, CHUNK: tl.constexpr, BUCKET: tl.constexpr, BINS: tl.constexpr):
    """table[chunk, c] = keys of the chunk among the first count + c · BUCKET of the order."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    j = chunk * CHUNK + tl.arange(0, CHUNK)
    there = j < length
    above = tl.load(place + row * length + j, mask=there, other=0)
    bucket = tl.where(above < count, 0, 1 + (above - count) // BUCKET)
    # The last bucket is in no bound that anyone asks for.
    per_bucket = tl.histogram(bucket, BINS, mask=there & (bucket < buckets))
    bins = tl.arange(0, BINS)
    tl.store(table + (row * chunks + chunk) * buckets + bins, tl.cumsum(per_bucket, 0), mask=bins < buckets)


@triton.jit
def _bound(
    place, table, c, length, count, chunks, buckets, CHUNK: tl.constexpr, CHUNKS_PAD: tl.constexpr, BUCKET: tl.constexpr
):
    """The `count`-th smallest position among the first count + c · BUCKET keys of the order."""
    p = tl.arange(0, CHUNKS_PAD)
    per_chunk = tl.load(table + p * buckets + c, mask=p < chunks, other=0)
    through = tl.cumsum(per_chunk, 0)
    before = tl.sum((through < count).to(tl.int32), 0)
    skipped = tl.max(tl.where(p < before, through, 0), 0)
    j = before * CHUNK + tl.arange(0, CHUNK)
    among = tl.load(place + j, mask=j < length, other=2147483647) < count + c * BUCKET
    short = skipped + tl.cumsum(among.to(tl.int32), 0) < count
    return before * CHUNK + tl.sum(short.to(tl.int32), 0)


@triton.jit
def _resolve(
    order,
    place,
    table,
    candidates,
    expiry,
    length,
    count,
    local,
    chunks,
    buckets,
    CHUNK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    BUCKET: tl.constexpr,
    ROOM: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
):
    """T for every key of one bucket, hence its expiry."""
    c = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    order += row * length
    place += row * length
    expiry += row * length
    table += row * chunks * buckets
    first = count + c * BUCKET
    highest = _bound(place, table, c, length, count, chunks, buckets, CHUNK, CHUNKS_PAD, BUCKET)
    lowest = 0
    if c + 1 < buckets:
        lowest = _bound(place, table, c + 1, length, count, chunks, buckets, CHUNK, CHUNKS_PAD, BUCKET)
    where_base = candidates + (row * buckets + c) * 2 * ROOM
    when_base = where_base + ROOM
    # From the highest position down: only the BUCKET nearest old keys can ever be T, so the room never runs out
    # before they are all there.
    found = 0
    steps = (highest - lowest) // CHUNK + 1
    step = 0
    while (step < steps) & (found < 2 * BUCKET + 1):
        j = highest - step * CHUNK - tl.arange(0, CHUNK)
        inside = j >= lowest
        when = tl.load(place + j, mask=inside, other=2147483647) - first
        kept = inside & (when < BUCKET)
        slot = found + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(where_base + slot, j, mask=kept & (slot < ROOM))
        tl.store(when_base + slot, when, mask=kept & (slot < ROOM))
        found += tl.sum(kept.to(tl.int32), 0)
        step += 1
    tl.debug_barrier()
    e = tl.arange(0, ROOM)
    tl.store(when_base + e, tl.full([ROOM], 2147483647, tl.int32), mask=e >= found)
    tl.debug_barrier()
    # Candidates in groups, so that a place among them is found in two short counts instead of a long one.
    groups = tl.arange(0, ROOM // GROUP)
    members = tl.arange(0, GROUP)
    when = tl.load(when_base + groups[:, None] * GROUP + members[None, :])
    new = tl.arange(0, BUCKET)
    own = tl.load(order + length - 1 - first - new, mask=first + new < length, other=length).to(tl.int32)
    pushes = (own <= highest).to(tl.int32)
    for begin in range(0, BUCKET, BATCH):
        k = begin + tl.arange(0, BATCH)
        # Every new key at or below where T started pushes T one place down.
        pushed = tl.sum(tl.where(new[None, :] < k[:, None], pushes[None, :], 0), 1)
        per_group = tl.sum((when[None, :, :] < k[:, None, None]).to(tl.int32), 2)
        through = tl.cumsum(per_group, 1)
        before = tl.sum((through <= pushed[:, None]).to(tl.int32), 1)
        skipped = tl.max(tl.where(groups[None, :] < before[:, None], through, 0), 1)
        slot = before[:, None] * GROUP + members[None, :]
        present = (tl.load(when_base + slot, mask=slot < ROOM, other=2147483647) < k[:, None]).to(tl.int32)
        here = (present == 1) & (skipped[:, None] + tl.cumsum(present, 1) == pushed[:, None] + 1)
        fallen = tl.sum(tl.where(here, tl.load(where_base + slot, mask=here, other=0), 0), 1)
        j = tl.load(order + length - 1 - first - k, mask=first + k < length, other=0).to(tl.int32)
        tl.store(expiry + j, tl.minimum(tl.maximum(j, fallen) + local, length), mask=first + k < length)
