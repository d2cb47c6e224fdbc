"""Which keys share a tile of the walk on Hopper, which queries each tile walks, and where its sums go.

A tile of keys walks from its first birth to its last expiry, so its keys should be born and expire together. Two kinds
of keys, two kinds of tiles:

- Short-lived keys, where they are many (the newest positions, a sliding window): tiles of neighbouring positions. One
  piece mostly takes such a tile whole, and then writes its gradients as they are.
- All others: the queries are cut into spans, and in each span its visible keys fill tiles, those first that the whole
  span sees. A key is in as many tiles as spans see it; its sums meet in float32 by atomics, in rows cleared before and
  narrowed after. The spans are the large blocks of `lists.py`, whose lists the pass for dQ needs anyway.

Random scores at N = 32K: w = 512 / 1024 / 2048 walk 1.27 / 1.14 / 1.09 times the steps that the intervals need, where
whole intervals sorted by birth and expiry walk 1.76 / 1.48 / 1.31 times as many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.triton.lists import SpanLists, list_of

_SHORT = 512
"""Queries that a short-lived key is seen by, at most: one less."""

_SLAB = 1024
"""Keys counted at a time."""

_PART = 1024
"""Entries of a list ordered at a time."""

FILL_WARPS = 16
"""Warps of a program that orders them: there are few of these programs, and each sorts by itself."""


class WalkTiles(NamedTuple):
    """Tiles of one pass; every row (batch · G + head) has as many slots for tiles.

    Attributes:
        order: (B·G · slots · keys,) int32 positions, -1 where a tile has no more.
        starts: (B·G · slots,) int32 first query of each walk, at the beginning of a step.
        ends: (B·G · slots,) int32 one after the last query.
        through: (B·G · slots,) int64 steps of all walks up to each one.
        whole: (B·G · slots,) int32, 1 for a tile whose keys are in no other tile and that one piece takes whole, 0 for
            others, -1 for one without queries.
        short: (B·G, slabs) int32 short-lived keys of each slab of positions.
        slots: tiles of a row.
    """

    order: Tensor
    starts: Tensor
    ends: Tensor
    through: Tensor
    whole: Tensor
    short: Tensor
    slots: int


def walk_tiles(expiry: Tensor, spans: SpanLists, num_queries: int, keys: int, step: int, overhead: int) -> WalkTiles:
    """Put keys into tiles. `whole` is left to `clear_sums`.

    Args:
        expiry: (B, G, N) int32, contiguous.
        spans: of the same expiry and queries.
        num_queries: Nq; the queries are the last Nq positions.
        keys: of a tile.
        step: queries of a step; a span is a multiple of it.
        overhead: steps that a walk counts for besides its own.
    """
    batch, groups, length = expiry.shape
    rows, slabs, number = batch * groups, triton.cdiv(length, _SLAB), spans.whole.shape[1]
    near, per_span = triton.cdiv(length, keys), triton.cdiv(max(spans.capacities), keys)
    slots = near + number * per_span

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expiry.device)

    short, order = empty(rows, slabs), empty(rows * slots * keys)
    starts, ends, whole = (empty(rows * slots) for _ in range(3))
    steps = torch.empty(rows * slots, dtype=torch.int64, device=expiry.device)
    slabs_pad = max(2, triton.next_power_of_2(slabs))
    _count_short[(slabs, rows)](expiry, short, length, slabs, SLAB=_SLAB, SHORT=_SHORT, num_warps=4)
    _fill_spans[(number, rows)](
        expiry,
        spans.index,
        spans.whole,
        spans.partial,
        spans.table,
        short,
        order,
        length,
        length - num_queries,
        sum(spans.capacities),
        number,
        slots,
        near,
        per_span,
        slabs,
        GROUPS=groups,
        KEYS=keys,
        SPAN=spans.span,
        PART=_PART,
        SHORT=_SHORT,
        SLABS_PAD=slabs_pad,
        num_warps=FILL_WARPS,
    )
    _bound_tiles[(slots, rows)](
        expiry,
        short,
        order,
        starts,
        ends,
        steps,
        length,
        length - num_queries,
        slots,
        near,
        per_span,
        slabs,
        step,
        overhead,
        KEYS=keys,
        SPAN=spans.span,
        SHORT=_SHORT,
        SLABS_PAD=slabs_pad,
        num_warps=1,
    )
    return WalkTiles(order, starts, ends, steps.cumsum(0), whole, short, slots)


def clear_sums(
    expiry: Tensor,
    tiles: WalkTiles,
    sums: tuple[Tensor, Tensor],
    keys: int,
    programs: int,
    target: int,
    overhead: int,
) -> None:
    """Fill in `tiles.whole`, and clear the float32 sums of the keys of all tiles that are not whole.

    Args:
        expiry, tiles, keys, overhead: as in `walk_tiles`.
        sums: (B, G, N, D) and (B, G, N, Dv) float32.
        programs, target: as `tile_scheduler` takes them.
    """
    batch, groups, length = expiry.shape
    slabs = tiles.short.shape[1]
    _clear[(triton.cdiv(length, keys), batch * groups)](
        expiry,
        tiles.short,
        tiles.starts,
        tiles.ends,
        tiles.through,
        tiles.whole,
        *sums,
        length,
        tiles.slots,
        triton.cdiv(length, keys),
        tiles.through.numel(),
        slabs,
        programs,
        KEYS=keys,
        DIM=sums[0].shape[-1],
        VALUE_DIM=sums[1].shape[-1],
        TARGET=target,
        OVERHEAD=overhead,
        SHORT=_SHORT,
        SLABS_PAD=max(2, triton.next_power_of_2(slabs)),
        num_warps=4,
    )


def narrow_sums(
    expiry: Tensor, tiles: WalkTiles, sums: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], keys: int
) -> None:
    """Write the gradients of the keys of all tiles that are not whole, and zeros for the keys that nobody sees.

    Args:
        expiry, tiles, sums, keys: as in `clear_sums`.
        gradients: of keys and values, in their dtypes.
    """
    batch, groups, length = expiry.shape
    slabs = tiles.short.shape[1]
    _narrow[(triton.cdiv(length, keys), batch * groups)](
        expiry,
        tiles.short,
        tiles.whole,
        *sums,
        *gradients,
        length,
        tiles.slots,
        slabs,
        KEYS=keys,
        DIM=sums[0].shape[-1],
        VALUE_DIM=sums[1].shape[-1],
        SHORT=_SHORT,
        SLABS_PAD=max(2, triton.next_power_of_2(slabs)),
        num_warps=4,
    )


@triton.jit
def _count_short(expiry, short, length, slabs, SLAB: tl.constexpr, SHORT: tl.constexpr):
    slab = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    key = slab * SLAB + tl.arange(0, SLAB)
    life = tl.load(expiry + row * length + key, mask=key < length, other=0) - key
    tl.store(short + row * slabs + slab, tl.sum(((life > 0) & (life < SHORT) & (key < length)).to(tl.int32), 0))


@triton.jit
def _few_short(short, row, length, slabs, SLABS_PAD: tl.constexpr):
    """Whether short-lived keys of a row are so few that they are listed with the others."""
    every = tl.arange(0, SLABS_PAD)
    return tl.sum(tl.load(short + row * slabs + every, mask=every < slabs, other=0), 0) * 4 < length


@triton.jit(do_not_specialize=["first_query", "entries", "spans", "slots", "near", "per_span", "slabs"])
def _fill_spans(
    expiry,
    index,
    whole_counts,
    partial_counts,
    table,
    short,
    order,
    length,
    first_query,
    entries,
    spans,
    slots,
    near,
    per_span,
    slabs,
    GROUPS: tl.constexpr,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,
    PART: tl.constexpr,
    SHORT: tl.constexpr,
    SLABS_PAD: tl.constexpr,
):
    """The keys of one span's tiles: those that all its queries see, and part by part those that expire in it, the last
    first, those born in it that outlive it, by birth, and those that do not."""
    span = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    few = _few_short(short, row, length, slabs, SLABS_PAD)
    start = first_query + span * SPAN
    stop = tl.minimum(start + SPAN, length)
    start_of_list, capacity = list_of(table, row // GROUPS, row % GROUPS, span, spans, entries, GROUPS)
    source = index + start_of_list
    out = order + (row * slots + near + span * per_span) * KEYS
    whole = tl.minimum(tl.load(whole_counts + row * spans + span), capacity)
    partial = tl.minimum(tl.load(partial_counts + row * spans + span), capacity)
    t = tl.arange(0, PART)
    placed = 0
    for begin in range(0, whole, PART):
        there = begin + t < whole
        key = tl.load(source + begin + t, mask=there, other=0)
        dies = tl.load(expiry + row * length + key, mask=there, other=0)
        # Short-lived keys can see the whole of the last span, which may be short itself.
        kept = (there & (few | (dies - key >= SHORT))).to(tl.int32)
        tl.store(out + placed + tl.cumsum(kept, 0) - 1, key, mask=kept != 0)
        placed += tl.sum(kept, 0)
    for begin in range(0, partial, PART):
        there = begin + t < partial
        key = tl.load(source + capacity - 1 - begin - t, mask=there, other=0)
        dies = tl.load(expiry + row * length + key, mask=there, other=0)
        kept = there & (few | (dies - key >= SHORT))
        number = tl.sum(kept.to(tl.int32), 0)
        if number > 0:  # of narrow windows hardly a part holds a key that lives long
            born = key - start
            rank = tl.where(born <= 0, stop - dies, tl.where(dies >= stop, SPAN + born, 2 * SPAN + born))
            value = tl.sort(tl.where(kept, rank, 4 * SPAN) * PART + t)
            key = tl.load(source + capacity - 1 - begin - (value & (PART - 1)), mask=t < number, other=0)
            tl.store(out + placed + t, key, mask=t < number)
        placed += number
    for begin in range(placed, per_span * KEYS, PART):
        tl.store(out + begin + t, tl.full([PART], -1, tl.int32), mask=begin + t < per_span * KEYS)


@triton.jit(do_not_specialize=["first_query", "slots", "near", "per_span", "slabs", "step", "overhead"])
def _bound_tiles(
    expiry,
    short,
    order,
    starts,
    ends,
    steps,
    length,
    first_query,
    slots,
    near,
    per_span,
    slabs,
    step,
    overhead,
    KEYS: tl.constexpr,
    SPAN: tl.constexpr,
    SHORT: tl.constexpr,
    SLABS_PAD: tl.constexpr,
):
    """From the step of the first birth to the last expiry among a tile's keys, inside its span."""
    slot = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, KEYS)
    place = order + (row * slots + slot) * KEYS + n
    low = first_query
    high = length
    if slot < near:
        key = slot * KEYS + n
        life = tl.load(expiry + row * length + key, mask=key < length, other=0) - key
        mine = (key < length) & (life > 0) & (life < SHORT)
        mine = mine & (_few_short(short, row, length, slabs, SLABS_PAD) == 0)
        key = tl.where(mine, key, -1)
        tl.store(place, key)
    else:
        key = tl.load(place)
        low = first_query + (slot - near) // per_span * SPAN
        high = tl.minimum(low + SPAN, length)
    dies = tl.load(expiry + row * length + key, mask=key >= 0, other=0)
    first = tl.maximum(key, low)
    last = tl.minimum(dies, high)
    alive = (key >= 0) & (last > first)
    start = tl.min(tl.where(alive, first, length), 0)
    start -= (start - first_query) % step
    end = tl.max(tl.where(alive, last, 0), 0)
    tl.store(starts + row * slots + slot, start)
    tl.store(ends + row * slots + slot, end)
    tl.store(steps + row * slots + slot, tl.where(end > start, (end - start + step - 1) // step + overhead, 0))


@triton.jit(do_not_specialize=["slots", "near", "count", "slabs", "programs"])
def _clear(
    expiry,
    short,
    starts,
    ends,
    through,
    whole,
    key_sum,
    value_sum,
    length,
    slots,
    near,
    count,
    slabs,
    programs,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TARGET: tl.constexpr,
    OVERHEAD: tl.constexpr,
    SHORT: tl.constexpr,
    SLABS_PAD: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    # As `tile_scheduler.chunk_steps`.
    total = tl.load(through + count - 1)
    rounds = (total + programs * TARGET // 2) // (programs * TARGET)
    chunks = programs * tl.maximum(rounds, 1)
    chunk = tl.maximum((total + chunks - 1) // chunks, 1)
    item = row * slots + tile
    before = tl.load(through + item - 1, mask=item > 0, other=0)
    after = tl.load(through + item)
    walked = tl.load(starts + item) < tl.load(ends + item)
    alone = (before + OVERHEAD) // chunk == (after - 1) // chunk
    tl.store(whole + item, tl.where(walked, alone.to(tl.int32), -1))
    # The slots of the spans, as many to each of these programs.
    for slot in range(near + tile, slots, near):
        walked = tl.load(starts + row * slots + slot) < tl.load(ends + row * slots + slot)
        tl.store(whole + row * slots + slot, tl.where(walked, 0, -1))
    key = tile * KEYS + tl.arange(0, KEYS)
    life = tl.load(expiry + row * length + key, mask=key < length, other=0) - key
    listed = (life >= SHORT) | _few_short(short, row, length, slabs, SLABS_PAD)
    summed = (key < length) & (life > 0) & (listed | (alone == 0))
    if tl.max(summed.to(tl.int32), 0) > 0:
        d = tl.arange(0, DIM)
        dv = tl.arange(0, VALUE_DIM)
        place = row * length + key
        tl.store(key_sum + place[:, None] * DIM + d[None, :], tl.zeros([KEYS, DIM], tl.float32), mask=summed[:, None])
        tl.store(
            value_sum + place[:, None] * VALUE_DIM + dv[None, :],
            tl.zeros([KEYS, VALUE_DIM], tl.float32),
            mask=summed[:, None],
        )


@triton.jit(do_not_specialize=["slots", "slabs"])
def _narrow(
    expiry,
    short,
    whole,
    key_sum,
    value_sum,
    d_key,
    d_value,
    length,
    slots,
    slabs,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SHORT: tl.constexpr,
    SLABS_PAD: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    kind = tl.load(whole + row * slots + tile)
    key = tile * KEYS + tl.arange(0, KEYS)
    life = tl.load(expiry + row * length + key, mask=key < length, other=0) - key
    listed = (life >= SHORT) | _few_short(short, row, length, slabs, SLABS_PAD)
    summed = (key < length) & (life > 0) & (listed | (kind == 0))
    # Of a tile that is whole the walk has written what lived.
    own = (key < length) & (summed | (life <= 0) | (kind == -1))
    if tl.max(own.to(tl.int32), 0) > 0:
        d = tl.arange(0, DIM)
        dv = tl.arange(0, VALUE_DIM)
        place = (row * length + key)[:, None] * DIM + d[None, :]
        sums = tl.load(key_sum + place, mask=summed[:, None], other=0.0)
        tl.store(d_key + place, sums.to(d_key.dtype.element_ty), mask=own[:, None])
        place = (row * length + key)[:, None] * VALUE_DIM + dv[None, :]
        sums = tl.load(value_sum + place, mask=summed[:, None], other=0.0)
        tl.store(d_value + place, sums.to(d_value.dtype.element_ty), mask=own[:, None])
