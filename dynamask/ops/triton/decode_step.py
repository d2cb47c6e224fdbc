"""One token through a decoder layer in few launches: what lies between its matrix products and the attention.

| launch | does |
| --- | --- |
| `norm_and_project` | RMS norm, the products to queries, keys and values, and a rank predictor's first; beside them, |
| | in programs of its own, the contest of the cache's slots |
| `rotate_and_insert` | norms of heads, rotary embedding, ranks, the insertion |
| `project_and_add` | a product, the residual sum, the sums of squares that the next norm needs |
| `norm_and_gate` | RMS norm, gate and up products, silu and their product |

A token alone makes every launch short, so their number decides the time. All of them round where the torch operations
of Llama-like models and of `dynamask.mixers.rank_predictor` round; they differ by the order of sums alone.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.triton.cache_insert import _lowest, _sortable
from dynamask.ops.triton.predict_ranks import rms_epsilon
from dynamask.ops.triton.tables import device_table

MOST_ROWS = 64
"""Sequences of a batch at most."""

_ROWS = 16
"""Rows of a weight that a program multiplies with."""

_WARPS, _STAGES = 4, 4
"""Of the programs that multiply."""

_CHUNK = 0
"""Numbers of the hidden state taken at a time; 0: by the batch."""

_SCANNED = 1024
"""Slots that a program of the contest looks at together."""

_MOST_PARTS = 64
"""Programs of the contest in a head at most."""


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
    """The state of a `dynamask.cache.BoundedLayer`: keys, values, ranks (float32), positions and clock.

    Attributes:
        offsets: G + 1 integers, the first slot of each head.
        local, sinks: as in `BoundedLayer`.
    """

    keys: Tensor
    values: Tensor
    ranks: Tensor
    positions: Tensor
    clock: Tensor
    offsets: tuple[int, ...]
    local: int
    sinks: int


class Contest(NamedTuple):
    """Which key of each head a new one would evict, part by part of its slots.

    Attributes:
        codes: (B, parts) int64, the lowest of each part: the lowest rank first, then the oldest position.
        slots: (B, parts) int32, where it lies.
        table: (2, G + 1) int32, the first slot of each head, and its first part.
        most: parts of the head that has most of them.
    """

    codes: Tensor
    slots: Tensor
    table: Tensor
    most: int


class Residual(NamedTuple):
    """The sum that a model's layers add to, with what its norm needs.

    Attributes:
        rows: (B, hidden), contiguous.
        squares: (parts, B) float32, whose sum over the parts is the sum of the squares of each row.
    """

    rows: Tensor
    squares: Tensor


def begin(rows: Tensor) -> Residual:
    """Return the residual of embeddings (B, hidden)."""
    return Residual(rows.contiguous(), rows.float().square().sum(-1)[None])


def norm_and_project(
    residual: Residual, norm: Tensor, epsilon: float, weights: Projections, pools: Pools
) -> tuple[Tensor, Tensor | None, Contest]:
    """Normalise and project; find the keys that the new ones would evict.

    Args:
        residual: of B rows, at most `MOST_ROWS`.
        norm: (hidden,) weight of the RMS norm, contiguous as all arguments.
        epsilon: added to the mean square.
        weights: what to multiply with.
        pools: the cache before the token.

    Returns:
        The projections (B, (H + 2 G) * D), the rank predictor's hidden units (B, width) float32, or None, and the
        contest.
    """
    rows = residual.rows
    batch, hidden = rows.shape
    sizes = [weight.shape[0] for weight in weights[:3]]
    width = 0 if weights.rank_up is None else weights.rank_up.shape[0]
    projected = rows.new_empty(batch, sum(sizes))
    active = torch.empty(batch, width, dtype=torch.float32, device=rows.device)
    blocks = [triton.cdiv(size, _ROWS) for size in sizes]
    projecting = sum(blocks) + triton.cdiv(width, _ROWS)
    slots_of_part, starts = _parts(pools.offsets)
    groups = len(pools.offsets) - 1
    contest = Contest(
        torch.empty(batch, starts[-1], dtype=torch.int64, device=rows.device),
        torch.empty(batch, starts[-1], dtype=torch.int32, device=rows.device),
        device_table((pools.offsets, starts), rows.device),
        max(stop - start for start, stop in itertools.pairwise(starts)),
    )
    biases = (rows,) * 3 if weights.biases is None else weights.biases
    _norm_project[(projecting + batch * starts[-1],)](
        (*residual, norm, epsilon),
        (*weights[:3], *biases, weights.query if weights.rank_up is None else weights.rank_up),
        projected,
        active,
        rms_epsilon(rows.dtype, rows.device) if width else 0.0,
        (pools.ranks, pools.positions, pools.clock, contest.table, contest.codes, contest.slots),
        batch,
        residual.squares.shape[0],
        *sizes,
        width,
        groups,
        pools.ranks.shape[1],
        slots_of_part,
        starts[-1],
        pools.local,
        pools.sinks,
        HIDDEN=hidden,
        SQUARES=_square_parts(hidden),
        HAS_BIAS=weights.biases is not None,
        GROUPS_PAD=triton.next_power_of_2(groups + 1),
        SCANNED=_SCANNED,
        RANK_PRECISION=_precision(rows if weights.rank_up is None else weights.rank_up),
        **_of_products(rows),
    )
    return projected, active if width else None, contest


def norm_and_gate(residual: Residual, norm: Tensor, epsilon: float, gate: Tensor, up: Tensor) -> Tensor:
    """Normalise, and compute `silu(x · gate) * (x · up)`.

    Args:
        residual, norm, epsilon: as in `norm_and_project`.
        gate, up: (inner, hidden).

    Returns:
        The product (B, inner).
    """
    rows = residual.rows
    batch, hidden = rows.shape
    inner = gate.shape[0]
    gated = rows.new_empty(batch, inner)
    _norm_gate[(triton.cdiv(inner, _ROWS),)](
        (*residual, norm, epsilon),
        gate,
        up,
        gated,
        batch,
        residual.squares.shape[0],
        inner,
        HIDDEN=hidden,
        SQUARES=_square_parts(hidden),
        **_of_products(rows),
    )
    return gated


def project_and_add(inputs: Tensor, weight: Tensor, bias: Tensor | None, residual: Residual) -> Residual:
    """Multiply and add to the residual.

    Args:
        inputs: (B, K), contiguous.
        weight: (hidden, K).
        bias: (hidden,), or None.
        residual: of B rows.
    """
    batch, depth = inputs.shape
    hidden = weight.shape[0]
    total = torch.empty_like(residual.rows)
    parts = triton.cdiv(hidden, _ROWS)
    squares = torch.empty(parts, batch, dtype=torch.float32, device=inputs.device)
    _project_add[(parts,)](
        inputs,
        weight,
        inputs if bias is None else bias,
        residual.rows,
        total,
        squares,
        batch,
        hidden,
        DEPTH=depth,
        HAS_BIAS=bias is not None,
        **_of_products(inputs),
    )
    return Residual(total, squares)


def rotate_and_insert(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    epsilon: float,
    ranks: RankHeadWeights | None,
    pools: Pools,
    contest: Contest,
) -> Tensor:
    """Rotate queries and keys, rank the keys, and put keys, values and ranks into the cache.

    Args:
        projected: (B, (H + 2 G) * D), see `norm_and_project`.
        cos, sin: (B or 1, D).
        norms: (D,) weights of the RMS norms of query and key heads, or None.
        epsilon: added to their mean squares.
        ranks: None: the newest keys stay.
        pools: changed in place.
        contest: of these pools, see `norm_and_project`.

    Returns:
        The rotated queries, (B, H, 1, D).
    """
    batch, slots, dim = pools.keys.shape
    groups = pools.clock.shape[1]
    heads = projected.shape[1] // dim - 2 * groups
    ratio = heads // groups
    query = projected.new_empty(batch, heads, 1, dim)
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
        (*pools[:5], *contest[:3]),
        width,
        groups,
        slots,
        contest.codes.shape[1],
        pools.local,
        HAS_NORM=norms is not None,
        HAS_RANK=ranks is not None,
        HAS_LIFT=lift is not None,
        GRID=1.0 if ranks is None else ranks.grid,
        RATIO=ratio,
        RATIO_PAD=triton.next_power_of_2(ratio),
        DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim),
        WIDTH_PAD=max(16, triton.next_power_of_2(width)),
        PARTS=max(16, triton.next_power_of_2(contest.most)),
        num_warps=4,
    )
    return query


@functools.lru_cache(maxsize=4096)
def _parts(offsets: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Slots of a part of the contest, and the first part of each head, then the number of all."""
    widest = max(stop - start for start, stop in itertools.pairwise(offsets))
    part = _SCANNED * max(1, triton.cdiv(widest, _SCANNED * _MOST_PARTS))
    starts = [0]
    for start, stop in itertools.pairwise(offsets):
        starts.append(starts[-1] + max(1, triton.cdiv(stop - start, part)))
    return part, tuple(starts)


