"""One token through a decoder layer in few launches: what lies between its matrix products and the attention.

| launch | does |
| --- | --- |
| `norm_and_project` | residual sum, RMS norm, the products to queries, keys and values, and a rank predictor's first |
| `rotate_and_insert` | norms of heads, rotary embedding, ranks, the contest of the cache's slots, the insertion |
| `norm_and_gate` | residual sum, RMS norm, gate and up products, silu and their product |

A token alone makes every launch short, so their number decides the time. All of them round where the torch operations
of Llama-like models and of `dynamask.mixers.rank_predictor` round; they differ by the order of sums alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.triton.cache_insert import _SLOTS, _sortable
from dynamask.ops.triton.predict_ranks import rms_epsilon

MOST_ROWS = 64
"""Sequences of a batch at most."""

_ROWS = 16
"""Rows of a weight that a program multiplies with."""


class Projections(NamedTuple):
    """Weights that read a layer's normalised input, contiguous.

    Attributes:
        query, key, value: (H * D, hidden), (G * D, hidden) twice.
        biases: of the three, all or none of them.
        rank_up: (width, hidden) of the rank predictor, of any dtype but float64; None: the layer ranks nothing.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None
    rank_up: Tensor | None


class RankHeadWeights(NamedTuple):
    """What turns the hidden units of a rank predictor into ranks.

    Attributes:
        active: (B, width) float32.
        down: (G, width); bias: (G,).
        lift: (B, G) float32 added to the ranks after rounding, or None.
        grid: steps per unit to which ranks are rounded.
    """

    active: Tensor
    down: Tensor
    bias: Tensor
    lift: Tensor | None
    grid: float


class Pools(NamedTuple):
    """The state of a `dynamask.cache.BoundedLayer`: keys, values, ranks (float32), positions, clock and its layout's.

    Attributes:
        table: (G + 1,) int32, the first slot of each head.
        widest: slots of the widest head.
        local, sinks: as in `BoundedLayer`.
    """

    keys: Tensor
    values: Tensor
    ranks: Tensor
    positions: Tensor
    clock: Tensor
    table: Tensor
    widest: int
    local: int
    sinks: int


