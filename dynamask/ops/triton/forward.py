"""Forward: a tile of R·M query rows (all heads of a key/value head) against the gathered keys of its block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.triton.lists import KeyLists

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def forward_kernel_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    lists: KeyLists,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, Nq, Dv) and lse (B, H, Nq) float32; arguments contiguous, shapes as in `blocked.forward`."""
    batch, heads, num_queries, dim = query.shape
    groups, length, value_dim = value.shape[1:]
    ratio = heads // groups
    output = torch.empty(batch, heads, num_queries, value_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=query.device)
    narrow = query.element_size() == 2
    _forward[(lists.index.shape[1], batch * groups)](
        query,
        key,
        value,
        expiry,
        expiry if bias is None else bias,
        lists.index,
        lists.whole,
        lists.partial,
        output,
        lse,
        scale,
        heads,
        num_queries,
        length,
        lists.index.shape[1],
        lists.index.shape[2],
        GROUPS=groups,
        RATIO=ratio,
        RATIO_PAD=triton.next_power_of_2(ratio),
        M=lists.block,
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=triton.next_power_of_2(value_dim),
        HAS_BIAS=bias is not None,
        PRECISION="tf32" if narrow else "ieee",
        **tiles(max(dim, value_dim), narrow),
    )
    return output, lse


def tiles(dim: int, narrow: bool) -> dict[str, int]:
    """Keys per tile, warps and pipeline stages for a head width; `narrow` for 16-bit inputs."""
    if not narrow:
        return {"N": 32, "num_warps": 8, "num_stages": 2}
    if dim > 128:
        return {"N": 32, "num_warps": 8, "num_stages": 2}
    # Swept on an H100 at N = 32K, w = 2048 (lab/kernels.md).
    return {"N": 64 if dim > 64 else 128, "num_warps": 4, "num_stages": 2}


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
def _forward(
    query,
    key,
    value,
    expiry,
    bias,
    index,
    whole,
    partial,
    output,
    lse,
    scale,
    heads,
    num_queries,
    length,
    blocks,
    capacity,
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
    # The last blocks have the longest lists; starting with them leaves no straggler at the end.
    block = blocks - 1 - tl.program_id(0)
    row = tl.program_id(1)
    batch, group = row // GROUPS, row % GROUPS
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
    list_row = index + (row.to(tl.int64) * blocks + block) * capacity
    num_whole = tl.load(whole + row * blocks + block)
    num_partial = tl.load(partial + row * blocks + block)
    whole_tiles = num_whole // N * N

    factor = scale * LOG2E
    top = tl.full([RATIO_PAD * M], float("-inf"), tl.float32)
    total = tl.zeros([RATIO_PAD * M], tl.float32)
    mixed = tl.zeros([RATIO_PAD * M, VALUE_PAD], tl.float32)
    n = tl.arange(0, N)
    for begin in range(0, whole_tiles, N):
        j = tl.load(list_row + begin + n).to(tl.int64)
        k = tl.load(key + j[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
        v = tl.load(value + j[:, None] * VALUE_DIM + dv[None, :], mask=(dv < VALUE_DIM)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if HAS_BIAS:
            s += (tl.load(bias + j) * LOG2E)[None, :]
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
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
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if HAS_BIAS:
            s += (tl.load(bias + j) * LOG2E)[None, :]
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet has top -inf; -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(p.to(v.dtype), v, mixed, input_precision=PRECISION)
        top = new_top

    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        output + q_row[:, None] * VALUE_DIM + dv[None, :],
        mixed.to(output.dtype.element_ty),
        mask=real[:, None] & (dv < VALUE_DIM)[None, :],
    )
    tl.store(lse + q_row, (top + tl.log2(total)) * LN2, mask=real)
