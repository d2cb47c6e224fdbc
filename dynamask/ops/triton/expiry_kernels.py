"""The kernels of `dynamask.ops.triton.expiry`, in the order of their launches."""

from __future__ import annotations

import triton
import triton.language as tl

_NEVER = tl.constexpr(2147483647)

_LOWEST = tl.constexpr(-2147483648)
"""The rank of padding."""

_SINK = tl.constexpr(2147483646)
"""The rank of a sink, above that of +inf. One less than the highest int32, because merging adds one."""


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
