"""Expiry on a GPU: `dynamask.ops.expiry` in a few launches, more of them for longer rows.

Rank the keys of a row by (segment, score, position). Keys of later segments then outrank a key, but stand after its
segment, where its expiry is cut off: one order of the row serves all of its segments, and nothing below knows of them
but that cut.

A key x expires at the first position whose prefix holds `count` keys that outrank it. Cut the row into chunks of
positions. T(p), the `count`-th best rank among the first p positions, only rises, so x belongs to the one chunk [s, e)
with T(s) <= x < T(e): if it stands behind that chunk it is dead on arrival, as most keys of a long row are; if it is
among the `count` best of the row it never expires. The others are at most as many as the chunk's keys. Of these, the
keys that stand before s fall in order of rank, one for each better key that arrives, so x expires where the r-th better
key of the chunk stands, r being how many older keys rank at or below x and at or above T(s). That is counted by one
thread per x, in one pass over the chunk.

On long rows most keys are dead on arrival and need no ranks. A value that `count` keys of a prefix reach is at most the
threshold behind that prefix, and the threshold only rises: every later key below the value is dropped at once, which
changes no other key's expiry. Such values ("floors") are found for a few prefixes by bisection, and the keys that are
left stand packed, in the order of their positions, as a row of their own.

The ranks come from a merge sort: runs sorted in registers, then up to 16 runs merged at a time, each key finding its
place in the other runs by bisection. T at the chunks' bounds comes from a table of counts per (bin of ranks, chunk).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 1 << 22
"""Keys of a row, above which the table's rows of chunks no longer fit one program."""

_MERGED = 64
"""Keys that one program merges at a time."""

_RUNS = ((1 << 12, 512, 4), (1 << 13, 256, 2), (1 << 15, 512, 4), (LONGEST, 2048, 8))
"""Up to this many keys: keys of a run, and warps to sort it. Short rows cannot fill the GPU with long runs."""

_WAYS = 8
"""Runs merged at a time."""

_CHUNKS = ((1 << 14, 128, 2), (1 << 17, 256, 4), (1 << 20, 512, 4), (LONGEST, 1024, 8))
"""Up to this many keys: positions of a chunk, and warps to resolve it. The table shrinks with its length, resolving
grows with the square."""

_BINS = 512
"""Bins of ranks in the table."""

_FLOORS = (1024, 4096, 16384)
"""Prefixes behind which a floor is sought, each a power of two."""

_FILTER = (1 << 15, 16)
"""Drop keys below the floors of rows that are at least so long, and so many times as long as the fewest places."""

_SIFTED = 1024
"""Positions that one program sifts."""

_FILTERED_RUNS = ((1 << 15, 512, 4), (1 << 17, 256, 2), (LONGEST, 1024, 4))
"""As `_RUNS`, where rows were filtered."""

_FILTERED_CHUNKS = ((1 << 15, 128, 2), *_CHUNKS[1:])
"""As `_CHUNKS`, where rows were filtered."""

_PROGRAMS = 4096
"""Programs that merge, at most: where keys were dropped most would have nothing to do."""

_NEVER = tl.constexpr(2147483647)

_LOWEST = tl.constexpr(-2147483648)
"""The rank of padding."""

_SINK = tl.constexpr(2147483646)
"""The rank of a sink, above that of +inf. One less than the highest int32, because merging adds one."""