def _of_products(rows: Tensor) -> dict[str, Any]:
    """What kernels that multiply rows (B, K) by weights are compiled for: tiles, precision and sizes of programs."""
    batch, depth = rows.shape
    tile = max(16, triton.next_power_of_2(batch))
    chunk = _CHUNK or (256 if tile == 16 else 128 if tile == 32 else 64)
    return {
        "TILE": tile,
        "CHUNK": min(chunk, max(16, triton.next_power_of_2(depth))),
        "N": _ROWS,
        "PRECISION": _precision(rows),
        "num_warps": _WARPS,
        "num_stages": _STAGES,
    }


def _square_parts(hidden: int) -> int:
    """At least the parts in which `project_and_add` leaves sums of squares."""
    return max(16, triton.next_power_of_2(triton.cdiv(hidden, _ROWS)))


def _precision(weight: Tensor) -> str:
    return "tf32" if weight.element_size() == 2 else "ieee"


@triton.jit
def _inverse_of(given, row, batch, parts, HIDDEN: tl.constexpr, SQUARES: tl.constexpr):
    """One over the root of the mean square of each row."""
    _rows, squares, _norm, epsilon = given
    part = tl.arange(0, SQUARES)
    there = (part < parts)[:, None] & (row < batch)[None, :]
    each = tl.load(squares + part[:, None] * batch + row[None, :], mask=there, other=0.0)
    return 1.0 / tl.sqrt(tl.sum(each, 0) / HIDDEN + epsilon)


