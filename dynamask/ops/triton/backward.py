"""Backward over the forward's lists: one pass gives dQ directly, and dK, dV, dbias by atomic sums in float32.

Where a walk over each key's queries gives the others (in deterministic mode `backward_walk.py`, `_walk_kernel` on
long rows on Hopper `backward_hopper.py`), it gives dQ alone, on Hopper in `backward_query_hopper.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.hopper.dispatch import hopper
from dynamask.ops.hopper.row_sums import RowSums
from dynamask.ops.triton.backward_walk import walk_kernel_launch
from dynamask.ops.triton.forward import LOG2E, load_row_sums, row_of
from dynamask.ops.triton.inputs import AttentionInputs
from dynamask.ops.triton.lists import block_of, build_lists_and_spans, list_of, rows_of, widest_first
from dynamask.ops.tuning import tuning

WALK_FROM = 2048
"""Queries from which on the walk is taken on Hopper: putting keys into tiles costs more than it saves on short rows."""


def backward_kernel_launch(
    inputs: AttentionInputs,
    grad_output: Tensor,
    output: Tensor,
    parts: tuple[Tensor, Tensor],
    max_live: Sequence[int],
    deterministic: bool,
    walk_from: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients to query, key, value in their dtypes and to the bias in float32; arguments contiguous.

    Args:
        output, parts: the output, and the two parts of the log-sum-exp, as the forward pass gives them.
        max_live: no query sees more keys of a head than this, for each of the G heads; empty if unknown.
        deterministic: bitwise the same on every run, in some more time.
        walk_from: queries from which on dK and dV come from a walk on Hopper; None: `WALK_FROM`.
    """
    query, key, value, expiry = inputs[:4]
    sums = prepare(grad_output, output, *parts, parted=inputs.bias is not None)
    walk = _walk_kernel(query, value, WALK_FROM if walk_from is None else walk_from)
    scatter = not deterministic and walk is None
    query_hopper = None if scatter else hopper("backward_dq", query, value)
    if query_hopper is None:
        block = block_of(inputs.ratio, rows_of(inputs.widest, query.element_size()))
    else:
        block = query_hopper.block_of(inputs.ratio, inputs.widest)
    lists, spans = build_lists_and_spans(expiry, inputs.num_queries, block, max_live)
    if deterministic:
        d_key, d_value, d_bias = walk_kernel_launch(inputs, grad_output, parts, sums.delta)
    elif walk is not None:
        d_key, d_value, d_bias = walk(inputs, grad_output, sums, spans)
    else:
        d_key, d_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
        d_bias = torch.zeros(expiry.shape, dtype=torch.float32, device=key.device)
    if query_hopper is not None:
        d_query = query_hopper.query_kernel_launch(inputs, grad_output, sums, parts, lists)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_bias
    d_query = torch.empty_like(query)
    _backward[(lists.blocks, inputs.batch * inputs.groups)](
        grad_output,
        *inputs.tensors,
        *parts,
        sums.delta,
        *lists.tensors,
        d_query,
        d_key,
        d_value,
        d_bias,
        inputs.scale,
        inputs.batch,
        inputs.heads,
        inputs.num_queries,
        inputs.length,
        lists.blocks,
        lists.entries,
        M=lists.block,
        SCATTER=scatter,
        **inputs.portable_constants,
        **tuning("backward", inputs.widest, inputs.narrow),
    )
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_bias


def prepare(grad_output: Tensor, output: Tensor, top: Tensor, rest: Tensor, parted: bool) -> RowSums:
    """What every step needs of a query row, in one pass over it.

    Args:
        grad_output, output: (B, H, Nq, Dv), contiguous.
        top, rest: (B, H, Nq) float32, two parts of the log-sum-exp.
        parted: keep them apart, as large biases need it.
    """
    value_dim = output.shape[-1]
    lse, delta = torch.empty_like(top), torch.empty_like(top)
    finite_top = torch.empty_like(top) if parted else None
    rows = 32
    _prepare[(triton.cdiv(top.numel(), rows),)](
        grad_output,
        output,
        top,
        rest,
        lse,
        lse if finite_top is None else finite_top,
        delta,
        top.numel(),
        ROWS=rows,
        VALUE_DIM=value_dim,
        VALUE_PAD=triton.next_power_of_2(value_dim),
        PARTED=parted,
        num_warps=4,
    )
    return RowSums(lse, finite_top, delta)


