"""A few queries over many keys: the keys are split among programs, and the parts merged by their log-sum-exps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.triton.forward import LOG2E, attend_row, empty_results
from dynamask.ops.triton.inputs import AttentionInputs

MAX_QUERIES = 8
_SPLIT = 256
"""Keys per program at least: fewer and the merge costs more than the reading."""


def decode(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `forward.forward_kernel_launch` does, for at most MAX_QUERIES queries.

    Every key is read once, in order, and tested: from a bounded cache nearly all of them are seen.
    """
    batch, heads, num_queries, length = inputs.batch, inputs.heads, inputs.num_queries, inputs.length
    # Enough programs to fill a large GPU, whatever the batch.
    splits = max(1, min(triton.cdiv(length, _SPLIT), triton.cdiv(528, batch * inputs.groups)))
    part = triton.cdiv(triton.cdiv(length, splits), 64) * 64
    splits = max(1, triton.cdiv(length, part))
    outputs = torch.empty(
        splits, batch, heads, num_queries, inputs.value_dim, dtype=torch.float32, device=inputs.query.device
    )
    tops, totals = (torch.empty(outputs.shape[:4], dtype=torch.float32, device=outputs.device) for _ in range(2))
    constants = inputs.portable_constants
    for unused in ("GROUPS", "RATIO_PAD"):
        del constants[unused]
    _decode[(splits, batch * inputs.groups)](
        *inputs.tensors,
        outputs,
        tops,
        totals,
        inputs.scale,
        batch * heads * num_queries,
        length,
        part,
        NUM_QUERIES=num_queries,
        ROWS=max(16, triton.next_power_of_2(inputs.ratio * num_queries)),
        N=64,
        **constants,
        num_warps=4,
        num_stages=2,
    )
    results = empty_results(inputs)
    _merge[(batch * heads * num_queries,)](
        outputs,
        tops,
        totals,
        *results,
        splits,
        SPLITS_PAD=triton.next_power_of_2(splits),
        VALUE_DIM=inputs.value_dim,
        VALUE_PAD=constants["VALUE_PAD"],
        num_warps=4,
    )
    return results


@triton.jit
def _decode(
    query,
    key,
    value,
    expiry,
    bias,
    outputs,
    tops,
    totals,
    scale,
    total_rows,
    length,
    part,
    NUM_QUERIES: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(0)
    row = tl.program_id(1)
    tile = tl.arange(0, ROWS)
    real = tile < RATIO * NUM_QUERIES
    position = length - NUM_QUERIES + tile % NUM_QUERIES
    # Rows of one key/value head lie together: (batch, group, head in group, query).
    q_row = row.to(tl.int64) * RATIO * NUM_QUERIES + tile
    d = tl.arange(0, DIM_PAD)
    dv = tl.arange(0, VALUE_PAD)
    q = tl.load(query + q_row[:, None] * DIM + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    base = row.to(tl.int64) * length
    stop = tl.minimum((split + 1) * part, length)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for begin in range(split * part, stop, N):
        j = begin + tl.arange(0, N)
        there = j < stop
        dies = tl.load(expiry + base + j, mask=there, other=0)
        place = base + j
        k = tl.load(key + place[:, None] * DIM + d[None, :], mask=there[:, None] & (d < DIM)[None, :], other=0.0)
        v = tl.load(
            value + place[:, None] * VALUE_DIM + dv[None, :],
            mask=there[:, None] & (dv < VALUE_DIM)[None, :],
            other=0.0,
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_BIAS:
            s += tl.load(bias + place, mask=there, other=0.0)[None, :]
        s = tl.where((j[None, :] <= position[:, None]) & (position[:, None] < dies[None, :]), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        # Differences first: a large bias times log2(e) may be infinite.
        p = tl.exp2((s - shift[:, None]) * LOG2E)
        shrink = tl.exp2((top - shift) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
        top = new_top
    out_row = split.to(tl.int64) * total_rows + q_row
    # A value that is not finite reaches queries that do not see it: 0 · NaN is NaN. Such rows are done once more.
    again = (tl.sum((mixed != mixed).to(tl.int32), 1) > 0) & real
    real &= again == 0
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        outputs + out_row[:, None] * VALUE_DIM + dv[None, :],
        mixed,
        mask=real[:, None] & (dv < VALUE_DIM)[None, :],
    )
    tl.store(tops + out_row, top, mask=real)
    tl.store(totals + out_row, total, mask=real)
    if tl.sum(again.to(tl.int32), 0) > 0:
        for r in range(0, RATIO * NUM_QUERIES):
            if tl.sum((again & (tile == r)).to(tl.int32), 0) > 0:
                at = length - NUM_QUERIES + r % NUM_QUERIES
                first = row.to(tl.int64) * RATIO * NUM_QUERIES
                one_q = tl.load(query + (first + r) * DIM + d, mask=d < DIM, other=0.0)
                one_top, one_total = float("-inf"), 0.0
                one = tl.zeros([VALUE_PAD], tl.float32)
                for begin in range(split * part, stop, 16):
                    j = begin + tl.arange(0, 16)
                    seen = (j < stop) & (j <= at)
                    seen = seen & (at < tl.load(expiry + base + j, mask=seen, other=0))
                    one_top, one_total, one = attend_row(
                        one_q, base + j, seen, key, value, bias, d, dv, scale, one_top, one_total, one, DIM,
                        VALUE_DIM, HAS_BIAS,
                    )  # fmt: skip
                one = one / tl.where(one_total == 0.0, 1.0, one_total)
                own = split.to(tl.int64) * total_rows + first + r
                tl.store(outputs + own * VALUE_DIM + dv, one, mask=dv < VALUE_DIM)
                tl.store(tops + own, one_top)
                tl.store(totals + own, one_total)


@triton.jit
def _merge(
    outputs,
    tops,
    totals,
    output,
    largest,
    rest,
    splits,
    SPLITS_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    s = tl.arange(0, SPLITS_PAD)
    dv = tl.arange(0, VALUE_PAD)
    there = s < splits
    top = tl.load(tops + s * rows + row, mask=there, other=float("-inf"))
    highest = tl.max(top, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2((top - shift) * LOG2E) * tl.load(totals + s * rows + row, mask=there, other=0.0)
    total = tl.sum(weight, 0)
    tile = tl.load(
        outputs + (s[:, None] * rows + row) * VALUE_DIM + dv[None, :],
        mask=(s < splits)[:, None] & (dv < VALUE_DIM)[None, :],
        other=0.0,
    )
    mixed = tl.sum(tile * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * VALUE_DIM + dv, mixed.to(output.dtype.element_ty), mask=dv < VALUE_DIM)
    tl.store(largest + row, highest)
    tl.store(rest + row, tl.log(total))