@triton.jit
def _normed(given, row, k, inverse, batch, HIDDEN: tl.constexpr):
    """Rows and columns of the normalised residual, in the model's dtype."""
    rows, _squares, norm, _epsilon = given
    narrow = rows.dtype.element_ty
    there = (row < batch)[:, None] & (k < HIDDEN)[None, :]
    x = tl.load(rows + row[:, None] * HIDDEN + k[None, :], mask=there, other=0.0).to(tl.float32)
    weight = tl.load(norm + k, mask=k < HIDDEN, other=0.0).to(tl.float32)
    return ((x * inverse[:, None]).to(narrow).to(tl.float32) * weight[None, :]).to(narrow)


@triton.jit(
    do_not_specialize=["squares", "query_rows", "key_rows", "value_rows", "width", "groups", "slots", "part", "parts"]
)
def _norm_project(
    given,
    weights,
    projected,
    active,
    rank_epsilon,
    scanned,
    batch,
    squares,
    query_rows,
    key_rows,
    value_rows,
    width,
    groups,
    slots,
    part,
    parts,
    local,
    sinks,
    HIDDEN: tl.constexpr,
    SQUARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    N: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SCANNED: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_PRECISION: tl.constexpr,
):
    """N rows of one of the weights, or a part of the contest."""
    query, key, value, query_bias, key_bias, value_bias, rank_up = weights
    block = tl.program_id(0)
    projecting = tl.cdiv(query_rows, N) + tl.cdiv(key_rows, N) + tl.cdiv(value_rows, N) + tl.cdiv(width, N)
    if block >= projecting:
        _scan(scanned, block - projecting, groups, slots, part, parts, local, sinks, GROUPS_PAD, SCANNED)
        return
    row = tl.arange(0, TILE)
    inverse = _inverse_of(given, row, batch, squares, HIDDEN, SQUARES)
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
            x = _normed(given, row, k, inverse, batch, HIDDEN)
            mixed = tl.dot(x, tl.trans(w), mixed, input_precision=PRECISION)
        if HAS_BIAS:
            mixed += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
        place = projected + row[:, None] * (query_rows + key_rows + value_rows) + begin + n[None, :]
        there = (row < batch)[:, None] & (n < rows)[None, :]
        tl.store(place, mixed.to(projected.dtype.element_ty), mask=there)
    else:
        # The predictor normalises its input once more, without a weight.
        square = tl.zeros([TILE, CHUNK], tl.float32)
        for chunk in tl.static_range(0, HIDDEN, CHUNK):
            each = _normed(given, row, chunk + tl.arange(0, CHUNK), inverse, batch, HIDDEN).to(tl.float32)
            square += each * each
        again = 1.0 / tl.sqrt(tl.sum(square, 1) / HIDDEN + rank_epsilon)
        n = (block - rank_block) * N + tl.arange(0, N)
        for chunk in range(0, HIDDEN, CHUNK):
            k = chunk + tl.arange(0, CHUNK)
            at = rank_up + n[:, None] * HIDDEN + k[None, :]
            w = tl.load(at, mask=(n < width)[:, None] & (k < HIDDEN)[None, :], other=0.0)
            x = _normed(given, row, k, inverse, batch, HIDDEN).to(tl.float32)
            x = (x * again[:, None]).to(projected.dtype.element_ty).to(rank_up.dtype.element_ty)
            mixed = tl.dot(x, tl.trans(w), mixed, input_precision=RANK_PRECISION)
        unit = mixed.to(rank_up.dtype.element_ty).to(tl.float32)
        unit = (unit / (1.0 + tl.exp(-unit))).to(rank_up.dtype.element_ty).to(tl.float32)
        there = (row < batch)[:, None] & (n < width)[None, :]
        tl.store(active + row[:, None] * width + n[None, :], unit, mask=there)


