"""The keys that survive a call, packed into the pools of a bounded cache: two launches for some twenty operations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 4096
"""Keys that a program looks at together."""

_SLOTS = 64
"""Slots that a program fills."""


def keep_launch(
    key: Tensor,
    value: Tensor,
    ranks: Tensor,
    position: Tensor,
    expiry: Tensor,
    table: Tensor,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack the keys whose expiry is N: those that queries behind the call see.

    Args:
        key, value: (B, G, N, D) and (B, G, N, Dv), of any strides.
        ranks: (B, G, N) float.
        position: (B, G, N) int64.
        expiry: (B, G, N) int32.
        table: (G + 1,) int32, the first slot of each head; no head has more survivors than slots.
        slots: S of all heads.

    Returns:
        keys (B, S, D), values (B, S, Dv), ranks (B, S) and positions (B, S) int32: each head's survivors in their
        order, then zeros at position -1.
    """
    batch, groups, length, dim = key.shape
    value_dim = value.shape[3]
    chosen = torch.empty(batch, slots, dtype=torch.int32, device=key.device)
    expiry, ranks, position = expiry.contiguous(), ranks.contiguous(), position.contiguous()
    found = (
        key.new_empty(batch, slots, dim),
        value.new_empty(batch, slots, value_dim),
        ranks.new_empty(batch, slots),
        torch.empty(batch, slots, dtype=torch.int32, device=key.device),
    )
    if not slots:
        return found
    _choose[(groups, batch)](expiry, table, chosen, length, slots, COLUMNS=_COLUMNS, num_warps=8)
    _pack[(triton.cdiv(slots, _SLOTS), batch)](
        key,
        value,
        ranks,
        position,
        chosen,
        table,
        *found,
        *key.stride(),
        *value.stride(),
        length,
        groups,
        slots,
        GROUPS_PAD=triton.next_power_of_2(groups + 1),
        SLOTS=_SLOTS,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=triton.next_power_of_2(value_dim),
        num_warps=4,
    )
    return found


@triton.jit(do_not_specialize=["length", "slots"])
def _choose(expiry, table, chosen, length, slots, COLUMNS: tl.constexpr):
    """The survivors of one head of one row, slot by slot; -1 for slots that are left over."""
    g = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = (b * tl.num_programs(0) + g) * length
    slot = tl.load(table + g)
    stop = tl.load(table + g + 1)
    for begin in range(0, length, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        survives = tl.load(expiry + row + column, mask=column < length, other=-1) == length
        counted = tl.cumsum(survives.to(tl.int32), 0)
        target = slot + counted - 1
        tl.store(chosen + b * slots + target, column, mask=survives & (target < stop))
        slot += tl.sum(survives.to(tl.int32), 0)
    for begin in range(slot, stop, COLUMNS):
        left = begin + tl.arange(0, COLUMNS)
        tl.store(chosen + b * slots + left, tl.full([COLUMNS], -1, tl.int32), mask=left < stop)


@triton.jit(do_not_specialize=["length", "groups", "slots"])
def _pack(
    key,
    value,
    ranks,
    position,
    chosen,
    table,
    keys,
    values,
    kept_ranks,
    positions,
    key_b,
    key_g,
    key_n,
    key_d,
    value_b,
    value_g,
    value_n,
    value_d,
    length,
    groups,
    slots,
    GROUPS_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """What lies in some slots."""
    b = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    there = slot < slots
    head = tl.arange(0, GROUPS_PAD)
    first = tl.load(table + head, mask=head < groups, other=2147483647)
    # Heads without slots start where the next one does.
    g = (tl.sum((first[None, :] <= slot[:, None]).to(tl.int32), 1) - 1).to(tl.int64)
    n = tl.load(chosen + b * slots + slot, mask=there, other=-1).to(tl.int64)
    full = n >= 0
    at = (b * groups + g) * length + n
    to = b * slots + slot
    tl.store(kept_ranks + to, tl.load(ranks + at, mask=full, other=0.0), mask=there)
    tl.store(positions + to, tl.load(position + at, mask=full, other=-1).to(tl.int32), mask=there)
    at_key, at_value = b * key_b + g * key_g + n * key_n, b * value_b + g * value_g + n * value_n
    _copy_rows(key + at_key, key_d, keys + to * DIM, full, there, DIM, DIM_PAD)
    _copy_rows(value + at_value, value_d, values + to * VALUE_DIM, full, there, VALUE_DIM, VALUE_PAD)


@triton.jit
def _copy_rows(sources, stride, targets, full, there, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Copy rows from pointers to pointers; zeros where there is nothing to copy."""
    d = tl.arange(0, DIM_PAD)[None, :]
    rows = tl.load(sources[:, None] + d * stride, mask=full[:, None] & (d < DIM), other=0.0)
    tl.store(targets[:, None] + d, rows, mask=there[:, None] & (d < DIM))


__all__ = ["keep_launch"]
