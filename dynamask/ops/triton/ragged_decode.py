"""`dynamask.ops.ragged_decode`: split the slots in proportion to each head's window, then merge.

All splits are equally long (but the last of a head), whatever the head: a head with a wide window gets more programs,
so no program waits for the widest head. With few queries, the program that ends last of a head merges its splits, in
the same launch; with many, a second launch does.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.triton.forward import LOG2E
from dynamask.ops.triton.inputs import tile_width
from dynamask.ops.triton.tables import device_table

_SLOTS = 64
"""Slots that a program takes at a time."""

_WARPS, _STAGES = 4, 2

_LEAST = 2 * _SLOTS
"""Slots of a split at least: with fewer, merging costs more than reading."""

_PROGRAMS = 528
"""Programs that fill a large GPU: four for each of its multiprocessors."""

_MOST_SPLITS = 64
"""Splits of a head at most: they are merged at once."""

_MERGED_ROWS = 8
"""Rows of queries that the last program merges one after the other; more take a launch of their own."""

_ROWS = 64
"""Rows of queries of a program at most: query heads of one key/value head, times queries."""


class _Splits(NamedTuple):
    """How the slots are split.

    Attributes:
        table: (2, G + 1) int32 on the device: each head's first slot, and its first split.
        part: slots of a split.
        total: splits of all heads.
        groups_pad: G + 1, filled up to a power of two.
        most: splits of the head that has most of them.
        empty: whether a head has no slots.
    """

    table: Tensor
    part: int
    total: int
    groups_pad: int
    most: int
    empty: bool


def ragged_decode_launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    live: Tensor | None,
    offsets: tuple[int, ...],
    bias: Tensor | None,
    scale: float,
    counters: Tensor | None = None,
) -> Tensor:
    """Output (B, H, Nq, Dv) in the query's dtype; arguments as in `dynamask.ops.ragged_decode`, checked.

    Args:
        counters: (B * G,) int32 zeros, which are zeros again afterwards, for calls that never run at the same time;
            None: made for the call, by a launch more.
    """
    batch, heads, num_queries, dim = query.shape
    slots, value_dim = values.shape[1:]
    groups = len(offsets) - 1
    rows = heads // groups * num_queries
    output = torch.empty(batch, heads, num_queries, value_dim, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    splits = _split(offsets, batch, query.device)
    if splits.total == 0:
        return output.zero_()
    query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
    live_bytes = keys if live is None else live.contiguous().view(torch.uint8)
    bias = None if bias is None else bias.float().contiguous()
    tile = min(_ROWS, max(16, triton.next_power_of_2(rows)))
    merges = rows <= _MERGED_ROWS
    if merges and splits.empty:
        output.zero_()  # no program comes to the rows of a head without slots
    if not merges:
        counters = splits.table
    elif counters is None:
        counters = torch.zeros(batch * groups, dtype=torch.int32, device=query.device)
    # Of each split the mean of the values, then the sum of its weights, then its largest logit.
    scratch = torch.empty(batch * splits.total * rows * (value_dim + 2), dtype=torch.float32, device=query.device)
    value_pad = tile_width(value_dim)
    _decode[(splits.total, batch, triton.cdiv(rows, tile))](
        query,
        keys,
        values,
        live_bytes,
        keys if bias is None else bias,
        splits.table,
        scratch,
        counters,
        output,
        scale,
        groups,
        slots,
        splits.part,
        rows,
        GROUPS_PAD=splits.groups_pad,
        ROWS=tile,
        N=_SLOTS,
        DIM=dim,
        DIM_PAD=tile_width(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=value_pad,
        HAS_LIVE=live is not None,
        HAS_BIAS=bias is not None,
        PRECISION="tf32" if query.element_size() == 2 else "ieee",
        MERGES=max(16, triton.next_power_of_2(splits.most)) if merges else 0,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    if not merges:
        _merge[(batch * groups * rows,)](
            scratch,
            splits.table,
            output,
            groups,
            splits.total,
            rows,
            SPLITS=16,
            VALUE_DIM=value_dim,
            VALUE_PAD=value_pad,
            num_warps=4,
        )
    return output


def _split(offsets: tuple[int, ...], batch: int, device: torch.device) -> _Splits:
    """The splits of these heads."""
    part, starts = _starts(offsets, batch)
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    table = device_table((offsets, starts), device)
    return _Splits(table, part, starts[-1], triton.next_power_of_2(len(offsets)), max(counts), min(counts) == 0)


@lru_cache(maxsize=4096)
def _starts(offsets: tuple[int, ...], batch: int) -> tuple[int, tuple[int, ...]]:
    """Slots of a split, and the first split of each head, then the number of all."""
    share = triton.cdiv((offsets[-1] - offsets[0]) * batch, _PROGRAMS)
    share = max(share, *(triton.cdiv(stop - start, _MOST_SPLITS) for start, stop in itertools.pairwise(offsets)))
    part = max(_LEAST, triton.cdiv(share, _SLOTS) * _SLOTS)
    sizes = [stop - start for start, stop in itertools.pairwise(offsets)]
    # Every head's last split is short. A few programs more than the GPU holds would take as long as twice as many.
    while part < max(sizes) and sum(triton.cdiv(size, part) for size in sizes) * batch > _PROGRAMS:
        part += _SLOTS
    starts = [0]
    for start, stop in itertools.pairwise(offsets):
        starts.append(starts[-1] + triton.cdiv(stop - start, part))
    return part, tuple(starts)


@triton.jit(do_not_specialize=["groups", "slots", "part", "rows"])
def _decode(
    query,
    keys,
    values,
    live,
    bias,
    table,
    scratch,
    counters,
    output,
    scale,
    groups,
    slots,
    part,
    rows,
    GROUPS_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    MERGES: tl.constexpr,
):
    """One split of one head's slots against its queries: the weighted mean of the values, and what merging needs.

    Where MERGES is not 0, at least the splits of any head, the last program of a head merges.
    """
    split = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    g = tl.arange(0, GROUPS_PAD)
    starts = tl.load(table + groups + 1 + g, mask=g <= groups, other=2147483647)
    # Heads without slots start where the next one does.
    group = tl.sum((starts <= split).to(tl.int32), 0) - 1
    begin = tl.load(table + group) + (split - tl.load(table + groups + 1 + group)) * part
    stop = tl.minimum(begin + part, tl.load(table + group + 1))
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    # Rows of one key/value head lie together: (batch, group, head in group, query).
    q_row = (batch * groups + group) * rows + row
    d = tl.arange(0, DIM_PAD)
    dv = tl.arange(0, VALUE_PAD)
    q = tl.load(query + q_row[:, None] * DIM + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    base = batch * slots
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for first in range(begin, stop, N):
        slot = first + tl.arange(0, N)
        there = slot < stop
        place = base + slot
        k = tl.load(keys + place[:, None] * DIM + d[None, :], mask=there[:, None] & (d < DIM)[None, :], other=0.0)
        v_mask = there[:, None] & (dv < VALUE_DIM)[None, :]
        v = tl.load(values + place[:, None] * VALUE_DIM + dv[None, :], mask=v_mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_BIAS:
            s += tl.load(bias + place, mask=there, other=0.0)[None, :]
        if HAS_LIVE:
            there = there & (tl.load(live + place, mask=there, other=0) != 0)
            # What a dead slot holds may be NaN, which a weight of zero would pass on.
            v = tl.where(there[:, None], v, 0.0)
        s = tl.where(there[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet has top -inf; -inf - -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        # Differences first: a large bias times log2(e) may be infinite.
        p = tl.exp2((s - shift[:, None]) * LOG2E)
        shrink = tl.exp2((top - shift) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
        top = new_top
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    wide = (dv < VALUE_DIM)[None, :]
    first_split = tl.load(table + groups + 1 + group)
    count = tl.load(table + groups + 2 + group) - first_split
    done = False
    if MERGES > 0:
        done = count == 1
    if done:
        at = output + q_row[:, None] * VALUE_DIM + dv[None, :]
        tl.store(at, mixed.to(output.dtype.element_ty), mask=real[:, None] & wide)
    else:
        all_rows = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * rows
        sums = scratch + all_rows * VALUE_DIM
        tops = sums + all_rows
        out_row = (batch * tl.num_programs(0) + split) * rows + row
        tl.store(scratch + out_row[:, None] * VALUE_DIM + dv[None, :], mixed, mask=real[:, None] & wide)
        tl.store(sums + out_row, total, mask=real)
        tl.store(tops + out_row, top, mask=real)
        if MERGES > 0:
            tl.debug_barrier()
            counter = counters + batch * groups + group
            if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
                tl.store(counter, 0)
                s = tl.arange(0, MERGES)
                there = s < count
                for r in range(0, rows):
                    # Past the first-level cache: other multiprocessors have written them.
                    at = (batch * tl.num_programs(0) + first_split + s) * rows + r
                    each = tl.load(tops + at, mask=there, other=float("-inf"), cache_modifier=".cg")
                    highest = tl.max(each, 0)
                    highest = tl.where(highest == float("-inf"), 0.0, highest)
                    weight = tl.load(sums + at, mask=there, other=0.0, cache_modifier=".cg")
                    weight *= tl.exp2((each - highest) * LOG2E)
                    place = scratch + at[:, None] * VALUE_DIM + dv[None, :]
                    tile = tl.load(place, mask=there[:, None] & wide, other=0.0, cache_modifier=".cg")
                    weights = tl.sum(weight, 0)
                    merged = tl.sum(tile * weight[:, None], 0) / tl.where(weights == 0.0, 1.0, weights)
                    at_output = output + ((batch * groups + group) * rows + r) * VALUE_DIM + dv
                    tl.store(at_output, merged.to(output.dtype.element_ty), mask=dv < VALUE_DIM)


@triton.jit(do_not_specialize=["groups", "total", "rows"])
def _merge(
    scratch,
    table,
    output,
    groups,
    total,
    rows,
    SPLITS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """One row's splits into its output."""
    q_row = tl.program_id(0).to(tl.int64)
    row = q_row % rows
    head = q_row // rows
    batch = head // groups
    group = head % groups
    first = tl.load(table + groups + 1 + group)
    stop = tl.load(table + groups + 2 + group)
    dv = tl.arange(0, VALUE_PAD)
    all_rows = tl.num_programs(0).to(tl.int64) // groups * total
    sums = scratch + all_rows * VALUE_DIM
    tops = sums + all_rows
    top = tl.full([SPLITS], float("-inf"), tl.float32)
    for begin in range(first, stop, SPLITS):
        split = begin + tl.arange(0, SPLITS)
        at = (batch * total + split) * rows + row
        top = tl.maximum(top, tl.load(tops + at, mask=split < stop, other=float("-inf")))
    highest = tl.max(top, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.zeros([SPLITS], tl.float32)
    mixed = tl.zeros([VALUE_PAD], tl.float32)
    for begin in range(first, stop, SPLITS):
        split = begin + tl.arange(0, SPLITS)
        there = split < stop
        at = (batch * total + split) * rows + row
        weight = tl.exp2((tl.load(tops + at, mask=there, other=float("-inf")) - highest) * LOG2E)
        weight *= tl.load(sums + at, mask=there, other=0.0)
        weights += weight
        tile = tl.load(
            scratch + at[:, None] * VALUE_DIM + dv[None, :],
            mask=there[:, None] & (dv < VALUE_DIM)[None, :],
            other=0.0,
        )
        mixed += tl.sum(tile * weight[:, None], 0)
    sum_of_weights = tl.sum(weights, 0)
    mixed = mixed / tl.where(sum_of_weights == 0.0, 1.0, sum_of_weights)
    tl.store(output + q_row * VALUE_DIM + dv, mixed.to(output.dtype.element_ty), mask=dv < VALUE_DIM)
