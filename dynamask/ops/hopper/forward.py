"""Forward for Hopper, warp-specialised in Gluon: the arithmetic of `forward.py`, with gathering and multiplying apart.

One group of four warps (the producer) copies the listed keys and values to shared memory; three others (the consumers)
multiply 64 rows of the query tile each. A consumer starts the product of one tile's weights and values before it takes
the softmax of the next, so the tensor cores work through the exponentials, and the three fill each other's gaps. The
programs are persistent: the producer is already gathering for the next tile while the consumers write the last.
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

from dynamask.ops.hopper.producer import by_lane, heads_of_a_consumer, hold, produce, store_rows, take
from dynamask.ops.hopper.redo import redo_forward, tickets_and_flags
from dynamask.ops.triton.forward import empty_results
from dynamask.ops.triton.inputs import AttentionInputs
from dynamask.ops.triton.lists import KeyLists
from dynamask.ops.tuning import tuning

_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)

_ROWS = 64
"""Rows of a consumer's tile, the least that Hopper's matrix instruction takes."""

_CONSUMERS = 3
"""Consumers of a program. With two, keys are read from L2 half as often again; four leave too few registers."""

WHOLE_ROWS = True
"""Write the output in whole rows, by way of the shared memory in which the queries were."""


def forward_kernel_launch(inputs: AttentionInputs, lists: KeyLists) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `dynamask.ops.triton.forward.forward_kernel_launch` does, on inputs that `dispatch.hopper` takes."""
    results = empty_results(inputs)
    device = inputs.query.device
    items = lists.blocks * inputs.batch * inputs.groups
    programs = min(items, torch.cuda.get_device_properties(device).multi_processor_count)
    tickets, flags = tickets_and_flags(items * _CONSUMERS, device)
    biased = inputs.bias is not None
    _forward[(programs,)](
        *inputs.tensors,
        *lists.tensors,
        tickets,
        flags,
        *results,
        inputs.scale * (1.0 if biased else _LOG2E.value),
        items,
        inputs.batch,
        inputs.heads,
        inputs.num_queries,
        inputs.length,
        lists.blocks,
        lists.entries,
        ROWS=_ROWS,
        SLOTS=4,
        CONSUMERS=_CONSUMERS,
        WHOLE_ROWS=WHOLE_ROWS and inputs.dim == inputs.value_dim,
        **{**inputs.constants, "RATIO_PAD": _heads(inputs.ratio)},
        num_warps=4,
        **tuning("Hopper forward with a bias" if biased else "Hopper forward", inputs.widest),
    )
    redo_forward(inputs, lists, flags, _CONSUMERS, _heads(inputs.ratio), results)
    return results


def block_of(ratio: int) -> int:
    """Queries per block for H / G query heads on one key/value head."""
    return (_CONSUMERS if _heads(ratio) >= ratio else 1) * _ROWS // _heads(ratio)


def _heads(ratio: int) -> int:
    """Query heads that a consumer has rows for."""
    return heads_of_a_consumer(ratio, _CONSUMERS) or next_power_of_2(ratio)


@gluon.jit
def _softmax(s, top, biases, deaths, places, position, stage, tested, factor, HAS_BIAS: gl.constexpr):
    """Weights of one tile of scores, by how much to shrink what was summed before, and the new running maximum."""
    columns: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    s = s * factor
    if HAS_BIAS:
        # Not to base 2 yet: a large bias times log2(e) may be infinite.
        s += biases.index(stage).load(columns)[None, :]
    if tested:
        born = places.index(stage).load(columns)
        dies = deaths.index(stage).load(columns)
        seen = (born[None, :] <= position[:, None]) & (position[:, None] < dies[None, :])
        s = gl.where(seen, s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1))
    # A row that has seen nothing yet has top -inf; -inf - -inf would be NaN.
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    if HAS_BIAS:
        return gl.exp2((s - base[:, None]) * _LOG2E), gl.exp2((top - base) * _LOG2E), new_top
    else:
        return gl.exp2(s - base[:, None]), gl.exp2(top - base), new_top