def contested_expiry(
    scores: Tensor,
    counts: Sequence[int],
    local: int,
    sinks: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Compute `key_expiry` with `counts[g]` contested places in head g, in one launch of each kernel for all heads.

    Args:
        scores: (B, G, N) float of up to 32 bits, or int32 that compare as the scores rank (none the lowest int32,
            which stands for padding, none above `_SINK`). N <= `LONGEST`.
        counts: G places in the contest, at least 0, at least one of them in 1..N - 1.
        local: real tokens by which every expiry moves; it then ends at the end of the segment.
        sinks: first real positions of each segment that win every contest, at most min(counts).
        segment_ids: (B, N) non-decreasing integers.
        key_mask: (B, N) bool, True for a real token.

    Returns:
        (B, G, N) int32.
    """
    batch, groups, length = scores.shape
    rows = batch * groups
    scores, local, sinks = scores.contiguous(), min(local, length), min(sinks, length)
    packed, padded = segment_ids is not None, key_mask is not None
    ids = segment_ids.contiguous() if segment_ids is not None else scores
    mask, later = (scores, scores) if key_mask is None else _of_padding(key_mask, segment_ids, local, sinks)
    contested = [count for count in counts if 0 < count < length]
    per_head = len(set(counts)) > 1
    count = _on_device(tuple(min(c, length) for c in counts), scores.device) if per_head else contested[0]
    filtered = not packed and length >= max(_FILTER[0], _FILTER[1] * min(contested))
    run, warps = _fitting(_FILTERED_RUNS if filtered else _RUNS, length)
    chunk, resolve_warps = _fitting(_FILTERED_CHUNKS if filtered else _CHUNKS, length)
    runs, chunks = triton.cdiv(length, run), triton.cdiv(length, chunk)
    width = max(64, triton.next_power_of_2(triton.cdiv(length, _BINS)))
    bins, chunks_pad = triton.cdiv(length, width), max(32, triton.next_power_of_2(chunks))

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=scores.device)

    expiry, place, table = empty(batch, groups, length), empty(rows, length), empty(rows, bins, chunks)
    end = empty(batch, length) if packed else place
    key_type = torch.int64 if packed else torch.int32
    key, position = empty(rows, length, dtype=key_type), empty(rows, length)
    key_out, position_out = empty(rows, length, dtype=key_type), empty(rows, length)
    blocks, source, total = triton.cdiv(length, _SIFTED), place, place
    sifted = (place, place, place)
    if filtered:
        source, total = empty(rows, length), empty(rows)
        sifted = _sift(scores, mask, later, expiry, count, local, sinks, padded, per_head)
    _sort_runs[(runs, rows)](
        scores,
        ids,
        mask,
        *sifted,
        source,
        total,
        end,
        key,
        position,
        length,
        groups,
        length.bit_length(),
        sinks,
        blocks,
        RUN=run,
        LOG=run.bit_length() - 1,
        SIFTED=_SIFTED,
        BLOCKS_PAD=triton.next_power_of_2(blocks + 1),
        PACKED=packed,
        PADDED=padded,
        SINKS=sinks > 0,
        FILTERED=filtered,
        num_warps=warps,
    )
    while True:
        # As few levels as `_WAYS` allows, the runs divided evenly among them.
        levels = 1
        while _WAYS**levels < runs:
            levels += 1
        ways = 1
        while ways**levels < runs:
            ways *= 2
        tiles = triton.cdiv(length, _MERGED)
        _merge[(min(tiles, max(1, _PROGRAMS // rows)) if filtered else tiles, rows)](
            key,
            position,
            key_out,
            position_out,
            place,
            expiry,
            end,
            later,
            source,
            total,
            length,
            groups,
            run,
            count,
            local,
            WAYS=ways,
            KEYS=_MERGED,
            LAST=ways >= runs,
            PACKED=packed,
            PADDED=padded,
            PER_HEAD=per_head,
            FILTERED=filtered,
            num_warps=4,
        )
        key, key_out, position, position_out = key_out, key, position_out, position
        if ways >= runs:
            break
        run, runs = run * ways, triton.cdiv(runs, ways)
    order, candidate, fallen = position, position_out, (key_out if key_type == torch.int32 else empty(rows, length))
    _table[(bins, rows)](
        order,
        table,
        total,
        length,
        chunks,
        WIDTH=width,
        STEP=min(width, 1024),
        CHUNK=chunk,
        CHUNKS_PAD=chunks_pad,
        FILTERED=filtered,
        num_warps=1 if width < 256 else 4 if chunks_pad <= 1024 else 8,
    )
    # Nothing expires in the chunks that the least `count` keys fill.
    skipped = min(contested) // chunk
    _resolve[(chunks - skipped, rows)](
        order,
        place,
        table,
        candidate,
        fallen,
        empty(rows, length),
        empty(rows, length),
        expiry,
        end,
        mask,
        later,
        source,
        total,
        length,
        groups,
        count,
        local,
        skipped,
        chunks,
        bins,
        WIDTH=width,
        STEP=min(width, 1024),
        BINS_PAD=max(32, triton.next_power_of_2(bins)),
        CHUNK=chunk,
        PACKED=packed,
        PADDED=padded,
        PER_HEAD=per_head,
        FILTERED=filtered,
        num_warps=resolve_warps,
    )
    return expiry


def _sift(
    scores: Tensor,
    mask: Tensor,
    later: Tensor,
    expiry: Tensor,
    count: Tensor | int,
    local: int,
    sinks: int,
    padded: bool,
    per_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the keys below the floors, and write their expiry.

    Returns:
        ranks: (rows, N) int32, those of the keys left, of each block of `_SIFTED` positions from its start.
        positions: (rows, N) int32, in the same places.
        left: (rows, blocks) int32, how many of each block.
    """
    batch, groups, length = scores.shape
    rows, blocks = batch * groups, triton.cdiv(length, _SIFTED)
    ranks, positions, left, floors = (
        torch.empty(rows, size, dtype=torch.int32, device=scores.device)
        for size in (length, length, blocks, len(_FLOORS))
    )
    layout = {"PADDED": padded, "SINKS": sinks > 0}
    _find_floors[(len(_FLOORS), rows)](
        scores,
        mask,
        floors,
        count,
        length,
        groups,
        sinks,
        FIRST=_FLOORS[0],
        GROWTH=_FLOORS[1] // _FLOORS[0],
        LONGEST=_FLOORS[-1],
        PER_HEAD=per_head,
        **layout,
        num_warps=max(1, min(32, _FLOORS[-1] // 512)),
    )
    _drop[(blocks, rows)](
        scores,
        mask,
        later,
        floors,
        ranks,
        positions,
        left,
        expiry,
        length,
        groups,
        sinks,
        local,
        FIRST=_FLOORS[0],
        GROWTH=_FLOORS[1] // _FLOORS[0],
        FLOORS=len(_FLOORS),
        BLOCK=_SIFTED,
        **layout,
        num_warps=max(1, min(4, _SIFTED // 32)),
    )
    return ranks, positions, left


def _of_padding(key_mask: Tensor, segment_ids: Tensor | None, local: int, sinks: int) -> tuple[Tensor, Tensor]:
    """What the kernels read of rows with padding.

    Returns:
        mask: (B, N) uint8: 0 at padding, 2 at a sink, 1 at every other real token.
        later: (B, N) int32: the position `local` real tokens after each position, N where there is none.
    """
    from dynamask.ops.positions import later_positions, real_positions, sink_keys

    batch, length = key_mask.shape
    key_mask = key_mask.contiguous()
    before, nth = real_positions(key_mask, batch, length, key_mask.device)
    mask, later = key_mask.to(torch.uint8), later_positions(local, before, nth).to(torch.int32)
    sink = sink_keys(sinks, before, nth, segment_ids)
    return mask if sink is None else mask + (sink & key_mask), later


def _on_device(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """The counts of the heads on the device. Kept, because a copy to it would stall the stream in every call."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Memory of a graph is not for others to use, and a graph takes no copies from the host.
        filled = torch.empty(len(counts), dtype=torch.int32, device=device)
        for head, count in enumerate(counts):
            filled[head].fill_(count)
        return filled
    return _copied(counts, device)


@functools.lru_cache(maxsize=256)
def _copied(counts: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(counts, dtype=torch.int32, device=device)


def _fitting(table: tuple[tuple[int, ...], ...], length: int) -> tuple[int, ...]:
    return next(entry[1:] for entry in table if length <= entry[0])


@triton.jit
def _ranking(score):
    """As `sortable_scores`: int32 that compare as the scores rank; NaN lowest, -0.0 equal to 0.0."""
    if score.dtype == tl.int32:
        return score
    bits = score.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    ordered = tl.where(bits < 0, -magnitude - 1, magnitude)
    ordered = tl.where(magnitude == 0, 0, ordered)
    return tl.where(magnitude > 0x7F800000, -2147483647, ordered)


@triton.jit
def _count_of_head(counts, row, groups, PER_HEAD: tl.constexpr):
    return tl.load(counts + row % groups) if PER_HEAD else counts


@triton.jit
def _moved(at, later, first, length, local, there, PADDED: tl.constexpr):
    """Positions moved by `local` real tokens; `first` is where the row of the batch begins in `later`."""
    return tl.load(later + first + at, mask=there & (at < length), other=_NEVER) if PADDED else at + local


@triton.jit
def _rank_of(scores, mask, row, batch, j, length, sinks, PADDED: tl.constexpr, SINKS: tl.constexpr):
    """Ranks of the scores at positions `j` of a row of one segment, with padding below all others and sinks above."""
    there = j < length
    rank = _ranking(tl.load(scores + row * length + j, mask=there, other=0))
    if PADDED:
        kind = tl.load(mask + batch * length + j, mask=there, other=0)
        rank = tl.where(kind != 0, rank, _LOWEST)
        rank = tl.where(kind == 2, _SINK, rank)
    elif SINKS:
        rank = tl.where(j < sinks, _SINK, rank)
    return rank


@triton.jit(do_not_specialize=["counts", "groups", "sinks"])
def _find_floors(
    scores,
    mask,
    floors,
    counts,
    length,
    groups,
    sinks,
    FIRST: tl.constexpr,
    GROWTH: tl.constexpr,
    LONGEST: tl.constexpr,
    PADDED: tl.constexpr,
    SINKS: tl.constexpr,
    PER_HEAD: tl.constexpr,
):
    """A value that at least `count` ranks of one prefix reach, and few more; the lowest where there is none."""
    level = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    count = _count_of_head(counts, row, groups, PER_HEAD)
    prefix = FIRST
    for _ in range(0, level):
        prefix *= GROWTH
    found = tl.full([], -2147483648, tl.int64)
    if (prefix < length) & (count > 0) & (count < prefix):
        j = tl.arange(0, LONGEST)
        rank = _rank_of(scores, mask, row, row // groups, tl.where(j < prefix, j, length), length, sinks, PADDED, SINKS)
        # `reach` keys are at or above `low`, `beyond` at or above `high`.
        low = tl.min(tl.where(j < prefix, rank, _NEVER), 0).to(tl.int64)
        rank = tl.where(j < prefix, rank, _LOWEST)
        high = tl.max(rank, 0).to(tl.int64) + 1
        reach = prefix
        beyond = 0
        turn = 0
        # Close enough with few keys more than asked for.
        while (high - low > 1) & (reach > count + count // 32):
            # Where a straight line between both ends has a few more than asked for, and halfway, in turns.
            share = tl.maximum(reach - count - count // 64, 1).to(tl.float32) / (reach - beyond).to(tl.float32)
            share = tl.where(turn % 2 == 0, share, 0.5)
            middle = low + ((high - low).to(tl.float32) * share).to(tl.int64)
            middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
            here = tl.sum((rank >= middle.to(tl.int32)).to(tl.int32), 0)
            enough = here >= count
            low = tl.where(enough, middle, low)
            reach = tl.where(enough, here, reach)
            high = tl.where(enough, high, middle)
            beyond = tl.where(enough, beyond, here)
            turn += 1
        found = low
    tl.store(floors + row * tl.num_programs(0) + level, found.to(tl.int32))


@triton.jit(do_not_specialize=["groups", "sinks", "local"])
def _drop(
    scores,
    mask,
    later,
    floors,
    ranks,
    positions,
    left,
    expiry,
    length,
    groups,
    sinks,
    local,
    FIRST: tl.constexpr,
    GROWTH: tl.constexpr,
    FLOORS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The keys of one block that reach the floors before them; the others expire as they arrive."""
    row = tl.program_id(1).to(tl.int64)
    batch = row // groups
    first = tl.program_id(0) * BLOCK
    j = first + tl.arange(0, BLOCK)
    there = j < length
    rank = _rank_of(scores, mask, row, batch, j, length, sinks, PADDED, SINKS)
    kept = there
    prefix = FIRST
    for level in range(0, FLOORS):
        floor = tl.load(floors + row * FLOORS + level)
        kept = kept & ((j < prefix) | (rank >= floor))
        prefix *= GROWTH
    place = row * length + first + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(ranks + place, rank, mask=kept)
    tl.store(positions + place, j, mask=kept)
    tl.store(left + row * tl.num_programs(0) + tl.program_id(0), tl.sum(kept.to(tl.int32), 0))
    dropped = there & (kept == 0)
    dies = tl.minimum(_moved(j, later, batch * length, length, local, dropped, PADDED), length)
    if PADDED:
        dies = tl.where(rank == _LOWEST, j, dies)
    tl.store(expiry + row * length + j, dies, mask=dropped)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _length_of(total, row, length, FILTERED: tl.constexpr):
    """Keys of a row that were not dropped."""
    return tl.load(total + row) if FILTERED else length


@triton.jit
def _source_of(source, row, at, length, there, FILTERED: tl.constexpr):
    """Positions of the keys `at` of those that were not dropped; the row's end behind the last."""
    return tl.load(source + row * length + at, mask=there, other=length) if FILTERED else at


@triton.jit(do_not_specialize=["groups", "steps", "sinks", "blocks"])
def _sort_runs(
    scores,
    ids,
    mask,
    ranks,
    positions,
    left,
    source,
    total,
    end,
    key,
    position,
    length,
    groups,
    steps,
    sinks,
    blocks,
    RUN: tl.constexpr,
    LOG: tl.constexpr,
    SIFTED: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    SINKS: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """Each run of keys from worst to best: their (segment's end, rank of the score) and places in the row."""
    row = tl.program_id(1).to(tl.int64)
    batch = row // groups
    t = tl.arange(0, RUN)
    first = tl.program_id(0) * RUN
    j = first + t
    size = length
    if FILTERED:
        b = tl.arange(0, BLOCKS_PAD)
        of_block = tl.load(left + row * blocks + b, mask=b < blocks, other=0)
        size = tl.sum(of_block, 0)
        if tl.program_id(0) == 0:
            tl.store(total + row, size)
    if first < size:
        there = j < size
        if FILTERED:
            # A key stands in the block behind those that end at or before it, and so far behind the last such end.
            through = tl.cumsum(of_block, 0)
            near = (b < blocks) & (through >= first) & (through < first + RUN)
            ends = tl.histogram(tl.where(near, through - first, 0), RUN, mask=near)
            block = tl.sum(((b < blocks) & (through < first)).to(tl.int32), 0) + tl.cumsum(ends, 0)
            before = tl.max(tl.where(through <= first, through, 0), 0)
            before = tl.associative_scan(tl.where(ends > 0, j, before), 0, _larger)
            at = row * length + block * SIFTED + j - before
            rank = tl.load(ranks + at, mask=there, other=0)
            tl.store(source + row * length + j, tl.load(positions + at, mask=there, other=0), mask=there)
        elif PACKED & SINKS & (PADDED == 0):
            rank = _ranking(tl.load(scores + row * length + j, mask=there, other=0))
            sink = j < sinks
            here = tl.load(ids + batch * length + j, mask=there, other=0)
            earlier = tl.load(ids + batch * length + j - sinks, mask=there & (sink == 0), other=0)
            rank = tl.where(sink | (earlier != here), _SINK, rank)
        else:
            rank = _rank_of(scores, mask, row, batch, j, length, sinks, PADDED, SINKS)
        unsigned = rank.to(tl.int64) + 2147483648
        value = (unsigned << LOG) | t
        last = j
        if PACKED:
            own = tl.load(ids + batch * length + j, mask=there, other=0)
            low = j + 1
            high = tl.zeros([RUN], tl.int32) + length
            for _ in range(0, steps):
                middle = (low + high) // 2
                same = tl.load(ids + batch * length + middle, mask=there & (low < high), other=0) == own
                high = tl.where((low < high) & (same == 0), middle, high)
                low = tl.where((low < high) & same, middle + 1, low)
            last = low
            if row % groups == 0:
                tl.store(end + batch * length + j, last, mask=there)
            value += tl.minimum(last - first, RUN).to(tl.int64) << (32 + LOG)
        value = tl.sort(tl.where(there, value, 1 << 62))
        tl.store(position + row * length + j, first + (value & (RUN - 1)).to(tl.int32), mask=there)
        unsigned = (value >> LOG) & 0xFFFFFFFF
        if PACKED:
            # A segment takes the same places in a run before and after sorting.
            tl.store(key + row * length + j, (last.to(tl.int64) << 32) | unsigned, mask=there)
        else:
            tl.store(key + row * length + j, (unsigned - 2147483648).to(tl.int32), mask=there)


@triton.jit(do_not_specialize=["groups", "counts", "local"])
def _merge(
    key,
    position,
    key_out,
    position_out,
    place,
    expiry,
    end,
    later,
    source,
    total,
    length,
    groups,
    run,
    counts,
    local,
    WAYS: tl.constexpr,
    KEYS: tl.constexpr,
    LAST: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """`WAYS` neighbouring sorted runs into one. The last merge also gives each key its rank, and the expiry that it
    has unless `_resolve` finds another."""
    row = tl.program_id(1).to(tl.int64)
    base = row * length
    size = _length_of(total, row, length, FILTERED)
    for tile in range(tl.program_id(0), tl.cdiv(size, KEYS), tl.num_programs(0)):
        t = tile * KEYS + tl.arange(0, KEYS)
        there = t < size
        own = tile * KEYS // run
        first = own // WAYS * WAYS * run
        x = tl.load(key + base + t, mask=there, other=0)
        other = tl.arange(0, WAYS)
        start = first + other * run
        # No search in a key's own run, where its place is known.
        stop = tl.where(start == own * run, start, tl.minimum(start + run, size))
        # On a tie the later position ranks higher.
        bound = x[None, :] + (start < own * run).to(tl.int32)[:, None]
        at = start[:, None] + tl.zeros([WAYS, KEYS], tl.int32)
        step = run
        if size <= first + run:
            step = 0
        while step > 0:
            after = at + step
            inside = (after <= stop[:, None]) & there[None, :]
            below = tl.load(key + base + after - 1, mask=inside, other=0) < bound
            at = tl.where(inside & below, after, at)
            step = step // 2
        rank = first + tl.sum(at - start[:, None], 0) + t - own * run
        j = tl.load(position + base + t, mask=there, other=0)
        tl.store(position_out + base + rank, j, mask=there)
        if LAST:
            tl.store(place + base + j, rank, mask=there)
            survives = rank >= size - _count_of_head(counts, row, groups, PER_HEAD)
            j = _source_of(source, row, j, length, there, FILTERED)
            last = length
            if PACKED:
                last = tl.load(end + row // groups * length + j, mask=there, other=0)
            dies = _moved(j, later, row // groups * length, length, local, there, PADDED)
            dies = tl.where(survives, last, tl.minimum(dies, last))
            if PADDED:
                lowest = -2147483648
                if PACKED:
                    lowest = 0
                dies = tl.where((x & 0xFFFFFFFF if PACKED else x) == lowest, j, dies)
            tl.store(expiry + base + j, dies, mask=there)
        else:
            tl.store(key_out + base + rank, x, mask=there)


@triton.jit(do_not_specialize=["chunks"])
def _table(
    order,
    table,
    total,
    length,
    chunks,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """table[bin, c] = keys with a rank in the bin that stand in the chunks up to c."""
    this = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    size = _length_of(total, row, length, FILTERED)
    if this * WIDTH < size:
        per_chunk = tl.zeros([CHUNKS_PAD], tl.int32)
        for begin in range(0, WIDTH, STEP):
            rank = this * WIDTH + begin + tl.arange(0, STEP)
            j = tl.load(order + row * length + rank, mask=rank < size, other=0)
            per_chunk += tl.histogram(j // CHUNK, CHUNKS_PAD, mask=rank < size)
        c = tl.arange(0, CHUNKS_PAD)
        out = table + (row * tl.num_programs(0) + this) * chunks + c
        tl.store(out, tl.cumsum(per_chunk, 0), mask=c < chunks)


@triton.jit
def _threshold(
    order,
    table,
    bound,
    c,
    size,
    count,
    chunks,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BINS_PAD: tl.constexpr,
):
    """T(bound): the `count`-th best rank among the positions before `bound`, which ends chunk c; there are enough."""
    bins = tl.cdiv(size, WIDTH)
    down = tl.arange(0, BINS_PAD)
    in_bin = tl.load(table + (bins - 1 - down).to(tl.int64) * chunks + c, mask=down < bins, other=0)
    through = tl.cumsum(in_bin, 0)
    before = tl.sum((through < count).to(tl.int32), 0)
    wanted = count - tl.max(tl.where(down < before, through, 0), 0)
    # The wanted-th best of this bin's keys before `bound`.
    top = (bins - before) * WIDTH - 1
    found = -1
    begin = 0
    while found < 0:
        rank = top - begin - tl.arange(0, STEP)
        among = tl.load(order + rank, mask=rank < size, other=_NEVER) < bound
        down_to = tl.cumsum(among.to(tl.int32), 0)
        here = tl.sum(among.to(tl.int32), 0)
        if here >= wanted:
            found = top - begin - tl.sum((down_to < wanted).to(tl.int32), 0)
        wanted -= here
        begin += STEP
    return found


@triton.jit(do_not_specialize=["groups", "counts", "local", "skipped", "chunks", "bins"])
def _resolve(
    order,
    place,
    table,
    candidate,
    fallen,
    arrival,
    arrived,
    expiry,
    end,
    mask,
    later,
    source,
    total,
    length,
    groups,
    counts,
    local,
    skipped,
    chunks,
    bins,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    BINS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """The keys that expire in one chunk."""
    c = skipped + tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch = row // groups
    count = _count_of_head(counts, row, groups, PER_HEAD)
    order += row * length
    place += row * length
    expiry += row * length
    table += row * bins * chunks
    size = _length_of(total, row, length, FILTERED)
    start = c * CHUNK
    stop = tl.minimum(start + CHUNK, size)
    if (stop > count) & (count > 0) & (start < size):
        high = _threshold(order, table, stop, c, size, count, chunks, WIDTH, STEP, BINS_PAD)
        low = 0
        if start >= count:
            low = _threshold(order, table, start, c - 1, size, count, chunks, WIDTH, STEP, BINS_PAD)
        k = tl.arange(0, CHUNK)
        new = tl.load(place + start + k, mask=start + k < stop, other=-1)
        candidate += row * length + start
        fallen += row * length + start
        arrival += row * length + start
        arrived += row * length + start
        # Keys of the chunk below T(s) are better than no candidate.
        ranked = new >= low
        arrivals = tl.sum(ranked.to(tl.int32), 0)
        turn_of = tl.cumsum(ranked.to(tl.int32), 0) - 1
        tl.store(arrival + turn_of, new, mask=ranked)
        tl.store(arrived + turn_of, start + k, mask=ranked)
        # How many keys leave the contest here, and how many of the ranks from T(s) on leave before the highest does.
        # Both numbers without a branch: ptxas 12.8 predicates a reduction in one by a register that it has overwritten.
        leaving = tl.sum((new > low).to(tl.int32), 0)
        leaving = tl.where(start >= count, leaving, stop - count)
        above = tl.sum((new >= high).to(tl.int32), 0)
        found = 0
        older = 0
        top = high - 1
        while found < leaving:
            rank = top - tl.arange(0, 256)
            j = tl.load(order + rank, mask=rank >= low, other=_NEVER)
            live = j < stop
            old = j < start
            # Both counts in one scan.
            both = tl.cumsum(live.to(tl.int32) + (old.to(tl.int32) << 16), 0)
            slot = found + (both & 0xFFFF) - 1
            tl.store(candidate + slot, rank, mask=live)
            # Of the places that fall free, those below this key: an old key counts itself.
            tl.store(fallen + slot, above - older - (both >> 16) + old.to(tl.int32), mask=live)
            found += tl.sum(live.to(tl.int32), 0)
            older += tl.sum(old.to(tl.int32), 0)
            top -= 256
        tl.debug_barrier()
        for begin in range(0, leaving, 128):
            entry = begin + tl.arange(0, 128)
            there = entry < leaving
            x = tl.load(candidate + entry, mask=there, other=_NEVER - 1)
            wanted = tl.load(fallen + entry, mask=there, other=0)
            j = tl.load(order + x, mask=there, other=0)
            better = tl.zeros([128], tl.int32)
            turn = tl.zeros([128], tl.int32)
            for i in tl.range(0, arrivals, loop_unroll_factor=8):
                better += (tl.load(arrival + i) > x).to(tl.int32)
                turn += (better < wanted).to(tl.int32)
            dies = tl.maximum(j, tl.load(arrived + turn, mask=there & (turn < arrivals), other=0))
            dies = _source_of(source, row, dies, length, there, FILTERED)
            j = _source_of(source, row, j, length, there, FILTERED)
            last = length
            if PACKED:
                last = tl.load(end + batch * length + j, mask=there, other=0)
            if PADDED:
                there &= tl.load(mask + batch * length + j, mask=there, other=0) != 0
            dies = _moved(dies, later, batch * length, length, local, there, PADDED)
            tl.store(expiry + j, tl.minimum(dies, last), mask=there)
