"""Which keys a block of queries can see, as one list of positions per (batch, key/value head, block).

Lists lie end to end, those of a head as far apart as that head's longest can be: a narrow head takes no room for a wide
one's keys, and no list has to wait for the lengths of those before it.

A row of the list holds, from its front, the keys that every query of the block sees and, from its back, those that
only some of them see (born or expiring inside the block). The attention kernels test the interval for the second kind
alone. The order within each kind is the same every time, but not that of position.

No list is found by looking at all keys. Sort the keys of each run of positions by expiry, the last first: then those
of the run that see the start of a large block of queries are the run's first so many, a number that one table holds
for all runs and large blocks, and a large block's list is put together from the fronts of the runs before it. Most of
it every query of the large block sees; the blocks inside copy that part, and look at the rest alone. On short rows the
table holds every block, and the blocks take their lists from the runs themselves: one launch less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.triton.tables import device_table

ROWS = 128
"""Rows of a query tile: the query heads of one key/value head times the queries of a block."""

_STEP = 1024
"""Entries of a list handled at a time."""

_DIRECT_STEP = 256
"""The same where the blocks take their lists from the runs."""

_DIRECT_WARPS = 2
"""Warps of a program that takes a block's list from the runs."""

_LARGE = ((1 << 14, 512), (1 << 62, 1024))
"""Up to this many keys: queries of a large block, at most."""

NARROW = 256
"""Up to this many keys that a query sees, the large blocks of every row are those of short rows."""

_RUNS = ((1 << 17, 512), (1 << 20, 1024), (1 << 62, 2048))
"""Up to this many keys: keys of a run."""

DIRECT = 1 << 15
"""Up to this many keys blocks take their lists from the runs where no lists of large blocks are asked for."""

SCAN = 1 << 12
"""Up to this many keys each block looks through all of them, instead."""

_SCAN_STEP = 1024
"""Keys that a program looks at together where it looks at all."""

_UNIT = 16
"""Lists begin and end at multiples of this, which lets the kernels move four entries at once."""


