"""dQ on Hopper, warp-specialised in Gluon: the pass of `backward.py` over the forward's lists, gathered as it gathers.

The producer is the forward's. A consumer holds 64 rows of queries and output gradients in shared memory and its part of
dQ in registers. The product that adds one tile to dQ runs while the next tile's scores are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dynamask.ops.hopper.producer import heads_of_a_consumer, produce, store_rows, take
from dynamask.ops.hopper.redo import redo_dq, tickets_and_flags
from dynamask.ops.hopper.row_sums import RowSums
from dynamask.ops.triton.inputs import AttentionInputs
from dynamask.ops.triton.lists import KeyLists
from dynamask.ops.tuning import tuning

_LOG2E = gl.constexpr(1.4426950408889634)

_ROWS = 64
"""Rows of a consumer's tile, the least that Hopper's matrix instruction takes."""

_CONSUMERS = 2
"""Consumers of a program; a third would leave too few registers for two tiles of scores."""

APART = 64
"""Widest head up to which three consumers take a head each where a tile of all heads would have empty rows."""

WHOLE_ROWS = True
"""Write dQ in whole rows, by way of the shared memory in which the queries were."""


def query_kernel_launch(
    inputs: AttentionInputs, grad_output: Tensor, sums: RowSums, parts: tuple[Tensor, Tensor], lists: KeyLists
) -> Tensor:
    """Compute dQ in the query's dtype, on inputs that `dispatch.hopper` takes.

    Args:
        grad_output: (B, H, Nq, Dv), contiguous.
        sums: as `backward.prepare` gives them.
        parts: of the log-sum-exp, as the forward pass gives them.
        lists: of blocks of `block_of` queries.
    """
    d_query = torch.empty_like(inputs.query)
    consumers, heads = _consumers_and_heads(inputs.ratio, inputs.widest)
    items = lists.blocks * inputs.batch * inputs.groups
    programs = min(items, torch.cuda.get_device_properties(d_query.device).multi_processor_count)
    tickets, flags = tickets_and_flags(items * consumers, d_query.device)
    _backward_query[(programs,)](
        grad_output,
        *inputs.tensors,
        sums.lse if sums.top is None else sums.top,
        sums.lse,
        sums.delta,
        *lists.tensors,
        tickets,
        flags,
        d_query,
        inputs.scale * (_LOG2E.value if inputs.bias is None else 1.0),
        inputs.scale,
        items,
        inputs.batch,
        inputs.heads,
        inputs.num_queries,
        inputs.length,
        lists.blocks,
        lists.entries,
        ROWS=_ROWS,
        SLOTS=4,
        CONSUMERS=consumers,
        WHOLE_ROWS=WHOLE_ROWS,
        **{**inputs.constants, "RATIO_PAD": heads},
        num_warps=4,
        **tuning("Hopper dQ" if consumers == _CONSUMERS else "Hopper dQ, heads apart", inputs.widest),
    )
    redo_dq(inputs, grad_output, parts, sums.delta, lists, flags, consumers, heads, d_query)
    return d_query


def block_of(ratio: int, widest: int) -> int:
    """Queries per block for H / G query heads, the widest of so many numbers, on one key/value head."""
    consumers, heads = _consumers_and_heads(ratio, widest)
    return (consumers if heads >= ratio else 1) * _ROWS // heads


def _consumers_and_heads(ratio: int, widest: int) -> tuple[int, int]:
    """Consumers of a program, and query heads that each has rows for."""
    apart = heads_of_a_consumer(ratio, 3) if widest <= APART else 0
    return (3, apart) if apart else (_CONSUMERS, next_power_of_2(ratio))


@gluon.jit
def _weights(s, row_top, row_lse, biases, deaths, places, position, stage, tested, factor, HAS_BIAS: gl.constexpr):
    """Attention weights of one tile of scores, from the forward's log-sum-exp."""
    columns: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    s = s * factor
    if HAS_BIAS:
        # Differences first, as in the forward pass.
        s = (s + biases.index(stage).load(columns)[None, :] - row_top[:, None]) * _LOG2E
    p = gl.exp2(s - row_lse[:, None])
    if tested:
        born = places.index(stage).load(columns)
        dies = deaths.index(stage).load(columns)
        p = gl.where((born[None, :] <= position[:, None]) & (position[:, None] < dies[None, :]), p, 0.0)
    return p