@gluon.jit
def _consume(
    output,
    largest,
    rest,
    flags,
    heads,
    num_queries,
    length,
    blocks,
    factor,
    all_queries,
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
    """The query heads of `ROWS / RATIO_PAD` queries, this consumer's part of the block, against every stage."""
    dtype: gl.constexpr = output.dtype.element_ty
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, VALUE_DIM, 16]
    )
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    QUERIES: gl.constexpr = ROWS // RATIO_PAD
    # Where RATIO_PAD is below RATIO, the consumers share the heads of a block, else its queries.
    M: gl.constexpr = QUERIES * (1 if RATIO > RATIO_PAD else CONSUMERS)
    PLACES_ON: gl.constexpr = 0 if RATIO > RATIO_PAD else QUERIES
    HEADS_ON: gl.constexpr = RATIO_PAD if RATIO > RATIO_PAD else 0
    s_tile = gl.arange(0, ROWS, s_rows)
    o_tile = gl.arange(0, ROWS, o_rows)
    o_columns = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, o_layout))
    nothing = gl.full([ROWS, N], 0.0, gl.float32, s_layout)
    step = 0
    turn = 0
    row, block, num_whole, listed = take(work, told, taken, turn, SLOTS)
    while row >= 0:
        first_head = row // GROUPS * heads + row % GROUPS * RATIO + CONSUMER * HEADS_ON
        first_place = block * M + CONSUMER * PLACES_ON
        queries = all_queries.index(turn % 2 * CONSUMERS + CONSUMER)
        position = length - num_queries + first_place + s_tile % QUERIES
        top = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
        total = by_lane(nothing)
        lane_rows: gl.constexpr = gl.SliceLayout(1, total.type.layout)
        mixed = gl.full([ROWS, VALUE_DIM], 0.0, gl.float32, o_layout)
        if listed > 0:
            stage = step % STAGES
            mbarrier.wait(key_full.index(stage), (step // STAGES) & 1)
            fence_async_shared()
            s = warpgroup_mma(queries, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
            p, shrink, top = _softmax(s, top, biases, deaths, places, position, stage, num_whole < N, factor, HAS_BIAS)
            # One arrival a tile, for its keys and for the values of the tile before, of an earlier item if need be.
            mbarrier.arrive(empty.index(stage), count=1)
            total += by_lane(p)
            weights = gl.convert_layout(p.to(dtype), p_layout)
            for begin in range(N, listed, N):
                following = (step + 1) % STAGES
                # A barrier of the producer completes when all its earlier copies have: the values of the stage
                # before are there too.
                mbarrier.wait(key_full.index(following), ((step + 1) // STAGES) & 1)
                fence_async_shared()
                s = warpgroup_mma(queries, keys.index(following).permute((1, 0)), nothing, use_acc=False, is_async=True)
                stage = step % STAGES
                mixed = warpgroup_mma(weights, values.index(stage), mixed, is_async=True)
                s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
                p, shrink, top = _softmax(
                    s, top, biases, deaths, places, position, following, begin + N > num_whole, factor, HAS_BIAS
                )
                sums = hold(by_lane(p))
                mixed = warpgroup_mma_wait(num_outstanding=0, deps=(mixed,))
                mbarrier.arrive(empty.index(following), count=1)
                total = total * gl.convert_layout(shrink, lane_rows)[:, None] + sums
                mixed = mixed * gl.convert_layout(shrink, o_rows)[:, None]
                weights = gl.convert_layout(p.to(dtype), p_layout)
                step += 1
            stage = step % STAGES
            mbarrier.wait(value_full.index(stage), (step // STAGES) & 1)
            fence_async_shared()
            mixed = warpgroup_mma(weights, values.index(stage), mixed, is_async=True)
            mixed = warpgroup_mma_wait(num_outstanding=0, deps=(mixed,))
            step += 1
        o_place = first_place + o_tile % QUERIES
        o_row = (first_head + o_tile // QUERIES).to(gl.int64) * num_queries + o_place
        o_real = (o_tile // QUERIES < RATIO) & (o_place < num_queries)
        summed = gl.convert_layout(gl.sum(total, 1), o_rows)
        share = 1.0 / gl.where(summed == 0.0, 1.0, summed)
        result = (mixed * share[:, None]).to(dtype)
        if WHOLE_ROWS:
            store_rows(output, result, queries, first_head, first_place, num_queries, VALUE_DIM, ROWS, QUERIES, RATIO)
        else:
            gl.store(output + (o_row * VALUE_DIM)[:, None] + o_columns[None, :], result, mask=o_real[:, None])
        unit: gl.constexpr = 1.0 if HAS_BIAS else _LN2.value
        gl.store(largest + o_row, gl.convert_layout(top, o_rows) * unit, mask=o_real)
        gl.store(rest + o_row, gl.log2(summed) * _LN2, mask=o_real)
        # A value that is not finite reached rows that may not see it: 0 · NaN is NaN. `redo_forward` looks at it.
        checksum = gl.sum(mixed, 1)
        flag = gl.zeros([ROWS], gl.int32, o_rows) + ((row * blocks + block) * CONSUMERS + CONSUMER)
        gl.store(flags + flag, gl.full([ROWS], 1, gl.int32, o_rows), mask=checksum != checksum)
        turn += 1
        row, block, num_whole, listed = take(work, told, taken, turn, SLOTS)


@gluon.jit
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
    tickets,
    flags,
    output,
    largest,
    rest,
    factor,
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
    k_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, DIM], dtype)
    v_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, VALUE_DIM], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, ROWS, DIM], q_shared)
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
        # Every producing thread arrives once its copies have landed; each consumer arrives once.
        mbarrier.init(key_full.index(stage), count=128)
        mbarrier.init(value_full.index(stage), count=128)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(taken.index(slot), count=CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    output, largest, rest, flags, heads, num_queries, length, blocks, factor, queries, keys, values,
                    biases, deaths, places, work, told, taken, key_full, value_full, empty,
                    GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, HAS_BIAS, WHOLE_ROWS,
                    0,
                ),
            ),
            (
                _consume,
                (
                    output, largest, rest, flags, heads, num_queries, length, blocks, factor, queries, keys, values,
                    biases, deaths, places, work, told, taken, key_full, value_full, empty,
                    GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, HAS_BIAS, WHOLE_ROWS,
                    1,
                ),
            ),
            (
                _consume,
                (
                    output, largest, rest, flags, heads, num_queries, length, blocks, factor, queries, keys, values,
                    biases, deaths, places, work, told, taken, key_full, value_full, empty,
                    GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, HAS_BIAS, WHOLE_ROWS,
                    2,
                ),
            ),
            (
                produce,
                (
                    query, query, key, value, expiry, bias, index, whole, partial, table, tickets, items, batch_size,
                    heads, num_queries, length, blocks, entries, queries, queries, keys, values, biases, deaths, places,
                    work, told, taken, key_full, value_full, empty,
                    0, 1, GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, N, STAGES, SLOTS, CONSUMERS, False, HAS_BIAS,
                ),
            ),
        ],
        [4, 4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
