"""dK, dV and dbias without atomics: each tile of keys walks the queries that see it, and sums in a fixed order.

A tile's walk is as long as from its first birth to its last expiry, so keys with similar intervals share a tile. dQ
comes from `backward.py` over the lists, with the scattering left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.triton.forward import LOG2E, load_row_sums
from dynamask.ops.triton.inputs import AttentionInputs
from dynamask.ops.tuning import tuning

_SLAB = 1024
"""Keys ordered by expiry at a time; between 512 and 2048 makes little difference."""

_LONG = 512
"""Queries that a long-lived key is seen by, at least."""


def walking_order(expiry: Tensor) -> Tensor:
    """Order keys so that neighbours have similar intervals; the keys that nobody sees come last.

    The keys that live, by birth, are cut into slabs, and each slab is ordered by expiry (the sort-tile packing of
    R-trees). Random scores at N = 32K, w = 2048: tiles of 64 walk 1.22 times what their keys need, tiles of 128 1.32
    times; lifetimes classed by power of two, each class by birth, gave 1.57 and 1.92. Where many keys live no longer
    than the newest positions keep them, the others come first, in slabs of their own: a few of them in every slab make
    its last tile walk from the slab's first birth to the end of the row. With 128 newest of 300 keys that is a third
    of the steps.

    Args:
        expiry: (B, G, N) int32, contiguous.

    Returns:
        (B, G, N) int32 positions.
    """
    batch, groups, length = expiry.shape
    rows, slabs = batch * groups, triton.cdiv(length, _SLAB)
    living = torch.empty(rows, 2, slabs, dtype=torch.int32, device=expiry.device)
    by_birth, order = torch.empty_like(expiry), torch.empty_like(expiry)
    pad = max(2, triton.next_power_of_2(slabs))
    _count_living[(slabs, rows)](expiry, living, length, slabs, SLAB=_SLAB, LONG=_LONG, num_warps=4)
    _living_first[(slabs, rows)](
        expiry, living, by_birth, order, length, slabs, SLAB=_SLAB, LONG=_LONG, SLABS_PAD=pad, num_warps=4
    )
    wide = (length + 1) * _SLAB >= 1 << 31
    # One more, since the long-lived keys' last slab may be a part of one.
    _order_slab[(slabs + 1, rows)](
        expiry, living, by_birth, order, length, slabs, SLAB=_SLAB, SLABS_PAD=pad, WIDE=wide, num_warps=4
    )
    return order


@triton.jit
def _count_living(expiry, living, length, slabs, SLAB: tl.constexpr, LONG: tl.constexpr):
    """Keys of this slab of positions that at least LONG queries see, and those that fewer do."""
    slab = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    key = slab * SLAB + tl.arange(0, SLAB)
    life = tl.load(expiry + row * length + key, mask=key < length, other=0) - key
    life = tl.where(key < length, life, 0)
    tl.store(living + row * 2 * slabs + slab, tl.sum((life >= LONG).to(tl.int32), 0))
    tl.store(living + (row * 2 + 1) * slabs + slab, tl.sum(((life > 0) & (life < LONG)).to(tl.int32), 0))


@triton.jit
def _sections(long, short, length):
    """How many keys the section of long-lived keys takes, and all living keys: one section if the others are few."""
    return tl.where(short * 4 < length, long + short, long), long + short


@triton.jit
def _living_first(
    expiry, living, by_birth, order, length, slabs, SLAB: tl.constexpr, LONG: tl.constexpr, SLABS_PAD: tl.constexpr
):
    """Long-lived keys to the front, by birth, then the other living ones; the others to their final places."""
    slab = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    every = tl.arange(0, SLABS_PAD)
    long = tl.load(living + row * 2 * slabs + every, mask=every < slabs, other=0)
    short = tl.load(living + (row * 2 + 1) * slabs + every, mask=every < slabs, other=0)
    long_before = tl.sum(tl.where(every < slab, long, 0), 0)
    short_before = tl.sum(tl.where(every < slab, short, 0), 0)
    all_long, total = _sections(tl.sum(long, 0), tl.sum(short, 0), length)
    if all_long == total:
        long_before += short_before
        short_before = 0
    key = slab * SLAB + tl.arange(0, SLAB)
    there = key < length
    life = tl.load(expiry + row * length + key, mask=there, other=0) - key
    lives_long = there & (life > 0) & ((life >= LONG) | (all_long == total))
    lives_short = there & (life > 0) & (lives_long == 0)
    long_rank = long_before + tl.cumsum(lives_long.to(tl.int32), 0)
    short_rank = short_before + tl.cumsum(lives_short.to(tl.int32), 0)
    tl.store(by_birth + row * length + long_rank - 1, key, mask=lives_long)
    tl.store(by_birth + row * length + all_long + short_rank - 1, key, mask=lives_short)
    tl.store(order + row * length + total + key - long_rank - short_rank, key, mask=there & (life <= 0))


@triton.jit
def _order_slab(
    expiry, living, by_birth, order, length, slabs, SLAB: tl.constexpr, SLABS_PAD: tl.constexpr, WIDE: tl.constexpr
):
    """One slab of living keys, all of one class, by expiry."""
    slab = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    every = tl.arange(0, SLABS_PAD)
    long = tl.load(living + row * 2 * slabs + every, mask=every < slabs, other=0)
    short = tl.load(living + (row * 2 + 1) * slabs + every, mask=every < slabs, other=0)
    long, total = _sections(tl.sum(long, 0), tl.sum(short, 0), length)
    long_slabs = (long + SLAB - 1) // SLAB
    is_long = slab < long_slabs
    begin = tl.where(is_long, slab * SLAB, long + (slab - long_slabs) * SLAB)
    end = tl.minimum(begin + SLAB, tl.where(is_long, long, total))
    if begin < end:
        t = tl.arange(0, SLAB)
        place = begin + t
        there = place < end
        key = tl.load(by_birth + row * length + place, mask=there, other=0)
        dies = tl.load(expiry + row * length + key, mask=there, other=0)
        dies = tl.where(there, tl.minimum(dies, length), length)  # what is not there stays behind what is
        value = tl.sort((dies.to(tl.int64) if WIDE else dies) * SLAB + t)
        key = tl.load(by_birth + row * length + begin + (value & (SLAB - 1)).to(tl.int32), mask=there, other=0)
        tl.store(order + row * length + place, key, mask=there)


def walk_kernel_launch(
    inputs: AttentionInputs, grad_output: Tensor, parts: tuple[Tensor, Tensor], delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients to key and value in their dtypes and to the bias in float32.

    Args:
        parts: of the log-sum-exp, as the forward pass gives them.
        delta: as `backward.prepare` gives it.
    """
    d_key, d_value = torch.empty_like(inputs.key), torch.empty_like(inputs.value)
    d_bias = torch.empty(inputs.expiry.shape, dtype=torch.float32, device=d_key.device)
    chosen = tuning("deterministic walk", inputs.widest, inputs.narrow)
    rows = chosen.pop("rows")
    ratio_pad = triton.next_power_of_2(inputs.ratio)
    _walk[(triton.cdiv(inputs.length, chosen["N"]), inputs.batch * inputs.groups)](
        grad_output,
        *inputs.tensors,
        *parts,
        delta,
        walking_order(inputs.expiry),
        d_key,
        d_value,
        d_bias,
        inputs.scale,
        inputs.heads,
        inputs.num_queries,
        inputs.length,
        M=max(16 // ratio_pad, rows // ratio_pad, 1),
        **inputs.portable_constants,
        **chosen,
    )
    return d_key, d_value, d_bias


@triton.jit
def _walk(
    grad_output,
    query,
    key,
    value,
    expiry,
    bias,
    top,
    rest,
    delta,
    order,
    d_key,
    d_value,
    d_bias,
    scale,
    heads,
    num_queries,
    length,
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
    row = tl.program_id(1)
    batch, group = row // GROUPS, row % GROUPS
    base = row.to(tl.int64) * length
    n = tl.program_id(0) * N + tl.arange(0, N)
    listed = n < length
    j = tl.load(order + base + n, mask=listed, other=0)
    dies = tl.load(expiry + base + j, mask=listed, other=0)
    wide = base + j
    d = tl.arange(0, DIM_PAD)
    dv = tl.arange(0, VALUE_PAD)
    k_place = wide[:, None] * DIM + d[None, :]
    v_place = wide[:, None] * VALUE_DIM + dv[None, :]
    k_mask = listed[:, None] & (d < DIM)[None, :]
    v_mask = listed[:, None] & (dv < VALUE_DIM)[None, :]
    k = tl.load(key + k_place, mask=k_mask, other=0.0)
    v = tl.load(value + v_place, mask=v_mask, other=0.0)
    if HAS_BIAS:
        own = tl.load(bias + wide, mask=listed, other=0.0)
    first_query = length - num_queries
    alive = dies > tl.maximum(j, first_query)
    low = tl.min(tl.where(alive, tl.maximum(j, first_query), length), 0)
    high = tl.max(tl.where(alive, dies, 0), 0)

    tile = tl.arange(0, RATIO_PAD * M)
    head, offset = tile // M, tile % M
    head_row = (batch * heads + group * RATIO + head).to(tl.int64) * num_queries - first_query
    d_k = tl.zeros([N, DIM_PAD], tl.float32)
    d_v = tl.zeros([N, VALUE_PAD], tl.float32)
    d_b = tl.zeros([N], tl.float32)
    for start in range(low, high, M):
        position = start + offset
        real = (head < RATIO) & (position < high)
        q_row = head_row + position
        row_top, row_rest = load_row_sums(top, rest, q_row, real)
        row_delta = tl.load(delta + q_row, mask=real, other=0.0)
        # The query and gradient of a row that sees nothing may be NaN, which a weight of zero would pass on.
        weighs = real & (row_rest != float("inf"))
        q_mask, do_mask = weighs[:, None] & (d < DIM)[None, :], weighs[:, None] & (dv < VALUE_DIM)[None, :]
        q = tl.load(query + q_row[:, None] * DIM + d[None, :], mask=q_mask, other=0.0)
        do = tl.load(grad_output + q_row[:, None] * VALUE_DIM + dv[None, :], mask=do_mask, other=0.0)
        seen = (j[:, None] <= position[None, :]) & (position[None, :] < dies[:, None])
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if HAS_BIAS:
            s += own[:, None]
        p = tl.where(seen, tl.exp2((s - row_top[None, :]) * LOG2E - row_rest[None, :]), 0.0)
        d_v = tl.dot(p.to(do.dtype), do, d_v, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = tl.where(seen, p * (dp - row_delta[None, :]), 0.0)
        d_k = tl.dot(ds.to(q.dtype), q, d_k, input_precision=PRECISION)
        if HAS_BIAS:
            d_b += tl.sum(ds, 1)
    tl.store(d_key + k_place, (d_k * scale).to(d_key.dtype.element_ty), mask=k_mask)
    tl.store(d_value + v_place, d_v.to(d_value.dtype.element_ty), mask=v_mask)
    tl.store(d_bias + wide, d_b, mask=listed)