def norm_and_project(
    residual: Tensor, delta: Tensor | None, norm: Tensor, epsilon: float, weights: Projections
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add, normalise and project.

    Args:
        residual: (B, hidden), contiguous as all arguments, B at most `MOST_ROWS`.
        delta: (B, hidden) to add to it, or None.
        norm: (hidden,) weight of the RMS norm.
        epsilon: added to the mean square.
        weights: what to multiply with.

    Returns:
        The sum (B, hidden), the projections (B, (H + 2 G) * D), and the rank predictor's hidden units (B, width)
        float32, or None.
    """
    batch, hidden = residual.shape
    sizes = [weight.shape[0] for weight in weights[:3]]
    width = 0 if weights.rank_up is None else weights.rank_up.shape[0]
    total = torch.empty_like(residual) if delta is not None else residual
    projected = residual.new_empty(batch, sum(sizes))
    active = torch.empty(batch, width, dtype=torch.float32, device=residual.device)
    blocks = [triton.cdiv(size, _ROWS) for size in sizes]
    programs = sum(blocks) + triton.cdiv(width, _ROWS)
    tile, chunk = _tiles(batch, hidden)
    biases = (residual,) * 3 if weights.biases is None else weights.biases
    _norm_project[(programs,)](
        residual,
        residual if delta is None else delta,
        total,
        norm,
        epsilon,
        *weights[:3],
        *biases,
        weights.query if weights.rank_up is None else weights.rank_up,
        projected,
        active,
        rms_epsilon(residual.dtype, residual.device) if width else 0.0,
        batch,
        *sizes,
        width,
        HIDDEN=hidden,
        HAS_DELTA=delta is not None,
        HAS_BIAS=weights.biases is not None,
        TILE=tile,
        CHUNK=chunk,
        N=_ROWS,
        PRECISION=_precision(residual),
        RANK_PRECISION=_precision(residual if weights.rank_up is None else weights.rank_up),
        num_warps=4,
        num_stages=4,
    )
    return total, projected, active if width else None


def norm_and_gate(
    residual: Tensor, delta: Tensor, norm: Tensor, epsilon: float, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Add, normalise, and compute `silu(x · gate) * (x · up)`.

    Args:
        residual, delta, norm, epsilon: as in `norm_and_project`.
        gate, up: (inner, hidden).

    Returns:
        The sum (B, hidden), and the product (B, inner).
    """
    batch, hidden = residual.shape
    inner = gate.shape[0]
    total, gated = torch.empty_like(residual), residual.new_empty(batch, inner)
    tile, chunk = _tiles(batch, hidden)
    _norm_gate[(triton.cdiv(inner, _ROWS),)](
        residual,
        delta,
        total,
        norm,
        epsilon,
        gate,
        up,
        gated,
        batch,
        inner,
        HIDDEN=hidden,
        TILE=tile,
        CHUNK=chunk,
        N=_ROWS,
        PRECISION=_precision(residual),
        num_warps=4,
        num_stages=4,
    )
    return total, gated


def rotate_and_insert(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    epsilon: float,
    ranks: RankHeadWeights | None,
    pools: Pools,
) -> Tensor:
    """Rotate queries and keys, rank the keys, and put keys, values and ranks into the cache.

    Args:
        projected: (B, (H + 2 G) * D), see `norm_and_project`.
        cos, sin: (B or 1, D).
        norms: (D,) weights of the RMS norms of query and key heads, or None.
        epsilon: added to their mean squares.
        ranks: None: the newest keys stay.
        pools: changed in place.

    Returns:
        The rotated queries, (B, H, 1, D).
    """
    batch, slots, dim = pools.keys.shape
    groups = pools.clock.shape[1]
    heads = projected.shape[1] // dim - 2 * groups
    ratio = heads // groups
    query = projected.new_empty(batch, heads, 1, dim)
    together = min(_SLOTS[1], max(_SLOTS[0], triton.next_power_of_2(pools.widest)))
    width = 0 if ranks is None else ranks.active.shape[1]
    lift = None if ranks is None else ranks.lift
    _rotate_insert[(batch * groups,)](
        projected,
        cos,
        sin,
        dim if cos.shape[0] > 1 else 0,
        *((projected, projected) if norms is None else norms),
        epsilon,
        *((pools.ranks,) * 3 if ranks is None else ranks[:3]),
        pools.ranks if lift is None else lift,
        query,
        *pools[:6],
        width,
        groups,
        slots,
        pools.local,
        pools.sinks,
        HAS_NORM=norms is not None,
        HAS_RANK=ranks is not None,
        HAS_LIFT=lift is not None,
        GRID=1.0 if ranks is None else ranks.grid,
        RATIO=ratio,
        RATIO_PAD=triton.next_power_of_2(ratio),
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        WIDTH_PAD=max(16, triton.next_power_of_2(width)),
        SLOTS=together,
        num_warps=max(4, together // 512),
    )
    return query


def _tiles(batch: int, hidden: int) -> tuple[int, int]:
    """Rows of the input's tile, and numbers of the hidden state taken at a time."""
    tile = max(16, triton.next_power_of_2(batch))
    chunk = 256 if tile == 16 else 128 if tile == 32 else 64
    return tile, min(chunk, max(16, triton.next_power_of_2(hidden)))


def _precision(weight: Tensor) -> str:
    return "tf32" if weight.element_size() == 2 else "ieee"


@triton.jit
def _sum_of(residual, delta, row, k, batch, HIDDEN: tl.constexpr, HAS_DELTA: tl.constexpr):
    """Rows and columns of residual + delta, rounded as the model rounds it."""
    at = row[:, None] * HIDDEN + k[None, :]
    there = (row < batch)[:, None] & (k < HIDDEN)[None, :]
    x = tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta + at, mask=there, other=0.0).to(tl.float32)
        x = x.to(residual.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _inverse_of(
    residual, delta, row, batch, epsilon, HIDDEN: tl.constexpr, HAS_DELTA: tl.constexpr, CHUNK: tl.constexpr
):
    """One over the root of the mean square of each row of residual + delta."""
    squares = tl.zeros([row.shape[0], CHUNK], tl.float32)
    for chunk in tl.static_range(0, HIDDEN, CHUNK):
        x = _sum_of(residual, delta, row, chunk + tl.arange(0, CHUNK), batch, HIDDEN, HAS_DELTA)
        squares += x * x
    return 1.0 / tl.sqrt(tl.sum(squares, 1) / HIDDEN + epsilon)


@triton.jit
def _normed(residual, delta, norm, row, k, inverse, batch, HIDDEN: tl.constexpr, HAS_DELTA: tl.constexpr):
    """Rows and columns of the normalised sum, in the model's dtype."""
    x = _sum_of(residual, delta, row, k, batch, HIDDEN, HAS_DELTA) * inverse[:, None]
    weight = tl.load(norm + k, mask=k < HIDDEN, other=0.0).to(tl.float32)
    x = x.to(residual.dtype.element_ty).to(tl.float32) * weight[None, :]
    return x.to(residual.dtype.element_ty)


@triton.jit
def _keep_sum(residual, delta, total, row, batch, HIDDEN: tl.constexpr, CHUNK: tl.constexpr):
    """Write residual + delta, which the next layer adds to."""
    for chunk in tl.static_range(0, HIDDEN, CHUNK):
        k = chunk + tl.arange(0, CHUNK)
        x = _sum_of(residual, delta, row, k, batch, HIDDEN, True)
        there = (row < batch)[:, None] & (k < HIDDEN)[None, :]
        tl.store(total + row[:, None] * HIDDEN + k[None, :], x.to(total.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["batch", "query_rows", "key_rows", "value_rows", "width"])
def _norm_project(
    residual,
    delta,
    total,
    norm,
    epsilon,
    query,
    key,
    value,
    query_bias,
    key_bias,
    value_bias,
    rank_up,
    projected,
    active,
    rank_epsilon,
    batch,
    query_rows,
    key_rows,
    value_rows,
    width,
    HIDDEN: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
):
    """N rows of one of the weights; the first program writes the sum."""
    block = tl.program_id(0)
    row = tl.arange(0, TILE)
    inverse = _inverse_of(residual, delta, row, batch, epsilon, HIDDEN, HAS_DELTA, CHUNK)
    key_block = tl.cdiv(query_rows, N)
    value_block = key_block + tl.cdiv(key_rows, N)
    rank_block = value_block + tl.cdiv(value_rows, N)
    mixed = tl.zeros([TILE, N], tl.float32)
    if block < rank_block:
        weight = query
        bias = query_bias
        first = 0
        rows = query_rows
        begin = 0
        if block >= value_block:
            weight = value
            bias = value_bias
            first = value_block
            rows = value_rows
            begin = query_rows + key_rows
        elif block >= key_block:
            weight = key
            bias = key_bias
            first = key_block
            rows = key_rows
            begin = query_rows
        n = (block - first) * N + tl.arange(0, N)
        for chunk in range(0, HIDDEN, CHUNK):
            k = chunk + tl.arange(0, CHUNK)
            at = weight + n[:, None] * HIDDEN + k[None, :]
            w = tl.load(at, mask=(n < rows)[:, None] & (k < HIDDEN)[None, :], other=0.0)
            x = _normed(residual, delta, norm, row, k, inverse, batch, HIDDEN, HAS_DELTA)
            mixed = tl.dot(x, tl.trans(w), mixed, input_precision=PRECISION)
        if HAS_BIAS:
            mixed += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
        place = projected + row[:, None] * (query_rows + key_rows + value_rows) + begin + n[None, :]
        there = (row < batch)[:, None] & (n < rows)[None, :]
        tl.store(place, mixed.to(projected.dtype.element_ty), mask=there)
    else:
        # The predictor normalises its input once more, without a weight.
        squares = tl.zeros([TILE, CHUNK], tl.float32)
        for chunk in range(0, HIDDEN, CHUNK):
            k = chunk + tl.arange(0, CHUNK)
            x = _normed(residual, delta, norm, row, k, inverse, batch, HIDDEN, HAS_DELTA).to(tl.float32)
            squares += x * x
        again = 1.0 / tl.sqrt(tl.sum(squares, 1) / HIDDEN + rank_epsilon)
        n = (block - rank_block) * N + tl.arange(0, N)
        for chunk in range(0, HIDDEN, CHUNK):
            k = chunk + tl.arange(0, CHUNK)
            at = rank_up + n[:, None] * HIDDEN + k[None, :]
            w = tl.load(at, mask=(n < width)[:, None] & (k < HIDDEN)[None, :], other=0.0)
            x = _normed(residual, delta, norm, row, k, inverse, batch, HIDDEN, HAS_DELTA).to(tl.float32)
            x = (x * again[:, None]).to(residual.dtype.element_ty).to(rank_up.dtype.element_ty)
            mixed = tl.dot(x, tl.trans(w), mixed, input_precision=RANK_PRECISION)
        unit = mixed.to(rank_up.dtype.element_ty).to(tl.float32)
        unit = (unit / (1.0 + tl.exp(-unit))).to(rank_up.dtype.element_ty).to(tl.float32)
        there = (row < batch)[:, None] & (n < width)[None, :]
        tl.store(active + row[:, None] * width + n[None, :], unit, mask=there)
    if HAS_DELTA and block == 0:
        _keep_sum(residual, delta, total, row, batch, HIDDEN, CHUNK)


@triton.jit(do_not_specialize=["batch", "inner"])
def _norm_gate(
    residual,
    delta,
    total,
    norm,
    epsilon,
    gate,
    up,
    gated,
    batch,
    inner,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """N inner units; the first program writes the sum."""
    row = tl.arange(0, TILE)
    inverse = _inverse_of(residual, delta, row, batch, epsilon, HIDDEN, True, CHUNK)
    n = tl.program_id(0) * N + tl.arange(0, N)
    opened = tl.zeros([TILE, N], tl.float32)
    raised = tl.zeros([TILE, N], tl.float32)
    for chunk in range(0, HIDDEN, CHUNK):
        k = chunk + tl.arange(0, CHUNK)
        at = n[:, None] * HIDDEN + k[None, :]
        there = (n < inner)[:, None] & (k < HIDDEN)[None, :]
        g = tl.load(gate + at, mask=there, other=0.0)
        u = tl.load(up + at, mask=there, other=0.0)
        x = _normed(residual, delta, norm, row, k, inverse, batch, HIDDEN, True)
        opened = tl.dot(x, tl.trans(g), opened, input_precision=PRECISION)
        raised = tl.dot(x, tl.trans(u), raised, input_precision=PRECISION)
    opened = opened.to(gated.dtype.element_ty).to(tl.float32)
    opened = (opened / (1.0 + tl.exp(-opened))).to(gated.dtype.element_ty).to(tl.float32)
    both = opened * raised.to(gated.dtype.element_ty).to(tl.float32)
    there = (row < batch)[:, None] & (n < inner)[None, :]
    tl.store(gated + row[:, None] * inner + n[None, :], both.to(gated.dtype.element_ty), mask=there)
    if tl.program_id(0) == 0:
        _keep_sum(residual, delta, total, row, batch, HIDDEN, CHUNK)


@triton.jit
def _rotated(at, there, d, cos, sin, norm, epsilon, HAS_NORM: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Rows of heads at `at` (R, 1), normalised and rotated: (R, DIM_PAD) float32, rounded to the model's dtype."""
    narrow = at.dtype.element_ty
    partner = tl.where(d < DIM // 2, d + DIM // 2, d - DIM // 2)
    real = d < DIM
    mask = there[:, None] & real[None, :]
    x = tl.load(at + d[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(at + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse = (1.0 / tl.sqrt(tl.sum(x * x, 1) / DIM + epsilon))[:, None]
        own = tl.load(norm + d, mask=real, other=0.0).to(tl.float32)[None, :]
        across = tl.load(norm + partner, mask=real, other=0.0).to(tl.float32)[None, :]
        x = ((x * inverse).to(narrow).to(tl.float32) * own).to(narrow).to(tl.float32)
        other = ((other * inverse).to(narrow).to(tl.float32) * across).to(narrow).to(tl.float32)
    c = tl.load(cos + d, mask=real, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + d, mask=real, other=0.0).to(tl.float32)[None, :]
    turned = tl.where((d < DIM // 2)[None, :], -other, other)
    return (x * c).to(narrow).to(tl.float32) + (turned * s).to(narrow).to(tl.float32)


@triton.jit(do_not_specialize=["width", "groups", "slots", "local", "sinks"])
def _rotate_insert(
    projected,
    cos,
    sin,
    angle_b,
    query_norm,
    key_norm,
    epsilon,
    active,
    down,
    down_bias,
    lift,
    query,
    keys,
    values,
    ranks,
    positions,
    clock,
    table,
    width,
    groups,
    slots,
    local,
    sinks,
    HAS_NORM: tl.constexpr,
    HAS_RANK: tl.constexpr,
    HAS_LIFT: tl.constexpr,
    GRID: tl.constexpr,
    RATIO: tl.constexpr,
    RATIO_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One key/value head of one row: its query heads, its key, its rank, its slots. `_insert` has the same contest."""
    row = tl.program_id(0).to(tl.int64)
    b = row // groups
    g = row % groups
    now = tl.load(clock + row)
    start = tl.load(table + g)
    stop = tl.load(table + g + 1)
    base = b * slots
    free = now < stop - start
    nobody: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    lowest = tl.full([SLOTS], nobody, tl.int64)
    place = tl.zeros([SLOTS], tl.int32)
    for begin in range(start, tl.where(free, start, stop), SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        there = slot < stop
        position = tl.load(positions + base + slot, mask=there, other=0).to(tl.int64)
        score = _sortable(tl.load(ranks + base + slot, mask=there, other=0.0))
        contest = there & (position <= now - local) & (position >= sinks)
        code = tl.where(contest, score * 2147483648 + position, nobody)
        better = code < lowest
        lowest = tl.where(better, code, lowest)
        place = tl.where(better, slot, place)
    least = tl.min(lowest, 0)
    slot = tl.max(tl.where((lowest == least) & (least != nobody), place, 0), 0)
    slot = tl.where(free, start + now, slot.to(tl.int64))

    heads = groups * RATIO
    mine = projected + b * (heads + 2 * groups) * DIM
    d = tl.arange(0, DIM_PAD)
    h = tl.arange(0, RATIO_PAD)
    turn = angle_b * b
    at = mine + (g * RATIO + h)[:, None] * DIM
    q = _rotated(at, h < RATIO, d, cos + turn, sin + turn, query_norm, epsilon, HAS_NORM, DIM, DIM_PAD)
    q_at = query + (b * heads + g * RATIO + h)[:, None] * DIM + d[None, :]
    tl.store(q_at, q.to(query.dtype.element_ty), mask=(h < RATIO)[:, None] & (d < DIM)[None, :])

    new = tl.full([], 0.0, tl.float32)
    if HAS_RANK:
        unit = tl.arange(0, WIDTH_PAD)
        some = unit < width
        weight = tl.load(down + g * width + unit, mask=some, other=0.0).to(tl.float32)
        total = tl.sum(weight * tl.load(active + b * width + unit, mask=some, other=0.0), 0)
        steps = (total + tl.load(down_bias + g).to(tl.float32)) * GRID
        # As in `predict_ranks`: rounds to the nearest integer, ties to the even one.
        steps = tl.where(tl.abs(steps) < 4194304.0, (steps + 12582912.0) - 12582912.0, steps)
        new = steps / GRID
        if HAS_LIFT:
            new += tl.load(lift + row)
    arrives = free | (local > 0) | (_sortable(new) * 2147483648 + 2147483647 >= least)
    place_in_pool = base + slot
    one = tl.arange(0, 1)
    key_at = mine + (heads + g + one)[:, None] * DIM
    k = _rotated(key_at, one < 1, d, cos + turn, sin + turn, key_norm, epsilon, HAS_NORM, DIM, DIM_PAD)
    here = arrives & (d < DIM)[None, :]
    target = (place_in_pool + one)[:, None] * DIM + d[None, :]
    tl.store(keys + target, k.to(keys.dtype.element_ty), mask=here)
    v_at = mine + (heads + groups + g + one)[:, None] * DIM + d[None, :]
    tl.store(values + target, tl.load(v_at, mask=here), mask=here)
    tl.store(ranks + place_in_pool, new, mask=arrives)
    tl.store(positions + place_in_pool, now.to(tl.int32), mask=arrives)
    tl.store(clock + row, now + 1)


__all__ = [
    "MOST_ROWS",
    "Pools",
    "Projections",
    "RankHeadWeights",
    "norm_and_gate",
    "norm_and_project",
    "rotate_and_insert",
]
