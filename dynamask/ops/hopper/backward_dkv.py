"""dK, dV and dbias on Hopper, warp-specialised in Gluon: tiles of keys walk the queries that see them.

The walk of `backward_walk.py` with loading and multiplying apart, as in `forward.py`: the producer copies tiles
of queries and output gradients, and two consumers hold 64 keys each, with their gradients in registers. All four
products take one operand from registers or in its natural layout, so nothing goes back to shared memory. Walks differ
in length by orders of magnitude, so they are cut into pieces that load persistent programs alike (`tile_scheduler.py`);
a piece adds its sums to the result by atomics, a few thousandths of what one atomic per key and block of queries moves,
or, where it takes a tile whole, writes them (`walk_tiles.py`).
The producer, which is some steps ahead, finds the pieces and tells the consumers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dynamask.ops.hopper.producer import by_lane, take, tell
from dynamask.ops.hopper.row_sums import RowSums
from dynamask.ops.hopper.tile_scheduler import chunk_steps, leg_of, own_queries, piece_queries, proceed, search_levels
from dynamask.ops.hopper.walk_tiles import clear_sums, narrow_sums, walk_tiles
from dynamask.ops.triton.inputs import AttentionInputs
from dynamask.ops.triton.lists import SpanLists
from dynamask.ops.tuning import tuning

_LOG2E = gl.constexpr(1.4426950408889634)

_KEYS = 64
"""Keys of a consumer, the rows of its products."""

_ROWS = 64
"""Rows of a step: its queries, times the heads that share their keys."""

_CHUNK = 128
"""Steps of a chunk, about."""

_OVERHEAD = 2
"""Steps that beginning and ending a piece takes as long as."""

_FANOUT = 256
"""Numbers that each level of the search for a tile looks at."""


def walk_kernel_launch(
    inputs: AttentionInputs, grad_output: Tensor, sums: RowSums, spans: SpanLists
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `backward_walk.walk_kernel_launch` does, on inputs that `dispatch.hopper` takes.

    Args:
        grad_output: (B, H, Nq, Dv), contiguous.
        sums: as `backward.prepare` gives them.
        spans: the lists of large blocks.
    """
    key, value, expiry = inputs.key, inputs.value, inputs.expiry
    key_sum, value_sum = (torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
    d_key, d_value = torch.empty_like(key), torch.empty_like(value)
    d_bias = torch.zeros(expiry.shape, dtype=torch.float32, device=key.device)
    step = _ROWS // next_power_of_2(inputs.ratio)
    programs = _programs(key.device)
    tiles = walk_tiles(expiry, spans, inputs.num_queries, 2 * _KEYS, step, _OVERHEAD)
    clear_sums(expiry, tiles, (key_sum, value_sum), 2 * _KEYS, programs, _CHUNK, _OVERHEAD)
    _walk[(programs,)](
        grad_output,
        *inputs.tensors,
        sums.lse if sums.top is None else sums.top,
        sums.lse,
        sums.delta,
        tiles.order,
        tiles.starts,
        tiles.ends,
        tiles.through,
        tiles.whole,
        key_sum,
        value_sum,
        d_key,
        d_value,
        d_bias,
        inputs.scale * (_LOG2E.value if inputs.bias is None else 1.0),
        inputs.scale,
        inputs.heads,
        inputs.num_queries,
        inputs.length,
        tiles.slots * 2 * _KEYS,
        tiles.slots,
        1,  # no walk is cut where a span ends: each is of one span, or short
        inputs.num_queries,
        tiles.through.numel(),
        KEYS=_KEYS,
        ROWS=_ROWS,
        TARGET=_CHUNK,
        OVERHEAD=_OVERHEAD,
        FANOUT=_FANOUT,
        LEVELS=search_levels(tiles.through.numel(), _FANOUT),
        SLOTS=4,
        **inputs.constants,
        num_warps=4,
        **tuning("Hopper walk", inputs.widest),
    )
    narrow_sums(expiry, tiles, (key_sum, value_sum), (d_key, d_value), 2 * _KEYS)
    return d_key, d_value, d_bias


def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.jit
def _produce(
    grad_output,
    query,
    top,
    lse,
    delta,
    heads,
    num_queries,
    length,
    starts,
    ends,
    through,
    whole,
    tiles,
    spans,
    span,
    count,
    pieces,
    queries,
    grads,
    tops,
    lses,
    deltas,
    told,
    taken,
    full,
    empty,
    GROUPS: gl.constexpr,
    RATIO: gl.constexpr,
    RATIO_PAD: gl.constexpr,
    DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    ROWS: gl.constexpr,
    TARGET: gl.constexpr,
    OVERHEAD: gl.constexpr,
    FANOUT: gl.constexpr,
    LEVELS: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    PART: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Find this program's pieces, tell the consumers, and copy what each piece's queries need, in order."""
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    g_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // VALUE_DIM, VALUE_DIM // 8], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    M: gl.constexpr = ROWS // RATIO_PAD
    q_columns = gl.arange(0, DIM, gl.SliceLayout(0, q_layout))
    g_columns = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, g_layout))
    first_query = length - num_queries
    tile = gl.arange(0, ROWS, flat)
    step = 0
    turn = 0
    total = gl.load(through + count - 1)
    chunk = chunk_steps(total, gl.num_programs(0), TARGET)
    low = gl.program_id(0) * chunk
    high = min(low + chunk, total)
    while low < total:
        leg = leg_of(low, through, count, FANOUT, LEVELS)
        before = gl.load(through + leg - 1, mask=leg > 0, other=0)
        after = gl.load(through + leg)
        row = leg // (spans * tiles)
        item = row * tiles + leg % tiles
        reached = first_query + leg // tiles % spans * span
        start = max(gl.load(starts + item), reached)
        first, last = piece_queries(
            low, high, before, after, start, min(gl.load(ends + item), reached + span), M, OVERHEAD
        )
        begin = first.to(gl.int32)
        end = last.to(gl.int32)
        if begin < end:
            tell(pieces, told, taken, turn, item, begin, end, gl.load(whole + item), SLOTS)
            turn += 1
            first_head = row // GROUPS * heads + row % GROUPS * RATIO
            for start in range(begin, end, M):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                position = start + tile % M
                real = (tile // M < RATIO) & (position < length)
                at = (first_head + tile // M).to(gl.int64) * num_queries + position - first_query
                async_copy.async_copy_global_to_shared(lses.index(stage), lse + at, mask=real)
                if HAS_BIAS:
                    async_copy.async_copy_global_to_shared(tops.index(stage), top + at, mask=real)
                async_copy.async_copy_global_to_shared(deltas.index(stage), delta + at, mask=real)
                for part in gl.static_range(0, ROWS, PART):
                    r = part + gl.arange(0, PART, gl.SliceLayout(1, q_layout))
                    place = start + r % M
                    at = (first_head + r // M).to(gl.int64) * num_queries + place - first_query
                    async_copy.async_copy_global_to_shared(
                        queries.index(stage).slice(part, PART),
                        query + (at * DIM)[:, None] + q_columns[None, :],
                        mask=((r // M < RATIO) & (place < length))[:, None],
                    )
                    r = part + gl.arange(0, PART, gl.SliceLayout(1, g_layout))
                    place = start + r % M
                    at = (first_head + r // M).to(gl.int64) * num_queries + place - first_query
                    async_copy.async_copy_global_to_shared(
                        grads.index(stage).slice(part, PART),
                        grad_output + (at * VALUE_DIM)[:, None] + g_columns[None, :],
                        mask=((r // M < RATIO) & (place < length))[:, None],
                    )
                async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                step += 1
        low, high = proceed(low, high, after, chunk, gl.num_programs(0), total)
    tell(pieces, told, taken, turn, -1, 0, 0, 0, SLOTS)
    async_copy.wait_group(0)


@gluon.jit
def _extremes(earliest, latest, soonest, last, other_earliest, other_latest, other_soonest, other_last):
    return (
        gl.minimum(earliest, other_earliest),
        gl.maximum(latest, other_latest),
        gl.minimum(soonest, other_soonest),
        gl.maximum(last, other_last),
    )


@gluon.jit
def _pass_over(full, empty, step, steps, STAGES: gl.constexpr):
    """Free `steps` stages without a look at what is in them."""
    for _ in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return step


@gluon.jit
def _consume(
    key,
    value,
    expiry,
    bias,
    order,
    key_sum,
    value_sum,
    d_key,
    d_value,
    d_bias,
    factor,
    scale,
    length,
    places,
    tiles,
    pieces,
    all_keys,
    all_values,
    lives,
    queries,
    grads,
    tops,
    lses,
    deltas,
    told,
    taken,
    full,
    empty,
    DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    KEYS: gl.constexpr,
    ROWS: gl.constexpr,
    M: gl.constexpr,
    RATIO: gl.constexpr,
    RATIO_PAD: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Gradients of 64 keys of every piece that falls to this program."""
    dtype: gl.constexpr = key.dtype.element_ty
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    k_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    v_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, VALUE_DIM, 16]
    )
    k_load: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    v_load: gl.constexpr = gl.BlockedLayout([1, 8], [256 // VALUE_DIM, VALUE_DIM // 8], [4, 1], [1, 0])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    k_rows: gl.constexpr = gl.SliceLayout(1, k_layout)
    v_rows: gl.constexpr = gl.SliceLayout(1, v_layout)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    step = 0
    turn = 0
    item, begin, end, whole = take(pieces, told, taken, turn, SLOTS)
    while item >= 0:
        row = item // tiles
        tile = item % tiles
        base = row.to(gl.int64) * length
        first = (tile * 2 + CONSUMER) * KEYS
        keys, values = all_keys.index(CONSUMER), all_values.index(CONSUMER)
        # Everything is loaded before anything is used.
        listing = order + row.to(gl.int64) * places
        k_n = first + gl.arange(0, KEYS, gl.SliceLayout(1, k_load))
        k_j = gl.maximum(gl.load(listing + k_n, mask=k_n < places, other=0), 0)
        v_n = first + gl.arange(0, KEYS, gl.SliceLayout(1, v_load))
        v_j = k_j if DIM == VALUE_DIM else gl.maximum(gl.load(listing + v_n, mask=v_n < places, other=0), 0)
        n = first + gl.arange(0, KEYS, s_rows)
        born = gl.load(listing + n, mask=n < places, other=-1)
        listed = born >= 0
        born = gl.maximum(born, 0)
        d = gl.arange(0, DIM, gl.SliceLayout(0, k_load))
        k_tile = gl.load(key + ((base + k_j) * DIM)[:, None] + d[None, :])
        dv = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, v_load))
        v_tile = gl.load(value + ((base + v_j) * VALUE_DIM)[:, None] + dv[None, :])
        dies = gl.load(expiry + base + born, mask=listed, other=0)
        # Whatever comes out for keys that nobody sees is not added to the result.
        lived = dies > born
        earliest, latest, soonest, last = gl.reduce(
            (
                gl.where(lived, born, length),
                gl.where(lived, born, 0),
                gl.where(lived, dies, length),
                gl.where(lived, dies, 0),
            ),
            0,
            _extremes,
        )
        # The other consumer's keys may be seen before these are, and after.
        before, begin, end, after = own_queries(begin, end, earliest, last, M)
        # Read again where a tile is tested: held in registers, they would cost the products theirs.
        lives.index(2 * CONSUMER).store(born)
        lives.index(2 * CONSUMER + 1).store(gl.maximum(dies - born, 0))
        keys.store(k_tile)
        values.store(v_tile)
        fence_async_shared()
        # Once here, or at every step.
        gl.thread_barrier()
        own = gl.full([KEYS], 0.0, gl.float32, s_rows)
        if HAS_BIAS:
            own = gl.load(bias + base + born)
        nothing = gl.full([KEYS, ROWS], 0.0, gl.float32, s_layout)
        k_sum = gl.full([KEYS, DIM], 0.0, gl.float32, k_layout)
        v_sum = gl.full([KEYS, VALUE_DIM], 0.0, gl.float32, v_layout)
        b_sum = by_lane(nothing)
        offset = gl.arange(0, ROWS, columns) % M
        padding = gl.arange(0, ROWS, columns) // M >= RATIO
        step = _pass_over(full, empty, step, before, STAGES)
        for start in range(begin, end, M):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            fence_async_shared()
            s = warpgroup_mma(keys, queries.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            dp = warpgroup_mma(values, grads.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            lse = lses.index(stage).load(columns)
            s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
            if HAS_BIAS:
                # Differences first, as in the forward pass.
                top = tops.index(stage).load(columns)
                p = gl.exp2((s * factor + own[:, None] - top[None, :]) * _LOG2E - lse[None, :])
            else:
                p = gl.exp2(s * factor - lse[None, :])
            tested = (start < latest) | (start + M > soonest)
            if tested:
                position = start + offset
                age = position[None, :] - lives.index(2 * CONSUMER).load(s_rows)[:, None]
                life = lives.index(2 * CONSUMER + 1).load(s_rows)[:, None]
                # Unsigned, the age of an unborn key is beyond every life: one comparison in place of two.
                p = gl.where(age.to(gl.uint32) < life.to(gl.uint32), p, 0.0)
            if RATIO != RATIO_PAD:
                # Rows of no head were filled with zeros, their log-sum-exp too: exp2 of a large bias would be inf.
                p = gl.where(padding[None, :], 0.0, p)
            weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, v_layout, 2))
            delta = deltas.index(stage).load(columns)
            dp = warpgroup_mma_wait(num_outstanding=0, deps=(dp,))
            ds = p * (dp - delta[None, :])
            if tested:
                # Queries that see a NaN elsewhere have one in `delta`.
                ds = gl.where(p == 0.0, 0.0, ds)
            if HAS_BIAS:
                b_sum += by_lane(ds)
            slopes = gl.convert_layout(ds.to(dtype), gl.DotOperandLayout(0, k_layout, 2))
            v_sum = warpgroup_mma(weights, grads.index(stage), v_sum, is_async=True)
            k_sum = warpgroup_mma(slopes, queries.index(stage), k_sum, is_async=True)
            v_sum, k_sum = warpgroup_mma_wait(num_outstanding=0, deps=(v_sum, k_sum))
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
        step = _pass_over(full, empty, step, after, STAGES)
        if whole > 0:
            # In whole rows, by way of the keys' and values' shared memory, as `producer.store_rows`.
            keys.store((k_sum * scale).to(dtype))
            values.store(v_sum.to(dtype))
            gl.thread_barrier()
            k_row = lives.index(2 * CONSUMER).load(gl.SliceLayout(1, k_load))
            k_real = lives.index(2 * CONSUMER + 1).load(gl.SliceLayout(1, k_load)) > 0
            k_target = d_key + ((base + k_row) * DIM)[:, None] + d[None, :]
            gl.store(k_target, keys.load(k_load), mask=k_real[:, None])
            v_row = lives.index(2 * CONSUMER).load(gl.SliceLayout(1, v_load))
            v_real = lives.index(2 * CONSUMER + 1).load(gl.SliceLayout(1, v_load)) > 0
            v_target = d_value + ((base + v_row) * VALUE_DIM)[:, None] + dv[None, :]
            gl.store(v_target, values.load(v_load), mask=v_real[:, None])
        else:
            at_k = lives.index(2 * CONSUMER).load(k_rows)
            k_lived = lives.index(2 * CONSUMER + 1).load(k_rows) > 0
            k_place = ((base + at_k) * DIM)[:, None] + gl.arange(0, DIM, gl.SliceLayout(0, k_layout))[None, :]
            at_v = lives.index(2 * CONSUMER).load(v_rows)
            v_lived = lives.index(2 * CONSUMER + 1).load(v_rows) > 0
            v_place = ((base + at_v) * VALUE_DIM)[:, None] + gl.arange(0, VALUE_DIM, gl.SliceLayout(0, v_layout))[
                None, :
            ]
            gl.atomic_add(key_sum + k_place, k_sum * scale, mask=k_lived[:, None], sem="relaxed")
            gl.atomic_add(value_sum + v_place, v_sum, mask=v_lived[:, None], sem="relaxed")
        if HAS_BIAS:
            j = lives.index(2 * CONSUMER).load(s_rows)
            lived = lives.index(2 * CONSUMER + 1).load(s_rows) > 0
            summed = gl.convert_layout(gl.sum(b_sum, 1), s_rows)
            gl.atomic_add(d_bias + base + j, summed, mask=lived, sem="relaxed")
        turn += 1
        item, begin, end, whole = take(pieces, told, taken, turn, SLOTS)