class KeyLists(NamedTuple):
    """Lists of visible keys.

    Attributes:
        index: (B · blocks · entries,) int32 positions; in each list whole-block keys from the front, the others from
            the back.
        whole: (B·G, blocks) int32, how many stand at the front.
        partial: (B·G, blocks) int32, how many at the back.
        block: queries per block.
        table: (3, G) int32 for the kernels: entries of a head's list and entries of the heads before it, both in units
            of 16, and the heads, the one with the longest lists first.
        capacities: entries of a list of each of the G heads.
    """

    index: Tensor  # type: ignore[assignment]  # not the tuple method
    whole: Tensor
    partial: Tensor
    block: int
    table: Tensor
    capacities: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the attention kernels read of the lists."""
        return self.index, self.whole, self.partial, self.table

    @property
    def blocks(self) -> int:
        """Lists of each row."""
        return self.whole.shape[1]

    @property
    def entries(self) -> int:
        """Entries of one list of each head together."""
        return sum(self.capacities)

    def of(self, row: int, block: int) -> Tensor:
        """The list of a row (batch · G + head) and a block, gaps included: a view of `index`."""
        groups, blocks = len(self.capacities), self.whole.shape[1]
        batch, group = divmod(row, groups)
        size = self.capacities[group]
        start = (batch * self.entries + sum(self.capacities[:group])) * blocks + block * size
        return self.index[start : start + size]


class SpanLists(NamedTuple):
    """The lists of large blocks, from which those of the blocks are picked; laid out as in `KeyLists`.

    Attributes:
        index: (B · spans · entries,) int32 positions; in each list whole-block keys from the front, the others from the
            back.
        whole: (B·G, spans) int32, how many stand at the front.
        partial: (B·G, spans) int32, how many at the back.
        span: queries per large block.
        table: as `KeyLists.table`.
        capacities: entries of a list of each of the G heads.
    """

    index: Tensor  # type: ignore[assignment]  # not the tuple method
    whole: Tensor
    partial: Tensor
    span: int
    table: Tensor
    capacities: tuple[int, ...]


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


def build_lists(expiry: Tensor, num_queries: int, block: int, max_live: Sequence[int]) -> KeyLists:
    """Build the lists; arguments as in `build_lists_and_spans`."""
    batch, groups, length = expiry.shape
    if length > DIRECT or not max_live:
        return build_lists_and_spans(expiry, num_queries, block, max_live)[0]
    capacities = _capacities([live + block for live in max_live], length)
    table = _layout(capacities, expiry.device, keep=True)
    blocks = triton.cdiv(num_queries, block)
    index = torch.empty(batch * blocks * sum(capacities), dtype=torch.int32, device=expiry.device)
    whole, partial = torch.empty(2, batch * groups, blocks, dtype=torch.int32, device=expiry.device)
    if length <= SCAN:
        _scan[(blocks, batch * groups)](
            expiry,
            index,
            whole,
            partial,
            table,
            length,
            length - num_queries,
            blocks,
            sum(capacities),
            GROUPS=groups,
            BLOCK=block,
            STEP=_SCAN_STEP,
            num_warps=4,
        )
        return KeyLists(index, whole, partial, block, table, capacities)
    runs = _sort(expiry, num_queries, block, blocks)
    counts, sizes = (whole, partial), {"step": _DIRECT_STEP, "warps": _DIRECT_WARPS}
    _collect(expiry, runs, index, counts, table, capacities, num_queries, block, write=True, **sizes)
    return KeyLists(index, whole, partial, block, table, capacities)


class _Runs(NamedTuple):
    """The keys of each run of positions by expiry; `alive` as in `_sort_by_expiry`."""

    by_expiry: Tensor
    alive: Tensor
    run: int


def _sort(expiry: Tensor, num_queries: int, large: int, large_blocks: int) -> _Runs:
    """Sort the keys of each run by expiry, and count those that see the start of each block of `large` queries."""
    batch, groups, length = expiry.shape
    rows = batch * groups
    run = next(run for longest, run in _RUNS if length <= longest)
    runs = triton.cdiv(length, run)
    by_expiry = torch.empty(rows, length, dtype=torch.int32, device=expiry.device)
    alive = torch.empty(rows, runs, large_blocks + 1, dtype=torch.int16, device=expiry.device)
    _sort_by_expiry[(runs, rows)](
        expiry,
        by_expiry,
        alive,
        torch.empty(rows, runs, run, dtype=torch.int32, device=expiry.device),
        length,
        length - num_queries,
        large,
        large_blocks,
        RUN=run,
        LOG=run.bit_length() - 1,
        WIDE=(length + 1) * run >= 1 << 31,
        BLOCKS=128,
        num_warps=4,
    )
    return _Runs(by_expiry, alive, run)


def _collect(
    expiry: Tensor,
    runs: _Runs,
    out: Tensor,
    counts: tuple[Tensor, Tensor],
    table: Tensor,
    capacities: tuple[int, ...],
    num_queries: int,
    large: int,
    step: int,
    write: bool,
    warps: int = 4,
) -> None:
    """Put the lists of blocks of `large` queries together from the runs; without `write` count them alone."""
    length = expiry.shape[2]
    rows, number, blocks_and_one = runs.alive.shape
    runs_pad = max(32, triton.next_power_of_2(number))
    blocks = blocks_and_one - 1
    _large[(blocks, rows)](
        expiry,
        runs.by_expiry,
        runs.alive,
        torch.empty(rows, blocks, 2, runs_pad, dtype=torch.int32, device=expiry.device),
        out,
        *counts,
        table,
        length,
        length - num_queries,
        blocks,
        number,
        sum(capacities),
        GROUPS=expiry.shape[1],
        RUN=runs.run,
        RUNS_PAD=runs_pad,
        LARGE=large,
        STEP=step,
        WRITE=write,
        num_warps=warps,
    )


def _capacities(sizes: Sequence[int], length: int) -> tuple[int, ...]:
    """Entries of a list of each head, of which at most so many are needed."""
    return tuple(max(_UNIT, triton.cdiv(min(size, length), _UNIT) * _UNIT) for size in sizes)


def build_lists_and_spans(
    expiry: Tensor, num_queries: int, block: int, max_live: Sequence[int]
) -> tuple[KeyLists, SpanLists]:
    """Build the lists of the blocks and of the large blocks.

    Args:
        expiry: (B, G, N) int32, contiguous.
        num_queries: Nq; the queries are the last Nq positions.
        block: queries per block, at most 512.
        max_live: no query sees more keys of a head than this, one number for each of the G heads; empty if unknown,
            which costs a synchronisation.
    """
    batch, groups, length = expiry.shape
    rows = batch * groups
    narrow = max(max_live, default=length) <= NARROW
    large = next(large for longest, large in _LARGE if length <= longest or narrow) // block * block  # none lies in two
    blocks, large_blocks = triton.cdiv(num_queries, block), triton.cdiv(num_queries, large)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expiry.device)

    runs = _sort(expiry, num_queries, large, large_blocks)
    counts = (empty(rows, large_blocks), empty(rows, large_blocks))
    if max_live:
        sizes, fine_sizes = ([live + queries for live in max_live] for queries in (large, block))
    else:
        smallest = (_UNIT,) * groups
        unwritten = _layout(smallest, expiry.device, keep=False)
        _collect(expiry, runs, runs.by_expiry, counts, unwritten, smallest, num_queries, large, _STEP, write=False)
        sizes = fine_sizes = (counts[0] + counts[1]).view(batch, groups, -1).amax((0, 2)).tolist()
    large_capacities, capacities = _capacities(sizes, length), _capacities(fine_sizes, length)
    large_table = _layout(large_capacities, expiry.device, keep=bool(max_live))
    large_index = empty(batch * large_blocks * sum(large_capacities))
    _collect(expiry, runs, large_index, counts, large_table, large_capacities, num_queries, large, _STEP, write=True)
    index, whole, partial = empty(batch * blocks * sum(capacities)), empty(rows, blocks), empty(rows, blocks)
    table = _layout(capacities, expiry.device, keep=bool(max_live))
    _fine[(blocks, rows)](
        expiry,
        large_index,
        *counts,
        large_table,
        length,
        length - num_queries,
        large_blocks,
        sum(large_capacities),
        blocks,
        index,
        whole,
        partial,
        table,
        sum(capacities),
        GROUPS=groups,
        BLOCK=block,
        LARGE=large,
        STEP=_STEP,
        num_warps=4,
    )
    spans = SpanLists(large_index, *counts, large, large_table, large_capacities)
    return KeyLists(index, whole, partial, block, table, capacities), spans


def _layout(capacities: tuple[int, ...], device: torch.device, keep: bool) -> Tensor:
    """`KeyLists.table` of these capacities, to be kept where the windows gave them."""
    before = tuple(sum(capacities[:group]) // _UNIT for group in range(len(capacities)))
    widest_first = tuple(sorted(range(len(capacities)), key=lambda group: -capacities[group]))
    return device_table((tuple(capacity // _UNIT for capacity in capacities), before, widest_first), device, keep=keep)


@triton.jit
def list_of(table, batch, group, block, blocks, entries, GROUPS: tl.constexpr):
    """Where a list begins in `KeyLists.index`, and how many entries it has room for."""
    capacity = tl.load(table + group) * 16
    before = tl.load(table + GROUPS + group).to(tl.int64) * 16
    return (batch.to(tl.int64) * entries + before) * blocks + block.to(tl.int64) * capacity, capacity


@triton.jit
def widest_first(table, number, batch_size, GROUPS: tl.constexpr):
    """Batch and head of the number-th row, if rows with longer lists come first."""
    return number % batch_size, tl.load(table + 2 * GROUPS + number // batch_size)


@triton.jit(do_not_specialize=["first_query", "large", "large_blocks"])
def _sort_by_expiry(
    expiry,
    by_expiry,
    alive,
    sorted_expiry,
    length,
    first_query,
    large,
    large_blocks,
    RUN: tl.constexpr,
    LOG: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One run's positions, the last to expire first; alive[b] = how many outlive the first query of large block b
    (b = the number of blocks: the last query of all)."""
    run = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    runs = tl.num_programs(0)
    t = tl.arange(0, RUN)
    key = run * RUN + t
    dies = tl.load(expiry + row * length + key, mask=key < length, other=0)
    # Keys beyond the end sort behind every other.
    dies = tl.where(key < length, tl.minimum(tl.maximum(dies, 0), length), -1)
    value = (dies.to(tl.int64) if WIDE else dies) * RUN + t
    value = tl.sort(value, descending=True)
    tl.store(by_expiry + row * length + key, run * RUN + (value & (RUN - 1)).to(tl.int32), mask=key < length)
    sorted_expiry += (row * runs + run) * RUN
    # Arithmetic shifts round down: -1 stays -1.
    tl.store(sorted_expiry + t, (value >> LOG).to(tl.int32))
    tl.debug_barrier()
    alive += (row * runs + run) * (large_blocks + 1)
    for begin in range(0, large_blocks + 1, BLOCKS):
        b = begin + tl.arange(0, BLOCKS)
        query = tl.minimum(first_query + b * large, length - 1)
        outlive = tl.zeros([BLOCKS], tl.int32)
        step = RUN
        while step > 0:
            after = outlive + step
            longer = tl.load(sorted_expiry + after - 1, mask=after <= RUN, other=-1) > query
            outlive = tl.where(longer, after, outlive)
            step = step // 2
        tl.store(alive + b, outlive.to(tl.int16), mask=b <= large_blocks)


