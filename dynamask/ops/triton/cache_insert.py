"""`dynamask.ops.cache_insert` in one launch: a program per key/value head, whatever number of slots each has.

Real tokens are counted on the device, so that a CUDA graph of the step can be replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLOTS = (1024, 8192)
"""Slots looked at together, at least and at most: every look waits for memory once."""


def insert_key_launch(
    key: Tensor,
    value: Tensor,
    rank: Tensor | None,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    ranks: Tensor,
    positions: Tensor,
    clock: Tensor,
    table: Tensor,
    widest: int,
    local: int,
    sinks: int,
) -> None:
    """Launch the kernel of `dynamask.ops.cache_insert.insert_key`; `ranks` are float32.

    `table` is its layout's, `widest` the number of slots of the head that has most of them.
    """
    batch, slots, dim = keys.shape
    groups, value_dim = clock.shape[1], values.shape[2]
    together = min(_SLOTS[1], max(_SLOTS[0], triton.next_power_of_2(widest)))
    score = ranks if rank is None else rank
    real = clock if mask is None else mask.view(torch.uint8)
    _insert[(batch * groups,)](
        key,
        value,
        score,
        real,
        keys,
        values,
        ranks,
        positions,
        clock,
        table,
        *(key.stride(0), key.stride(1), key.stride(3)),
        *(value.stride(0), value.stride(1), value.stride(3)),
        score.stride(0),
        score.stride(1),
        real.stride(0),
        groups,
        slots,
        local,
        sinks,
        HAS_RANK=rank is not None,
        HAS_MASK=mask is not None,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=triton.next_power_of_2(value_dim),
        SLOTS=together,
        num_warps=max(4, together // 512),
    )


insert_key_op = torch.library.custom_op(
    "dynamask::insert_key",
    insert_key_launch,
    mutates_args=("keys", "values", "ranks", "positions", "clock"),
    device_types="cuda",
)
"""`insert_key_launch` as an operator, for torch.compile."""


@triton.jit
def _sortable(score):
    """As `sortable_scores`: integers that compare as the scores rank; NaN lowest, -0.0 equal to 0.0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, -2147483647, ordered).to(tl.int64)


@triton.jit
def _lowest(ranks, positions, base, start, stop, now, local, sinks, SLOTS: tl.constexpr):
    """The slot from start to stop whose key a contest evicts, after its code; the highest code where no key is in it.

    Lowest rank first, then the oldest: one integer says both, positions being below 2^31.
    """
    nobody: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    lowest = tl.full([SLOTS], nobody, tl.int64)
    place = tl.zeros([SLOTS], tl.int32)
    for begin in range(start, stop, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        there = slot < stop
        position = tl.load(positions + base + slot, mask=there, other=0).to(tl.int64)
        score = _sortable(tl.load(ranks + base + slot, mask=there, other=0.0))
        contest = there & (position <= now - local) & (position >= sinks)
        code = tl.where(contest, score * 2147483648 + position, nobody)
        better = code < lowest
        lowest = tl.where(better, code, lowest)
        place = tl.where(better, slot, place)
    least = tl.min(lowest, 0)
    return least, tl.max(tl.where((lowest == least) & (least != nobody), place, 0), 0)


@triton.jit(do_not_specialize=["groups", "slots", "local", "sinks", "rank_b", "rank_g", "mask_b"])
def _insert(
    key,
    value,
    rank,
    mask,
    keys,
    values,
    ranks,
    positions,
    clock,
    table,
    key_b,
    key_g,
    key_d,
    value_b,
    value_g,
    value_d,
    rank_b,
    rank_g,
    mask_b,
    groups,
    slots,
    local,
    sinks,
    HAS_RANK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = row // groups
    g = row % groups
    now = tl.load(clock + row)
    start = tl.load(table + g)
    stop = tl.load(table + g + 1)
    base = b * slots
    free = now < stop - start
    least, slot = _lowest(ranks, positions, base, start, tl.where(free, start, stop), now, local, sinks, SLOTS)
    slot = tl.where(free, start + now, slot.to(tl.int64))
    new = tl.full([], 0.0, tl.float32)
    if HAS_RANK:
        new = tl.load(rank + b * rank_b + g * rank_g)
    # Without a local part the new key is in the contest too: it wins ties, and is dead on arrival below all.
    arrives = free | (local > 0) | (_sortable(new) * 2147483648 + 2147483647 >= least)
    step = 1
    if HAS_MASK:
        real = tl.load(mask + b * mask_b) != 0
        arrives = arrives & real
        step = real.to(tl.int32)
    place_in_pool = base + slot
    d = tl.arange(0, DIM_PAD)
    here = arrives & (d < DIM)
    row_of_key = tl.load(key + b * key_b + g * key_g + d * key_d, mask=here)
    tl.store(keys + place_in_pool * DIM + d, row_of_key, mask=here)
    d = tl.arange(0, VALUE_PAD)
    here = arrives & (d < VALUE_DIM)
    row_of_value = tl.load(value + b * value_b + g * value_g + d * value_d, mask=here)
    tl.store(values + place_in_pool * VALUE_DIM + d, row_of_value, mask=here)
    tl.store(ranks + place_in_pool, new, mask=arrives)
    tl.store(positions + place_in_pool, now.to(tl.int32), mask=arrives)
    tl.store(clock + row, now + step)


__all__ = ["insert_key_launch", "insert_key_op"]
