"""Forward: a tile of R·M query rows (all heads of a key/value head) against the gathered keys of its block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.triton.inputs import AttentionInputs
from dynamask.ops.triton.lists import KeyLists, list_of, widest_first
from dynamask.ops.tuning import tuning

LOG2E = tl.constexpr(1.4426950408889634)


def forward_kernel_launch(inputs: AttentionInputs, lists: KeyLists) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the output (B, H, Nq, Dv), and float32 (B, H, Nq) each query's largest logit and the log of the sum of
    exp(logit - largest)."""
    results = empty_results(inputs)
    _forward[(lists.blocks, inputs.batch * inputs.groups)](
        *inputs.tensors,
        *lists.tensors,
        *results,
        inputs.scale,
        inputs.batch,
        inputs.heads,
        inputs.num_queries,
        inputs.length,
        lists.blocks,
        lists.entries,
        M=lists.block,
        **inputs.portable_constants,
        **tuning("forward", inputs.widest, inputs.narrow),
    )
    return results


def empty_results(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the output, in the query's dtype, and the two parts of the log-sum-exp in float32."""
    output = inputs.query.new_empty(*inputs.query.shape[:3], inputs.value_dim)
    largest, rest = (torch.empty(output.shape[:3], dtype=torch.float32, device=output.device) for _ in range(2))
    return output, largest, rest


@triton.jit
def row_of(list_row, place, whole_tiles, whole, total, capacity):
    """List entry at `place` of the tested part: what the last whole tile left over, then the partial keys."""
    left = whole - whole_tiles
    return tl.load(
        list_row + tl.where(place < left, whole_tiles + place, capacity - 1 - (place - left)),
        mask=place < total,
        other=0,
    )


@triton.jit
def load_row_sums(top, rest, q_row, real):
    """Of each query, what its logits count from and the rest of the log-sum-exp to base 2.

    A row that sees nothing, or of no query, has the rest +inf: it weighs nothing, exp2(s - inf) = 0.
    """
    row_top = tl.load(top + q_row, mask=real, other=float("-inf"))
    row_rest = tl.load(rest + q_row, mask=real, other=0.0)
    dead = row_top + row_rest == float("-inf")
    return tl.where(dead, 0.0, row_top), tl.where(dead, float("inf"), row_rest * LOG2E)


@triton.jit
def attend_row(
    q,
    j,
    seen,
    key,
    value,
    bias,
    d,
    dv,
    scale,
    top,
    total,
    mixed,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One query over a few keys `j` of its row. Keys that it has not `seen` are not read, whatever they hold."""
    wide = j.to(tl.int64)
    k = tl.load(key + wide[:, None] * DIM + d[None, :], mask=seen[:, None] & (d < DIM)[None, :], other=0.0)
    v = tl.load(
        value + wide[:, None] * VALUE_DIM + dv[None, :], mask=seen[:, None] & (dv < VALUE_DIM)[None, :], other=0.0
    )
    s = tl.sum(q.to(tl.float32)[None, :] * k.to(tl.float32), 1) * scale
    if HAS_BIAS:
        s += tl.load(bias + wide, mask=seen, other=0.0)
    s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2((s - base) * LOG2E)
    shrink = tl.exp2((top - base) * LOG2E)
    return new_top, total * shrink + tl.sum(p, 0), mixed * shrink + tl.sum(p[:, None] * v.to(tl.float32), 0)


@triton.jit
def _forward(
    query,
    key,
    value,
    expiry,
    bias,
    index,
    whole,
    partial,
    table,
    output,
    largest,
    rest,
    scale,
    batch_size,
    heads,
    num_queries,
    length,
    blocks,
    entries,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    RATIO_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The widest head's last blocks have the longest lists; starting with them leaves no straggler at the end.
    block = blocks - 1 - tl.program_id(0)
    batch, group = widest_first(table, tl.program_id(1), batch_size, GROUPS)
    row = batch * GROUPS + group
    tile = tl.arange(0, RATIO_PAD * M)
    head, place = tile // M, block * M + tile % M
    real = (head < RATIO) & (place < num_queries)
    position = length - num_queries + place
    q_row = (batch * heads + group * RATIO + head).to(tl.int64) * num_queries + place
    d = tl.arange(0, DIM_PAD)
    dv = tl.arange(0, VALUE_PAD)
    q = tl.load(query + q_row[:, None] * DIM + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    key += row.to(tl.int64) * length * DIM
    value += row.to(tl.int64) * length * VALUE_DIM
    expiry += row.to(tl.int64) * length
    bias += row.to(tl.int64) * length
    start, capacity = list_of(table, batch, group, block, blocks, entries, GROUPS)
    list_row = index + start
    num_whole = tl.load(whole + row * blocks + block)
    num_partial = tl.load(partial + row * blocks + block)
    whole_tiles = num_whole // N * N

    top = tl.full([RATIO_PAD * M], float("-inf"), tl.float32)
    total = tl.zeros([RATIO_PAD * M], tl.float32)
    mixed = tl.zeros([RATIO_PAD * M, VALUE_PAD], tl.float32)
    n = tl.arange(0, N)
    for begin in range(0, whole_tiles, N):
        j = tl.load(list_row + begin + n).to(tl.int64)
        k = tl.load(key + j[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
        v = tl.load(value + j[:, None] * VALUE_DIM + dv[None, :], mask=(dv < VALUE_DIM)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_BIAS:
            s += tl.load(bias + j)[None, :]
        new_top = tl.maximum(top, tl.max(s, 1))
        base = new_top
        if HAS_BIAS:
            # A row whose biases so far are -inf has top -inf; -inf - -inf would be NaN.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        # Differences first: a large bias times log2(e) may be infinite.
        p = tl.exp2((s - base[:, None]) * LOG2E)
        shrink = tl.exp2((top - base) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(p.to(v.dtype), v, mixed, input_precision=PRECISION)
        top = new_top

    tested = num_whole - whole_tiles + num_partial
    for begin in range(0, tested, N):
        listed = begin + n < tested
        j = row_of(list_row, begin + n, whole_tiles, num_whole, tested, capacity)
        dies = tl.load(expiry + j, mask=listed, other=0)
        seen = (j[None, :] <= position[:, None]) & (position[:, None] < dies[None, :])
        j = j.to(tl.int64)
        k = tl.load(key + j[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
        v = tl.load(value + j[:, None] * VALUE_DIM + dv[None, :], mask=(dv < VALUE_DIM)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_BIAS:
            s += tl.load(bias + j)[None, :]
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet has top -inf; -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2((s - base[:, None]) * LOG2E)
        shrink = tl.exp2((top - base) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(p.to(v.dtype), v, mixed, input_precision=PRECISION)
        top = new_top

    # A value that is not finite reaches rows that do not see it: 0 · NaN is NaN. Such rows are done once more.
    again = (tl.sum((mixed != mixed).to(tl.int32), 1) > 0) & real
    real &= again == 0
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        output + q_row[:, None] * VALUE_DIM + dv[None, :],
        mixed.to(output.dtype.element_ty),
        mask=real[:, None] & (dv < VALUE_DIM)[None, :],
    )
    tl.store(largest + q_row, top, mask=real)
    tl.store(rest + q_row, tl.log(total), mask=real)
    if tl.sum(again.to(tl.int32), 0) > 0:
        for r in range(0, RATIO_PAD * M):
            if tl.sum((again & (tile == r)).to(tl.int32), 0) > 0:
                at = tl.sum(tl.where(tile == r, position, 0), 0)
                own = tl.sum(tl.where(tile == r, q_row, 0), 0)
                one_q = tl.load(query + own * DIM + d, mask=d < DIM, other=0.0)
                one_top, one_total = float("-inf"), 0.0
                one = tl.zeros([VALUE_PAD], tl.float32)
                for begin in range(0, num_whole + num_partial, 16):
                    entry = begin + tl.arange(0, 16)
                    listed = entry < num_whole + num_partial
                    slot = tl.where(entry < num_whole, entry, capacity - 1 - (entry - num_whole))
                    j = tl.load(list_row + slot, mask=listed, other=0)
                    seen = listed & (j <= at) & (at < tl.load(expiry + j))
                    one_top, one_total, one = attend_row(
                        one_q,
                        j,
                        seen,
                        key,
                        value,
                        bias,
                        d,
                        dv,
                        scale,
                        one_top,
                        one_total,
                        one,
                        DIM,
                        VALUE_DIM,
                        HAS_BIAS,
                    )
                one = one / tl.where(one_total == 0.0, 1.0, one_total)
                tl.store(output + own * VALUE_DIM + dv, one.to(output.dtype.element_ty), mask=dv < VALUE_DIM)
                tl.store(largest + own, one_top)
                tl.store(rest + own, tl.log(one_total))