@gluon.jit
def _consume(
    top,
    lse,
    delta,
    flags,
    d_query,
    heads,
    num_queries,
    length,
    blocks,
    factor,
    scale,
    all_queries,
    all_grads,
    keys,
    values,
    biases,
    deaths,
    places,
    work,
    told,
    taken,
    key_full,
    value_full,
    empty,
    GROUPS: gl.constexpr,
    RATIO: gl.constexpr,
    RATIO_PAD: gl.constexpr,
    DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    ROWS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WHOLE_ROWS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """dQ of the query heads of `ROWS / RATIO_PAD` queries, this consumer's part of the block."""
    dtype: gl.constexpr = d_query.dtype.element_ty
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    QUERIES: gl.constexpr = ROWS // RATIO_PAD
    # Where RATIO_PAD is below RATIO, the consumers share the heads of a block, else its queries.
    M: gl.constexpr = QUERIES * (1 if RATIO > RATIO_PAD else CONSUMERS)
    PLACES_ON: gl.constexpr = 0 if RATIO > RATIO_PAD else QUERIES
    HEADS_ON: gl.constexpr = RATIO_PAD if RATIO > RATIO_PAD else 0
    s_tile = gl.arange(0, ROWS, s_rows)
    d_tile = gl.arange(0, ROWS, gl.SliceLayout(1, d_layout))
    d_columns = gl.arange(0, DIM, gl.SliceLayout(0, d_layout))
    nothing = gl.full([ROWS, N], 0.0, gl.float32, s_layout)
    step = 0
    turn = 0
    row, block, num_whole, listed = take(work, told, taken, turn, SLOTS)
    while row >= 0:
        first_head = row // GROUPS * heads + row % GROUPS * RATIO + CONSUMER * HEADS_ON
        first_place = block * M + CONSUMER * PLACES_ON
        buffer = turn % 2 * CONSUMERS + CONSUMER
        queries, grads = all_queries.index(buffer), all_grads.index(buffer)
        s_place = first_place + s_tile % QUERIES
        s_row = (first_head + s_tile // QUERIES).to(gl.int64) * num_queries + s_place
        s_real = (s_tile // QUERIES < RATIO) & (s_place < num_queries)
        # A row of no query weighs nothing: exp2(s - inf) = 0.
        row_lse = gl.load(lse + s_row, mask=s_real, other=float("inf"))
        row_top = row_lse
        if HAS_BIAS:
            row_top = gl.load(top + s_row, mask=s_real, other=0.0)
        row_delta = gl.load(delta + s_row, mask=s_real, other=0.0)
        position = length - num_queries + s_place
        mixed = gl.full([ROWS, DIM], 0.0, gl.float32, d_layout)
        if listed > 0:
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(key_full.index(stage), phase)
            mbarrier.wait(value_full.index(stage), phase)
            fence_async_shared()
            s = warpgroup_mma(queries, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            dp = warpgroup_mma(grads, values.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
            p = _weights(s, row_top, row_lse, biases, deaths, places, position, stage, num_whole < N, factor, HAS_BIAS)
            dp = warpgroup_mma_wait(num_outstanding=0, deps=(dp,))
            # One arrival a tile, for its values and for the keys of the tile before, of an earlier item if need be.
            mbarrier.arrive(empty.index(stage), count=1)
            slopes = gl.convert_layout((p * (dp - row_delta[:, None])).to(dtype), p_layout)
            for begin in range(N, listed, N):
                mixed = warpgroup_mma(slopes, keys.index(stage), mixed, is_async=True)
                following = (step + 1) % STAGES
                phase = ((step + 1) // STAGES) & 1
                mbarrier.wait(key_full.index(following), phase)
                fence_async_shared()
                s = warpgroup_mma(queries, keys.index(following).permute((1, 0)), nothing, use_acc=False, is_async=True)
                mbarrier.wait(value_full.index(following), phase)
                fence_async_shared()
                dp = warpgroup_mma(
                    grads, values.index(following).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
                p = _weights(
                    s,
                    row_top,
                    row_lse,
                    biases,
                    deaths,
                    places,
                    position,
                    following,
                    begin + N > num_whole,
                    factor,
                    HAS_BIAS,
                )
                dp, mixed = warpgroup_mma_wait(num_outstanding=0, deps=(dp, mixed))
                mbarrier.arrive(empty.index(following), count=1)
                slopes = gl.convert_layout((p * (dp - row_delta[:, None])).to(dtype), p_layout)
                step += 1
                stage = following
            mixed = warpgroup_mma(slopes, keys.index(stage), mixed, is_async=True)
            mixed = warpgroup_mma_wait(num_outstanding=0, deps=(mixed,))
            step += 1
        d_place = first_place + d_tile % QUERIES
        d_row = (first_head + d_tile // QUERIES).to(gl.int64) * num_queries + d_place
        d_real = (d_tile // QUERIES < RATIO) & (d_place < num_queries)
        result = (mixed * scale).to(dtype)
        if WHOLE_ROWS:
            store_rows(d_query, result, queries, first_head, first_place, num_queries, DIM, ROWS, QUERIES, RATIO)
        else:
            gl.store(d_query + (d_row * DIM)[:, None] + d_columns[None, :], result, mask=d_real[:, None])
        # A key that is not finite reached rows that do not see it; `redo_dq` looks at the flag.
        checksum = gl.sum(mixed, 1)
        d_rows: gl.constexpr = gl.SliceLayout(1, d_layout)
        flag = gl.zeros([ROWS], gl.int32, d_rows) + ((row * blocks + block) * CONSUMERS + CONSUMER)
        gl.store(flags + flag, gl.full([ROWS], 1, gl.int32, d_rows), mask=checksum != checksum)
        turn += 1
        row, block, num_whole, listed = take(work, told, taken, turn, SLOTS)


@gluon.jit
def _backward_query(
    grad_output,
    query,
    key,
    value,
    expiry,
    bias,
    top,
    lse,
    delta,
    index,
    whole,
    partial,
    table,
    tickets,
    flags,
    d_query,
    factor,
    scale,
    items,
    batch_size,
    heads,
    num_queries,
    length,
    blocks,
    entries,
    GROUPS: gl.constexpr,
    RATIO: gl.constexpr,
    RATIO_PAD: gl.constexpr,
    DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    ROWS: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WHOLE_ROWS: gl.constexpr,
):
    dtype: gl.constexpr = query.dtype.element_ty
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
    g_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, VALUE_DIM], dtype)
    k_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, DIM], dtype)
    v_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, VALUE_DIM], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, ROWS, DIM], q_shared)
    grads = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, ROWS, VALUE_DIM], g_shared)
    keys = gl.allocate_shared_memory(dtype, [STAGES, N, DIM], k_shared)
    values = gl.allocate_shared_memory(dtype, [STAGES, N, VALUE_DIM], v_shared)
    biases = gl.allocate_shared_memory(gl.float32, [STAGES, N], flat)
    deaths = gl.allocate_shared_memory(gl.int32, [STAGES, N], flat)
    places = gl.allocate_shared_memory(gl.int32, [STAGES, N], flat)
    work = gl.allocate_shared_memory(gl.int32, [SLOTS, 4], flat)
    told = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for stage in gl.static_range(STAGES):
        # See `forward_hopper._forward`.
        mbarrier.init(key_full.index(stage), count=128)
        mbarrier.init(value_full.index(stage), count=128)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(taken.index(slot), count=CONSUMERS)
    fence_async_shared()
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        top, lse, delta, flags, d_query, heads, num_queries, length, blocks, factor, scale, queries,
                        grads, keys, values, biases, deaths, places, work, told, taken, key_full, value_full, empty,
                        GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, HAS_BIAS,
                        WHOLE_ROWS, 0,
                    ),
                ),
                (
                    _consume,
                    (
                        top, lse, delta, flags, d_query, heads, num_queries, length, blocks, factor, scale, queries,
                        grads, keys, values, biases, deaths, places, work, told, taken, key_full, value_full, empty,
                        GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, HAS_BIAS,
                        WHOLE_ROWS, 1,
                    ),
                ),
                (
                    _consume,
                    (
                        top, lse, delta, flags, d_query, heads, num_queries, length, blocks, factor, scale, queries,
                        grads, keys, values, biases, deaths, places, work, told, taken, key_full, value_full, empty,
                        GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, HAS_BIAS,
                        WHOLE_ROWS, 2,
                    ),
                ),
                (
                    produce,
                    (
                        query, grad_output, key, value, expiry, bias, index, whole, partial, table, tickets, items,
                        batch_size, heads, num_queries, length, blocks, entries, queries, grads, keys, values, biases,
                        deaths, places, work, told, taken, key_full, value_full, empty,
                        1, 0, GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, True,
                        HAS_BIAS,
                    ),
                ),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        top, lse, delta, flags, d_query, heads, num_queries, length, blocks, factor, scale, queries,
                        grads, keys, values, biases, deaths, places, work, told, taken, key_full, value_full, empty,
                        GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, HAS_BIAS,
                        WHOLE_ROWS, 0,
                    ),
                ),
                (
                    _consume,
                    (
                        top, lse, delta, flags, d_query, heads, num_queries, length, blocks, factor, scale, queries,
                        grads, keys, values, biases, deaths, places, work, told, taken, key_full, value_full, empty,
                        GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, HAS_BIAS,
                        WHOLE_ROWS, 1,
                    ),
                ),
                (
                    produce,
                    (
                        query, grad_output, key, value, expiry, bias, index, whole, partial, table, tickets, items,
                        batch_size, heads, num_queries, length, blocks, entries, queries, grads, keys, values, biases,
                        deaths, places, work, told, taken, key_full, value_full, empty,
                        1, 0, GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, True,
                        HAS_BIAS,
                    ),
                ),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
