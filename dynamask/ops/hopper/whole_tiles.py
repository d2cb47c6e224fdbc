"""Which tiles of keys one piece of the walk takes whole, and what is to be done about the others.

The sums of a tile that is cut into pieces meet in float32 by atomics, in rows cleared before and narrowed after. A tile
taken whole needs neither: its piece writes the gradients as they are. With narrow windows nearly all tiles are whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def clear_split_tiles(
    order: Tensor,
    starts: Tensor,
    ends: Tensor,
    through: Tensor,
    sums: tuple[Tensor, Tensor],
    num_queries: int,
    tiles: int,
    span: int,
    keys: int,
    programs: int,
    target: int,
    overhead: int,
) -> Tensor:
    """Clear the float32 sums of the keys of all tiles that are cut.

    Args:
        order, starts, ends, through: as `backward_walk.walking_order` and `walk_steps` give them.
        sums: (B, G, N, D) and (B, G, N, Dv) float32, cleared where a tile is cut.
        num_queries: Nq; the queries are the last Nq positions.
        tiles: of `keys` keys, of one row.
        span: queries of a span.
        programs, target, overhead: as `tile_scheduler` takes them.

    Returns:
        (B·G·tiles,) int32, 1 for a tile that one piece takes whole, 0 for one that is cut, -1 for one without queries.
    """
    rows, length = starts.numel() // tiles, order.shape[-1]
    whole = torch.empty(rows * tiles, dtype=torch.int32, device=order.device)
    _clear[(tiles, rows)](
        order,
        starts,
        ends,
        through,
        whole,
        *sums,
        length,
        length - num_queries,
        tiles,
        triton.cdiv(num_queries, span),
        span,
        through.numel(),
        programs,
        KEYS=keys,
        DIM=sums[0].shape[-1],
        VALUE_DIM=sums[1].shape[-1],
        TARGET=target,
        OVERHEAD=overhead,
        num_warps=4,
    )
    return whole


def narrow_split_tiles(
    order: Tensor,
    expiry: Tensor,
    whole: Tensor,
    sums: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    tiles: int,
    keys: int,
) -> None:
    """Write the gradients of the keys of all tiles that are cut, and zeros for the keys that nobody sees.

    Args:
        order, whole, sums: as in `clear_split_tiles`.
        expiry: (B, G, N) int32.
        gradients: of keys and values, in their dtypes.
        tiles: of `keys` keys, of one row.
    """
    _narrow[(tiles, whole.numel() // tiles)](
        order,
        expiry,
        whole,
        *sums,
        *gradients,
        order.shape[-1],
        tiles,
        KEYS=keys,
        DIM=sums[0].shape[-1],
        VALUE_DIM=sums[1].shape[-1],
        num_warps=4,
    )


@triton.jit
def _clear(
    order,
    starts,
    ends,
    through,
    whole,
    key_sum,
    value_sum,
    length,
    first_query,
    tiles,
    spans,
    span,
    count,
    programs,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TARGET: tl.constexpr,
    OVERHEAD: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    item = row * tiles + tile
    start = tl.load(starts + item)
    end = tl.load(ends + item)
    # As `tile_scheduler.chunk_steps`.
    total = tl.load(through + count - 1)
    rounds = (total + programs * TARGET // 2) // (programs * TARGET)
    chunks = programs * tl.maximum(rounds, 1)
    chunk = tl.maximum((total + chunks - 1) // chunks, 1)
    first_span = tl.minimum((start - first_query) // span, spans - 1)
    last_span = (tl.maximum(end - 1, first_query) - first_query) // span
    leg = (row * spans + first_span) * tiles + tile
    before = tl.load(through + leg - 1, mask=leg > 0, other=0)
    after = tl.load(through + leg)
    alone = (first_span == last_span) & ((before + OVERHEAD) // chunk == (after - 1) // chunk)
    walked = start < end
    tl.store(whole + item, tl.where(walked, alone.to(tl.int32), -1))
    if walked & (alone == 0):
        n = tile * KEYS + tl.arange(0, KEYS)
        key = row * length + tl.load(order + row * length + n, mask=n < length, other=0)
        d = tl.arange(0, DIM)
        dv = tl.arange(0, VALUE_DIM)
        tl.store(
            key_sum + key[:, None] * DIM + d[None, :], tl.zeros([KEYS, DIM], tl.float32), mask=(n < length)[:, None]
        )
        tl.store(
            value_sum + key[:, None] * VALUE_DIM + dv[None, :],
            tl.zeros([KEYS, VALUE_DIM], tl.float32),
            mask=(n < length)[:, None],
        )


@triton.jit
def _narrow(
    order,
    expiry,
    whole,
    key_sum,
    value_sum,
    d_key,
    d_value,
    length,
    tiles,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    kind = tl.load(whole + row * tiles + tile)
    n = tile * KEYS + tl.arange(0, KEYS)
    born = tl.load(order + row * length + n, mask=n < length, other=0)
    lived = tl.load(expiry + row * length + born, mask=n < length, other=0) > born
    # Of a tile that is whole the walk has written what lived.
    own = (n < length) & ((kind != 1) | (lived == 0))
    if tl.max(own.to(tl.int32), 0) > 0:
        summed = own & (kind == 0) & lived
        d = tl.arange(0, DIM)
        dv = tl.arange(0, VALUE_DIM)
        place = (row * length + born)[:, None] * DIM + d[None, :]
        sums = tl.load(key_sum + place, mask=summed[:, None], other=0.0)
        tl.store(d_key + place, sums.to(d_key.dtype.element_ty), mask=own[:, None])
        place = (row * length + born)[:, None] * VALUE_DIM + dv[None, :]
        sums = tl.load(value_sum + place, mask=summed[:, None], other=0.0)
        tl.store(d_value + place, sums.to(d_value.dtype.element_ty), mask=own[:, None])
