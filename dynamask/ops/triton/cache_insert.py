"""One decoded key into a full bounded cache, in one launch: find the lowest-ranked key of the contest, overwrite it.

The plain form of this step is `BoundedLayer._replace`: a dozen launches per layer, which is what decoding would wait
for. Positions are counted on the device, so that a CUDA graph of the step can be replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLOTS = 1024
"""Slots looked at together."""


@torch.library.custom_op(
    "dynamask::replace_lowest", mutates_args=("keys", "values", "scores", "positions", "clock"), device_types="cuda"
)
def replace_lowest(
    key: Tensor,
    value: Tensor,
    score: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    positions: Tensor,
    clock: Tensor,
    local: int,
) -> None:
    """The new key takes the slot of the key that falls out of the window; in place.

    Args:
        key, value: (B, G, 1, D) and (B, G, 1, Dv) of the new position.
        score: (B, G, 1) float32, its rank.
        keys, values: (B, G, S, D) and (B, G, S, Dv), contiguous: the slots, all of them full.
        scores: (B, G, S) float32, contiguous.
        positions: (B, G, S) int64, contiguous.
        clock: (B, G) int64: the new key's position; counts on.
        local: newest positions that are always kept. Without any, a key that ranks below all others is not stored.
    """
    replace_lowest_kernel(key, value, score, keys, values, scores, positions, clock, local)


def replace_lowest_kernel(
    key: Tensor,
    value: Tensor,
    score: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    positions: Tensor,
    clock: Tensor,
    local: int,
) -> None:
    """`replace_lowest` without the operator around it, for the interpreter's tests on a CPU."""
    groups, slots, dim = keys.shape[1:]
    value_dim = values.shape[-1]
    _replace[(keys.shape[0] * groups,)](
        key,
        value,
        score,
        keys,
        values,
        scores,
        positions,
        clock,
        *(key.stride(0), key.stride(1), key.stride(3)),
        *(value.stride(0), value.stride(1), value.stride(3)),
        *(score.stride(0), score.stride(1)),
        groups,
        slots,
        local,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=triton.next_power_of_2(value_dim),
        SLOTS=_SLOTS,
        num_warps=4,
    )


@triton.jit
def _rank(score):
    """As `sortable_scores`: integers that compare as the scores rank; NaN lowest, -0.0 equal to 0.0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, -2147483647, ordered).to(tl.int64)


@triton.jit
def _replace(
    key,
    value,
    score,
    keys,
    values,
    scores,
    positions,
    clock,
    key_b,
    key_g,
    key_d,
    value_b,
    value_g,
    value_d,
    score_b,
    score_g,
    groups,
    slots,
    local,
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
    base = row * slots
    # Lowest rank first, then the oldest: one integer says both, positions being below 2^31.
    nobody: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    lowest = tl.full([SLOTS], nobody, tl.int64)
    place = tl.zeros([SLOTS], tl.int32)
    for begin in range(0, slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        there = slot < slots
        position = tl.load(positions + base + slot, mask=there, other=0)
        rank = _rank(tl.load(scores + base + slot, mask=there, other=0.0))
        # Only keys older than the local part are in the contest.
        code = tl.where(there & (position <= now - local), rank * 2147483648 + position, nobody)
        better = code < lowest
        lowest = tl.where(better, code, lowest)
        place = tl.where(better, slot, place)
    least = tl.min(lowest, 0)
    slot = tl.max(tl.where(lowest == least, place, 0), 0)
    new = tl.load(score + b * score_b + g * score_g)
    # Without a local part the new key is in the contest too: it wins ties, and is dead on arrival below all.
    arrives = (local > 0) | (_rank(new) * 2147483648 + 2147483647 >= least)
    d = tl.arange(0, DIM_PAD)
    here = arrives & (d < DIM)
    row_of_key = tl.load(key + b * key_b + g * key_g + d * key_d, mask=here)
    tl.store(keys + (base + slot) * DIM + d, row_of_key, mask=here)
    d = tl.arange(0, VALUE_PAD)
    here = arrives & (d < VALUE_DIM)
    row_of_value = tl.load(value + b * value_b + g * value_g + d * value_d, mask=here)
    tl.store(values + (base + slot) * VALUE_DIM + d, row_of_value, mask=here)
    tl.store(scores + base + slot, new, mask=arrives)
    tl.store(positions + base + slot, now, mask=arrives)
    tl.store(clock + row, now + 1)