@triton.jit
def _scan(scanned, index, groups, slots, part, parts, local, sinks, GROUPS_PAD: tl.constexpr, SCANNED: tl.constexpr):
    """One part of one head's slots, or none of them while the head has free ones."""
    ranks, positions, clock, table, codes, places = scanned
    b = (index // parts).to(tl.int64)
    which = index % parts
    head = tl.arange(0, GROUPS_PAD)
    starts = tl.load(table + groups + 1 + head, mask=head <= groups, other=2147483647)
    g = tl.sum((starts <= which).to(tl.int32), 0) - 1
    start = tl.load(table + g)
    stop = tl.load(table + g + 1)
    begin = start + (which - tl.load(table + groups + 1 + g)) * part
    now = tl.load(clock + b * groups + g)
    end = tl.where(now < stop - start, begin, tl.minimum(begin + part, stop))
    least, slot = _lowest(ranks, positions, b * slots, begin, end, now, local, sinks, SCANNED)
    tl.store(codes + b * parts + which, least)
    tl.store(places + b * parts + which, slot)


@triton.jit(do_not_specialize=["squares", "inner"])
def _norm_gate(
    given,
    gate,
    up,
    gated,
    batch,
    squares,
    inner,
    HIDDEN: tl.constexpr,
    SQUARES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """N inner units."""
    row = tl.arange(0, TILE)
    inverse = _inverse_of(given, row, batch, squares, HIDDEN, SQUARES)
    n = tl.program_id(0) * N + tl.arange(0, N)
    opened = tl.zeros([TILE, N], tl.float32)
    raised = tl.zeros([TILE, N], tl.float32)
    for chunk in range(0, HIDDEN, CHUNK):
        k = chunk + tl.arange(0, CHUNK)
        at = n[:, None] * HIDDEN + k[None, :]
        there = (n < inner)[:, None] & (k < HIDDEN)[None, :]
        g = tl.load(gate + at, mask=there, other=0.0)
        u = tl.load(up + at, mask=there, other=0.0)
        x = _normed(given, row, k, inverse, batch, HIDDEN)
        opened = tl.dot(x, tl.trans(g), opened, input_precision=PRECISION)
        raised = tl.dot(x, tl.trans(u), raised, input_precision=PRECISION)
    opened = opened.to(gated.dtype.element_ty).to(tl.float32)
    opened = (opened / (1.0 + tl.exp(-opened))).to(gated.dtype.element_ty).to(tl.float32)
    both = opened * raised.to(gated.dtype.element_ty).to(tl.float32)
    there = (row < batch)[:, None] & (n < inner)[None, :]
    tl.store(gated + row[:, None] * inner + n[None, :], both.to(gated.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["hidden"])
def _project_add(
    inputs,
    weight,
    bias,
    residual,
    total,
    squares,
    batch,
    hidden,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """N rows of the weight."""
    row = tl.arange(0, TILE)
    n = tl.program_id(0) * N + tl.arange(0, N)
    mixed = tl.zeros([TILE, N], tl.float32)
    for chunk in range(0, DEPTH, CHUNK):
        k = chunk + tl.arange(0, CHUNK)
        inside = (k < DEPTH)[None, :]
        w = tl.load(weight + n[:, None] * DEPTH + k[None, :], mask=(n < hidden)[:, None] & inside, other=0.0)
        x = tl.load(inputs + row[:, None] * DEPTH + k[None, :], mask=(row < batch)[:, None] & inside, other=0.0)
        mixed = tl.dot(x, tl.trans(w), mixed, input_precision=PRECISION)
    if HAS_BIAS:
        mixed += tl.load(bias + n, mask=n < hidden, other=0.0).to(tl.float32)[None, :]
    narrow = total.dtype.element_ty
    at = row[:, None] * hidden + n[None, :]
    there = (row < batch)[:, None] & (n < hidden)[None, :]
    sum_of_both = tl.load(residual + at, mask=there, other=0.0).to(tl.float32) + mixed.to(narrow).to(tl.float32)
    rounded = sum_of_both.to(narrow)
    tl.store(total + at, rounded, mask=there)
    x = tl.where(there, rounded.to(tl.float32), 0.0)
    tl.store(squares + tl.program_id(0) * batch + row, tl.sum(x * x, 1), mask=row < batch)


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


@triton.jit(do_not_specialize=["width", "groups", "slots", "parts", "local"])
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
    cache,
    width,
    groups,
    slots,
    parts,
    local,
    HAS_NORM: tl.constexpr,
    HAS_RANK: tl.constexpr,
    HAS_LIFT: tl.constexpr,
    GRID: tl.constexpr,
    RATIO: tl.constexpr,
    RATIO_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One key/value head of one row: its query heads, its key, its rank, its slot."""
    keys, values, ranks, positions, clock, codes, places, table = cache
    row = tl.program_id(0).to(tl.int64)
    b = row // groups
    g = row % groups
    now = tl.load(clock + row)
    start = tl.load(table + g)
    free = now < tl.load(table + g + 1) - start
    base = b * slots
    first = tl.load(table + groups + 1 + g)
    which = tl.arange(0, PARTS)
    there = which < tl.load(table + groups + 2 + g) - first
    nobody: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    code = tl.load(codes + b * parts + first + which, mask=there, other=nobody)
    least = tl.min(code, 0)
    place = tl.load(places + b * parts + first + which, mask=there, other=0)
    slot = tl.max(tl.where((code == least) & (least != nobody), place, 0), 0)
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
    "Contest",
    "Pools",
    "Projections",
    "RankHeadWeights",
    "Residual",
    "begin",
    "norm_and_gate",
    "norm_and_project",
    "project_and_add",
    "rotate_and_insert",
]