@triton.jit
def _run_of(through, slot, RUNS_PAD: tl.constexpr):
    """Which run fills a slot, and how many slots the runs before it fill."""
    run = tl.zeros_like(slot)
    step = RUNS_PAD // 2
    while step > 0:
        run = tl.where(tl.load(through + run + step - 1) <= slot, run + step, run)
        step = step // 2
    return run, tl.load(through + run - 1, mask=run > 0, other=0)


@triton.jit(do_not_specialize=["first_query", "large_blocks", "runs"])
def _large(
    expiry,
    by_expiry,
    alive,
    through,
    index,
    whole_counts,
    partial_counts,
    table,
    length,
    first_query,
    large_blocks,
    runs,
    entries,
    GROUPS: tl.constexpr,
    RUN: tl.constexpr,
    RUNS_PAD: tl.constexpr,
    LARGE: tl.constexpr,
    STEP: tl.constexpr,
    WRITE: tl.constexpr,
):
    """The list of a large block: keys that all its queries see from the front, others from the back."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    start = first_query + block * LARGE
    stop = tl.minimum(start + LARGE, length)
    expiry += row * length
    by_expiry += row * length
    entry = row * large_blocks + block
    start_of_list, capacity = list_of(table, row // GROUPS, row % GROUPS, block, large_blocks, entries, GROUPS)
    out = index + start_of_list
    # Runs that end at or before the block's start.
    before = start // RUN
    p = tl.arange(0, RUNS_PAD)
    column = alive + (row * runs + p) * (large_blocks + 1) + block
    at_start = tl.load(column, mask=p < before, other=0).to(tl.int32)
    at_stop = tl.load(column + 1, mask=p < before, other=0).to(tl.int32)
    whole = tl.sum(at_stop, 0)
    partial = tl.sum(at_start, 0) - whole
    if WRITE:
        whole_through = through + entry * 2 * RUNS_PAD
        partial_through = whole_through + RUNS_PAD
        tl.store(whole_through + p, tl.cumsum(at_stop, 0))
        tl.store(partial_through + p, tl.cumsum(at_start - at_stop, 0))
        tl.debug_barrier()
        for begin in range(0, whole, STEP):
            slot = begin + tl.arange(0, STEP)
            there = slot < whole
            run, skipped = _run_of(whole_through, tl.where(there, slot, 0), RUNS_PAD)
            key = tl.load(by_expiry + run * RUN + slot - skipped, mask=there, other=0)
            tl.store(out + slot, key, mask=there & (slot < capacity))
        for begin in range(0, partial, STEP):
            slot = begin + tl.arange(0, STEP)
            there = slot < partial
            run, skipped = _run_of(partial_through, tl.where(there, slot, 0), RUNS_PAD)
            ahead = tl.load(whole_through + run) - tl.load(whole_through + run - 1, mask=run > 0, other=0)
            key = tl.load(by_expiry + run * RUN + ahead + slot - skipped, mask=there, other=0)
            tl.store(out + capacity - 1 - slot, key, mask=there & (slot < capacity))
    for begin in range(before * RUN, stop, STEP):
        key = begin + tl.arange(0, STEP)
        dies = tl.load(expiry + key, mask=key < stop, other=0)
        whole, partial = _append(out, key, dies, start, stop, key < stop, whole, partial, capacity, WRITE)
    tl.store(whole_counts + entry, whole)
    tl.store(partial_counts + entry, partial)


@triton.jit
def _append(out, key, dies, start, stop, there, whole, partial, capacity, WRITE: tl.constexpr):
    """Keys onto the list of the queries start..stop - 1, each at the end where it belongs; the new numbers of both."""
    seen = there & (key < stop) & (dies > tl.maximum(start, key))
    all_see = seen & (key <= start) & (dies >= stop)
    # Both counts in one scan, of at most 2^15 keys.
    flags = tl.where(all_see, 1, 0) + tl.where(seen & (all_see == 0), 65536, 0)
    if WRITE:
        both = tl.cumsum(flags, 0)
        place = tl.where(all_see, whole + (both & 0xFFFF) - 1, capacity - partial - (both >> 16))
        tl.store(out + place, key, mask=seen & (place >= 0) & (place < capacity))
    added = tl.sum(flags, 0)
    return whole + (added & 0xFFFF), partial + (added >> 16)


@triton.jit(do_not_specialize=["first_query", "blocks"])
def _scan(
    expiry,
    index,
    whole_counts,
    partial_counts,
    table,
    length,
    first_query,
    blocks,
    entries,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The list of one block, of all keys that are born before it ends."""
    # The last blocks, which have the most keys to look at, first.
    block = blocks - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    start = first_query + block * BLOCK
    stop = tl.minimum(start + BLOCK, length)
    start_of_list, capacity = list_of(table, row // GROUPS, row % GROUPS, block, blocks, entries, GROUPS)
    out = index + start_of_list
    expiry += row * length
    key = tl.arange(0, STEP)
    dies = tl.load(expiry + key, mask=key < stop, other=0)
    whole = 0
    partial = 0
    for _begin in range(0, stop, STEP):
        following = key + STEP
        soon = tl.load(expiry + following, mask=following < stop, other=0)
        whole, partial = _append(out, key, dies, start, stop, key < stop, whole, partial, capacity, WRITE=True)
        key = following
        dies = soon
    tl.store(whole_counts + row * blocks + block, whole)
    tl.store(partial_counts + row * blocks + block, partial)


@triton.jit(do_not_specialize=["first_query", "large_blocks", "blocks"])
def _fine(
    expiry,
    large_index,
    large_whole,
    large_partial,
    large_table,
    length,
    first_query,
    large_blocks,
    large_entries,
    blocks,
    index,
    whole,
    partial,
    table,
    entries,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,
    STEP: tl.constexpr,
):
    """The list of one block: what the whole large block sees, and of the rest what this one does."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    start = first_query + block * BLOCK
    stop = tl.minimum(start + BLOCK, length)
    expiry += row * length
    batch, group = row // GROUPS, row % GROUPS
    large = block // (LARGE // BLOCK)
    parent = row * large_blocks + large
    start_of_source, large_capacity = list_of(large_table, batch, group, large, large_blocks, large_entries, GROUPS)
    source = large_index + start_of_source
    start_of_list, capacity = list_of(table, batch, group, block, blocks, entries, GROUPS)
    out = index + start_of_list
    num_whole = tl.minimum(tl.load(large_whole + parent), large_capacity)
    listed = tl.minimum(tl.load(large_partial + parent), large_capacity)
    for begin in range(0, num_whole, STEP):
        slot = begin + tl.arange(0, STEP)
        key = tl.load(source + slot, mask=slot < num_whole)
        tl.store(out + slot, key, mask=slot < tl.minimum(num_whole, capacity))
    num_partial = 0
    for begin in range(0, listed, STEP):
        slot = begin + tl.arange(0, STEP)
        there = slot < listed
        key = tl.load(source + large_capacity - 1 - slot, mask=there, other=0)
        dies = tl.load(expiry + key, mask=there, other=0)
        num_whole, num_partial = _append(
            out, key, dies, start, stop, there, num_whole, num_partial, capacity, WRITE=True
        )
    tl.store(whole + row * blocks + block, num_whole)
    tl.store(partial + row * blocks + block, num_partial)