def walks(query: Tensor) -> bool:
    """Whether there are queries (B, H, Nq, D) enough for the walk on Hopper."""
    return query.shape[2] >= WALK_FROM


def _walk_kernel(query: Tensor, value: Tensor, walk_from: int) -> Callable[..., tuple[Tensor, ...]] | None:
    """The walk over each key's queries on Hopper; None where atomic sums in the pass for dQ give dK, dV and dbias."""
    backward_hopper = hopper("backward_dkv", query, value)
    if backward_hopper is None or query.shape[2] < walk_from:
        return None
    return backward_hopper.walk_kernel_launch


@triton.jit
def _prepare(
    grad_output,
    output,
    top,
    rest,
    lse,
    finite_top,
    delta,
    rows,
    ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PARTED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    dv = tl.arange(0, VALUE_PAD)
    place = row.to(tl.int64)[:, None] * VALUE_DIM + dv[None, :]
    mask = real[:, None] & (dv < VALUE_DIM)[None, :]
    do = tl.load(grad_output + place, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(output + place, mask=mask, other=0.0).to(tl.float32)
    row_top, row_rest = tl.load(top + row, mask=real, other=0.0), tl.load(rest + row, mask=real, other=0.0)
    dead = row_top + row_rest == float("-inf")
    tl.store(delta + row, tl.where(dead, 0.0, tl.sum(do * o, 1)), mask=real)
    if PARTED:
        tl.store(finite_top + row, tl.where(dead, 0.0, row_top), mask=real)
        tl.store(lse + row, tl.where(dead, float("inf"), row_rest * LOG2E), mask=real)
    else:
        tl.store(lse + row, tl.where(dead, float("inf"), (row_top + row_rest) * LOG2E), mask=real)


@triton.jit
def _tile(
    q,
    do,
    row_top,
    row_rest,
    row_delta,
    dq,
    position,
    j,
    listed,
    key,
    value,
    expiry,
    bias,
    d_key,
    d_value,
    d_bias,
    scale,
    d,
    dv,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCATTER: tl.constexpr,
    TEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    wide = j.to(tl.int64)
    k_place = wide[:, None] * DIM + d[None, :]
    v_place = wide[:, None] * VALUE_DIM + dv[None, :]
    k = tl.load(key + k_place, mask=(d < DIM)[None, :], other=0.0)
    v = tl.load(value + v_place, mask=(dv < VALUE_DIM)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_BIAS:
        s += tl.load(bias + wide)[None, :]
    # Differences first, as in the forward pass.
    p = tl.exp2((s - row_top[:, None]) * LOG2E - row_rest[:, None])
    if TEST:
        dies = tl.load(expiry + wide, mask=listed, other=0)
        p = tl.where((j[None, :] <= position[:, None]) & (position[:, None] < dies[None, :]), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - row_delta[:, None])
    if TEST:
        ds = tl.where((j[None, :] <= position[:, None]) & (position[:, None] < dies[None, :]), ds, 0.0)
    narrow_ds = ds.to(k.dtype)
    dq = tl.dot(narrow_ds, k, dq, input_precision=PRECISION)
    if SCATTER:
        dv_tile = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        tl.atomic_add(d_value + v_place, dv_tile, mask=listed[:, None] & (dv < VALUE_DIM)[None, :], sem="relaxed")
        dk_tile = tl.dot(tl.trans(narrow_ds), q, input_precision=PRECISION) * scale
        tl.atomic_add(d_key + k_place, dk_tile, mask=listed[:, None] & (d < DIM)[None, :], sem="relaxed")
        if HAS_BIAS:
            tl.atomic_add(d_bias + wide, tl.sum(ds, 0), mask=listed, sem="relaxed")
    return dq


@triton.jit
def _backward(
    grad_output,
    query,
    key,
    value,
    expiry,
    bias,
    top,
    rest,
    delta,
    index,
    whole,
    partial,
    table,
    d_query,
    d_key,
    d_value,
    d_bias,
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
    SCATTER: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
    row_top, row_rest = load_row_sums(top, rest, q_row, real)
    row_delta = tl.load(delta + q_row, mask=real, other=0.0)
    # The query and gradient of a row that sees nothing may be NaN, which a weight of zero would pass on.
    weighs = real & (row_rest != float("inf"))
    q_mask, do_mask = weighs[:, None] & (d < DIM)[None, :], weighs[:, None] & (dv < VALUE_DIM)[None, :]
    q = tl.load(query + q_row[:, None] * DIM + d[None, :], mask=q_mask, other=0.0)
    do = tl.load(grad_output + q_row[:, None] * VALUE_DIM + dv[None, :], mask=do_mask, other=0.0)
    base = row.to(tl.int64) * length
    key += base * DIM
    d_key += base * DIM
    value += base * VALUE_DIM
    d_value += base * VALUE_DIM
    expiry += base
    bias += base
    d_bias += base
    start, capacity = list_of(table, batch, group, block, blocks, entries, GROUPS)
    list_row = index + start
    num_whole = tl.load(whole + row * blocks + block)
    whole_tiles = num_whole // N * N
    tested = num_whole - whole_tiles + tl.load(partial + row * blocks + block)
    dq = tl.zeros([RATIO_PAD * M, DIM_PAD], tl.float32)
    n = tl.arange(0, N)
    for begin in range(0, whole_tiles, N):
        j = tl.load(list_row + begin + n)
        dq = _tile(
            q, do, row_top, row_rest, row_delta, dq, position, j, n >= 0, key, value, expiry, bias, d_key, d_value,
            d_bias, scale, d, dv, DIM, VALUE_DIM, HAS_BIAS, SCATTER, False, PRECISION,
        )  # fmt: skip
    for begin in range(0, tested, N):
        j = row_of(list_row, begin + n, whole_tiles, num_whole, tested, capacity)
        dq = _tile(
            q, do, row_top, row_rest, row_delta, dq, position, j, begin + n < tested, key, value, expiry, bias, d_key,
            d_value, d_bias, scale, d, dv, DIM, VALUE_DIM, HAS_BIAS, SCATTER, True, PRECISION,
        )  # fmt: skip
    # A key that is not finite reaches rows that do not see it: 0 · NaN is NaN. Such rows are done once more.
    again = (tl.sum((dq != dq).to(tl.int32), 1) > 0) & real
    real &= again == 0
    q_mask = real[:, None] & (d < DIM)[None, :]
    tl.store(d_query + q_row[:, None] * DIM + d[None, :], (dq * scale).to(d_query.dtype.element_ty), mask=q_mask)
    if tl.sum(again.to(tl.int32), 0) > 0:
        for r in range(0, RATIO_PAD * M):
            if tl.sum((again & (tile == r)).to(tl.int32), 0) > 0:
                at = tl.sum(tl.where(tile == r, position, 0), 0)
                own = tl.sum(tl.where(tile == r, q_row, 0), 0)
                one_q = tl.load(query + own * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
                one_do = tl.load(grad_output + own * VALUE_DIM + dv, mask=dv < VALUE_DIM, other=0.0).to(tl.float32)
                one_top, one_rest = tl.load(top + own), tl.load(rest + own) * LOG2E
                one_delta = tl.load(delta + own)
                one = tl.zeros([DIM_PAD], tl.float32)
                for begin in range(0, whole_tiles + tested, 16):
                    entry = begin + tl.arange(0, 16)
                    listed = entry < whole_tiles + tested
                    slot = tl.where(entry < num_whole, entry, capacity - 1 - (entry - num_whole))
                    j = tl.load(list_row + slot, mask=listed, other=0)
                    seen = listed & (j <= at) & (at < tl.load(expiry + j))
                    wide = j.to(tl.int64)[:, None]
                    k_mask, v_mask = seen[:, None] & (d < DIM)[None, :], seen[:, None] & (dv < VALUE_DIM)[None, :]
                    k = tl.load(key + wide * DIM + d[None, :], mask=k_mask, other=0.0).to(tl.float32)
                    v = tl.load(value + wide * VALUE_DIM + dv[None, :], mask=v_mask, other=0.0).to(tl.float32)
                    s = tl.sum(one_q[None, :] * k, 1) * scale
                    if HAS_BIAS:
                        s += tl.load(bias + j, mask=seen, other=0.0)
                    p = tl.exp2((s - one_top) * LOG2E - one_rest)
                    ds = tl.where(seen, p * (tl.sum(one_do[None, :] * v, 1) - one_delta), 0.0)
                    one += tl.sum(ds[:, None] * k, 0)
                tl.store(d_query + own * DIM + d, (one * scale).to(d_query.dtype.element_ty), mask=d < DIM)