@gluon.jit
def _walk(
    grad_output,
    query,
    key,
    value,
    expiry,
    bias,
    top,
    lse,
    delta,
    order,
    starts,
    ends,
    through,
    whole,
    key_sum,
    value_sum,
    d_key,
    d_value,
    d_bias,
    factor,
    scale,
    heads,
    num_queries,
    length,
    places,
    tiles,
    spans,
    span,
    count,
    GROUPS: gl.constexpr,
    RATIO: gl.constexpr,
    RATIO_PAD: gl.constexpr,
    DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    KEYS: gl.constexpr,
    ROWS: gl.constexpr,
    TARGET: gl.constexpr,
    OVERHEAD: gl.constexpr,
    FANOUT: gl.constexpr,
    LEVELS: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    PART: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    dtype: gl.constexpr = query.dtype.element_ty
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    M: gl.constexpr = ROWS // RATIO_PAD
    k_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, DIM], dtype)
    v_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, VALUE_DIM], dtype)
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
    g_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, VALUE_DIM], dtype)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    keys = gl.allocate_shared_memory(dtype, [2, KEYS, DIM], k_shared)
    values = gl.allocate_shared_memory(dtype, [2, KEYS, VALUE_DIM], v_shared)
    queries = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DIM], q_shared)
    grads = gl.allocate_shared_memory(dtype, [STAGES, ROWS, VALUE_DIM], g_shared)
    tops = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    lses = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    lives = gl.allocate_shared_memory(gl.int32, [4, KEYS], flat)
    pieces = gl.allocate_shared_memory(gl.int32, [SLOTS, 4], flat)
    told = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for stage in gl.static_range(STAGES):
        # Every producing thread arrives once its copies have landed; each consumer arrives once.
        mbarrier.init(full.index(stage), count=128)
        mbarrier.init(empty.index(stage), count=2)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(taken.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    key, value, expiry, bias, order, key_sum, value_sum, d_key, d_value, d_bias, factor, scale, length,
                    places, tiles, pieces, keys, values, lives, queries, grads, tops, lses, deltas, told, taken, full,
                    empty,
                    DIM, VALUE_DIM, KEYS, ROWS, M, RATIO, RATIO_PAD, SLOTS, STAGES, HAS_BIAS, 0,
                ),
            ),
            (
                _consume,
                (
                    key, value, expiry, bias, order, key_sum, value_sum, d_key, d_value, d_bias, factor, scale, length,
                    places, tiles, pieces, keys, values, lives, queries, grads, tops, lses, deltas, told, taken, full,
                    empty,
                    DIM, VALUE_DIM, KEYS, ROWS, M, RATIO, RATIO_PAD, SLOTS, STAGES, HAS_BIAS, 1,
                ),
            ),
            (
                _produce,
                (
                    grad_output, query, top, lse, delta, heads, num_queries, length,
                    starts, ends, through, whole, tiles, spans, span, count, pieces, queries, grads, tops, lses, deltas,
                    told, taken, full, empty,
                    GROUPS, RATIO, RATIO_PAD, DIM, VALUE_DIM, ROWS, TARGET, OVERHEAD, FANOUT, LEVELS, SLOTS, STAGES,
                    PART, HAS_BIAS,
                ),
            ),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
