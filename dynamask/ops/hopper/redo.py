"""Tiles that a number that is not finite got into, once more and key by key.

A query weighs a key that it does not see by 0, and 0 · NaN is NaN: a product of tiles passes a NaN of any key to all
queries of the tile. The kernels for Hopper flag the tiles whose results hold one; these launches look at the flags,
which are nearly always all zero, and compute such tiles again as `dynamask.ops.triton` does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.triton.forward import load_row_sums
from dynamask.ops.triton.inputs import AttentionInputs
from dynamask.ops.triton.lists import KeyLists, list_of

_FLAGS = 64
"""Flags of a program."""


def tickets_and_flags(flags: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros for a kernel: the counter its programs take items from, and a flag for each tile."""
    scratch = torch.zeros(16 + flags, dtype=torch.int32, device=device)
    return scratch[:16], scratch[16:]


def redo_forward(
    inputs: AttentionInputs,
    lists: KeyLists,
    flags: Tensor,
    consumers: int,
    heads: int,
    results: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write again what the flagged tiles of the forward pass gave; arguments as in `hopper.forward`.

    Args:
        flags: (B·G · blocks · consumers,) int32, not 0 for a tile to compute again.
        consumers: tiles of a block.
        heads: that a tile has rows for: all of a key/value head, or an equal part of them.
        results: of the forward pass.
    """
    _redo_forward[(triton.cdiv(flags.numel(), _FLAGS),)](
        *inputs.tensors,
        *lists.tensors,
        flags,
        *results,
        *_sizes(inputs, lists, flags),
        **_constants(inputs, lists, consumers, heads),
    )


def redo_dq(
    inputs: AttentionInputs,
    grad_output: Tensor,
    parts: tuple[Tensor, Tensor],
    delta: Tensor,
    lists: KeyLists,
    flags: Tensor,
    consumers: int,
    heads: int,
    d_query: Tensor,
) -> None:
    """Write again what the flagged tiles of the pass for dQ gave; arguments as in `hopper.backward_dq`.

    Args:
        flags, consumers, heads: as in `redo_forward`.
    """
    _redo_dq[(triton.cdiv(flags.numel(), _FLAGS),)](
        grad_output,
        *inputs.tensors,
        *parts,
        delta,
        *lists.tensors,
        flags,
        d_query,
        *_sizes(inputs, lists, flags),
        **_constants(inputs, lists, consumers, heads),
    )


def _sizes(inputs: AttentionInputs, lists: KeyLists, flags: Tensor) -> tuple[float | int, ...]:
    """The numbers that both kernels take behind their tensors."""
    sizes = (inputs.heads, inputs.num_queries, inputs.length, lists.blocks, lists.entries)
    return inputs.scale, flags.numel(), *sizes


def _constants(inputs: AttentionInputs, lists: KeyLists, consumers: int, heads: int) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        **inputs.constants,
        "RATIO_PAD": heads,
        "M": lists.block if heads < inputs.ratio else lists.block // consumers,
        "CONSUMERS": consumers,
        "FLAGS": _FLAGS,
        "num_warps": 4,
    }


@triton.jit
def _attend_key(
    q,
    seen,
    j,
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
    """One key at `j` of a row, for the queries that have `seen` it; the others keep their sums as they are."""
    k = tl.load(key + j * DIM + d).to(tl.float32)
    v = tl.load(value + j * VALUE_DIM + dv).to(tl.float32)
    s = tl.sum(q.to(tl.float32) * k[None, :], 1) * scale
    if HAS_BIAS:
        s += tl.load(bias + j)
    s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, s)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2((s - base) * 1.4426950408889634)
    shrink = tl.exp2((top - base) * 1.4426950408889634)
    added = tl.where(seen[:, None], p[:, None] * v[None, :], 0.0)
    return new_top, total * shrink + p, mixed * shrink[:, None] + added


@triton.jit
def _tile_of(
    number,
    heads,
    num_queries,
    blocks,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    RATIO_PAD: tl.constexpr,
    M: tl.constexpr,
    CONSUMERS: tl.constexpr,
):
    """Batch, head, block, rows, places and which of them there are, of a flag's tile."""
    row = number // (blocks * CONSUMERS)
    block = number // CONSUMERS % blocks
    batch, group = row // GROUPS, row % GROUPS
    tile = tl.arange(0, RATIO_PAD * M)
    consumer = number % CONSUMERS
    if RATIO > RATIO_PAD:  # consumers share the heads
        place = block * M + tile % M
        head = consumer * RATIO_PAD + tile // M
    else:
        place = (block * CONSUMERS + consumer) * M + tile % M
        head = tile // M
    q_row = (batch * heads + group * RATIO + head).to(tl.int64) * num_queries + place
    return batch, group, block, q_row, place, (head < RATIO) & (place < num_queries)


@triton.jit
def _redo_forward(
    query,
    key,
    value,
    expiry,
    bias,
    index,
    whole,
    partial,
    table,
    flags,
    output,
    largest,
    rest,
    scale,
    count,
    heads,
    num_queries,
    length,
    blocks,
    entries,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    RATIO_PAD: tl.constexpr,
    M: tl.constexpr,
    CONSUMERS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    first = tl.program_id(0) * FLAGS
    own = first + tl.arange(0, FLAGS)
    if tl.max(tl.load(flags + own, mask=own < count, other=0), 0) > 0:
        d = tl.arange(0, DIM)
        dv = tl.arange(0, VALUE_DIM)
        for number in range(first, tl.minimum(first + FLAGS, count)):
            if tl.load(flags + number) > 0:
                batch, group, block, q_row, place, real = _tile_of(
                    number, heads, num_queries, blocks, GROUPS, RATIO, RATIO_PAD, M, CONSUMERS
                )
                position = length - num_queries + place
                row = batch * GROUPS + group
                base = row.to(tl.int64) * length
                q = tl.load(query + q_row[:, None] * DIM + d[None, :], mask=real[:, None], other=0.0)
                start, capacity = list_of(table, batch, group, block, blocks, entries, GROUPS)
                num_whole = tl.load(whole + row * blocks + block)
                total_keys = num_whole + tl.load(partial + row * blocks + block)
                top = tl.full([RATIO_PAD * M], float("-inf"), tl.float32)
                total = tl.zeros([RATIO_PAD * M], tl.float32)
                mixed = tl.zeros([RATIO_PAD * M, VALUE_DIM], tl.float32)
                for entry in range(0, total_keys):
                    j = tl.load(index + start + tl.where(entry < num_whole, entry, capacity - 1 - (entry - num_whole)))
                    seen = (j <= position) & (position < tl.load(expiry + base + j))
                    top, total, mixed = _attend_key(
                        q, seen, j.to(tl.int64), key + base * DIM, value + base * VALUE_DIM, bias + base, d, dv, scale,
                        top, total, mixed, DIM, VALUE_DIM, HAS_BIAS,
                    )  # fmt: skip
                mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
                tl.store(
                    output + q_row[:, None] * VALUE_DIM + dv[None, :],
                    mixed.to(output.dtype.element_ty),
                    mask=real[:, None],
                )
                tl.store(largest + q_row, top, mask=real)
                tl.store(rest + q_row, tl.log(total), mask=real)


@triton.jit
def _redo_dq(
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
    flags,
    d_query,
    scale,
    count,
    heads,
    num_queries,
    length,
    blocks,
    entries,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    RATIO_PAD: tl.constexpr,
    M: tl.constexpr,
    CONSUMERS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    first = tl.program_id(0) * FLAGS
    own = first + tl.arange(0, FLAGS)
    if tl.max(tl.load(flags + own, mask=own < count, other=0), 0) > 0:
        d = tl.arange(0, DIM)
        dv = tl.arange(0, VALUE_DIM)
        for number in range(first, tl.minimum(first + FLAGS, count)):
            if tl.load(flags + number) > 0:
                batch, group, block, q_row, place, real = _tile_of(
                    number, heads, num_queries, blocks, GROUPS, RATIO, RATIO_PAD, M, CONSUMERS
                )
                position = length - num_queries + place
                row = batch * GROUPS + group
                base = row.to(tl.int64) * length
                q = tl.load(query + q_row[:, None] * DIM + d[None, :], mask=real[:, None], other=0.0).to(tl.float32)
                do = tl.load(grad_output + q_row[:, None] * VALUE_DIM + dv[None, :], mask=real[:, None], other=0.0).to(
                    tl.float32
                )
                row_top, row_rest = load_row_sums(top, rest, q_row, real)
                row_delta = tl.load(delta + q_row, mask=real, other=0.0)
                start, capacity = list_of(table, batch, group, block, blocks, entries, GROUPS)
                num_whole = tl.load(whole + row * blocks + block)
                total_keys = num_whole + tl.load(partial + row * blocks + block)
                dq = tl.zeros([RATIO_PAD * M, DIM], tl.float32)
                for entry in range(0, total_keys):
                    j = tl.load(index + start + tl.where(entry < num_whole, entry, capacity - 1 - (entry - num_whole)))
                    seen = (j <= position) & (position < tl.load(expiry + base + j))
                    wide = base + j
                    k = tl.load(key + wide * DIM + d).to(tl.float32)
                    v = tl.load(value + wide * VALUE_DIM + dv).to(tl.float32)
                    s = tl.sum(q * k[None, :], 1) * scale
                    if HAS_BIAS:
                        s += tl.load(bias + wide)
                    p = tl.exp2((s - row_top) * 1.4426950408889634 - row_rest)
                    ds = p * (tl.sum(do * v[None, :], 1) - row_delta)
                    dq += tl.where(seen[:, None], ds[:, None] * k[None, :], 0.0)
                tl.store(
                    d_query + q_row[:, None] * DIM + d[None, :],
                    (dq * scale).to(d_query.dtype.element_ty),
                    mask=real[:, None],
                )
