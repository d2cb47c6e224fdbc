"""Future attention in Triton: the log-sum-exp of every query row, then a maximum per key over its later queries.

Both kernels take one query head each. The first holds a tile of queries and walks the keys before it, a flash forward
without values. The second holds a tile of keys and walks the queries after it; the heads of a group meet in an atomic
maximum, which gives the same bits in any order. Each walk has a main part without a mask, and a tested part: the
tiles at the diagonal, at the ends of segments, and all of a walk that has padding inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynamask.ops.positions import segment_bounds
from dynamask.ops.triton.inputs import tile_width

LOG2E = 1.4426950408889634
_NAN = tl.constexpr(0x7FC00000)


@dataclass(frozen=True)
class Tiles:
    """Shape of a kernel's work.

    Attributes:
        queries, keys: rows of the tile that is held and of the tile that walks.
        warps, stages: warps of a program and tiles in flight.
        tma: whether tiles are copied by the tensor memory accelerator (Hopper and later).
        registers: most registers of a thread, so that more programs share a multiprocessor and one multiplies while
            another takes exponents. None: as the compiler likes.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    registers: int | None = None


def future_attention_launch(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    local: int,
    first_query: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    sum_tiles: Tiles | None = None,
    max_tiles: Tiles | None = None,
) -> Tensor:
    """Compute `dynamask.future_attention` on checked arguments; max(local, first_query) < N.

    Args:
        lse: (B, H, N) float log-sum-exp of the logits, or None.
        sum_tiles, max_tiles: work of the two kernels; None: by head width, dtype and GPU.

    Returns:
        (B, G, N) float32.
    """
    query, key = query.contiguous(), key.contiguous()
    batch, _, length, _ = query.shape
    bounds = _bounds(segment_ids, key_mask, batch, length, query.device)
    if lse is None:
        lse = log_sum_exp_launch(query, key, bounds, max(local, first_query), scale, sum_tiles)
    else:
        lse = (lse.float() * LOG2E).contiguous()
    return largest_launch(query, key, lse, bounds, local, first_query, scale, max_tiles)


@dataclass(frozen=True)
class Bounds:
    """What each position sees, beside causality.

    Attributes:
        start, end: (B, N) int32 first real position of each position's segment and one past its last; None: 0 and N.
        real: (B, N) uint8, 0 for padding; None: no padding.
        padding: (B, N + 1) int32 number of padding positions before each position; None: no padding.
    """

    start: Tensor | None = None
    end: Tensor | None = None
    real: Tensor | None = None
    padding: Tensor | None = None


def _bounds(
    segment_ids: Tensor | None, key_mask: Tensor | None, batch: int, length: int, device: torch.device
) -> Bounds:
    if segment_ids is None and key_mask is None:
        return Bounds()
    start, end = segment_bounds(segment_ids, batch, length, device)
    if key_mask is None:
        return Bounds(start.int().contiguous(), end.int().contiguous())
    # Padding at the ends of a segment is cut off here, so that only padding inside one slows the kernels down.
    position = torch.arange(length, device=device)
    following = torch.where(key_mask, position, length).flip(-1).cummin(-1).values.flip(-1)
    preceding = torch.where(key_mask, position, -1).cummax(-1).values
    first = torch.minimum(following.gather(-1, start), end)
    last = torch.maximum(preceding.gather(-1, end - 1) + 1, start)
    padding = torch.nn.functional.pad((~key_mask).int().cumsum(-1, dtype=torch.int32), (1, 0))
    return Bounds(
        first.int().contiguous(), last.int().contiguous(), key_mask.to(torch.uint8).contiguous(), padding.contiguous()
    )


def sum_tiles_of(dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Work of the log-sum-exp kernel for a head width."""
    if dtype == torch.float32:
        return Tiles(64 if dim <= 128 else 32, 32 if dim <= 128 else 16, 4, 1)
    if not _hopper(device):
        return Tiles(128 if dim <= 128 else 64, 64 if dim <= 64 else 32, 4, 2)
    if dim <= 64:
        return Tiles(128, 64, 4, 3, tma=True, registers=128)
    if dim <= 128:
        return Tiles(128, 128, 8, 2, tma=True, registers=128)
    return Tiles(128, 64, 8, 2, tma=True)


def max_tiles_of(dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Work of the maximum kernel for a head width."""
    if dtype == torch.float32:
        return Tiles(64 if dim <= 128 else 32, 32 if dim <= 128 else 16, 4, 1)
    if not _hopper(device):
        return Tiles(64 if dim <= 128 else 32, 64, 4, 2)
    if dim <= 64:
        return Tiles(64, 128, 4, 3, tma=True, registers=168)
    if dim <= 128:
        return Tiles(64, 128, 4, 2, tma=True, registers=168)
    return Tiles(64, 64, 4, 2, tma=True)


def _hopper(device: torch.device) -> bool:
    # Or a data-centre Blackwell: the others have too little shared memory.
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def log_sum_exp_launch(
    query: Tensor, key: Tensor, bounds: Bounds, first: int, scale: float, tiles: Tiles | None = None
) -> Tensor:
    """Compute log2 of the sum of exp2 of the logits (in units of log2) of the queries from `first` on: (B, H, N)."""
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    tiles = tiles or sum_tiles_of(dim, query.dtype, query.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    width = tile_width(dim)
    items = (triton.cdiv(length, tiles.queries) - first // tiles.queries) * batch * heads
    tma = tiles.tma and _fits_tma(key)
    _log_sum_exp[(items,)](
        query,
        _descriptor(key, tiles.keys, width) if tma else key,
        *_given(bounds.start, bounds.real, bounds.padding, instead=lse),
        lse,
        scale * LOG2E,
        length,
        batch * heads,
        heads,
        heads // groups,
        items,
        _processors(query.device),
        DIM=dim,
        WIDTH=width,
        M=tiles.queries,
        N=tiles.keys,
        BOUNDED=bounds.start is not None,
        PADDED=bounds.real is not None,
        TMA=tma,
        STAGES=tiles.stages,
        PRECISION=_precision(query),
        num_warps=tiles.warps,
        maxnreg=tiles.registers,
    )
    return lse


def largest_launch(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    bounds: Bounds,
    local: int,
    first_query: int,
    scale: float,
    tiles: Tiles | None = None,
) -> Tensor:
    """Compute the largest weight of each key (B, G, N) from `lse` as `log_sum_exp_launch` gives it."""
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    tiles = tiles or max_tiles_of(dim, query.dtype, query.device)
    # Weights are not negative, and such floats compare as their bits do.
    largest = torch.zeros(batch, groups, length, dtype=torch.float32, device=query.device)
    width = tile_width(dim)
    tma = tiles.tma and _fits_tma(query)
    items = triton.cdiv(length - local, tiles.keys) * batch * heads
    _largest[(items,)](
        _descriptor(query, tiles.queries, width) if tma else query,
        key,
        *_given(bounds.end, bounds.real, bounds.padding, instead=lse),
        lse,
        largest.view(torch.int32),
        scale * LOG2E,
        length,
        local,
        first_query,
        batch * heads,
        heads,
        heads // groups,
        items,
        _processors(query.device),
        DIM=dim,
        WIDTH=width,
        M=tiles.queries,
        N=tiles.keys,
        BOUNDED=bounds.end is not None,
        PADDED=bounds.real is not None,
        TMA=tma,
        STAGES=tiles.stages,
        PRECISION=_precision(query),
        num_warps=tiles.warps,
        # With padding the tested part is long, and would spill.
        maxnreg=None if bounds.real is not None else tiles.registers,
    )
    return largest


def _precision(query: Tensor) -> str:
    # Three products of 10-bit parts keep float32's accuracy on tensor cores.
    return "tf32" if query.element_size() == 2 else "tf32x3"


def _given(*tensors: Tensor | None, instead: Tensor) -> tuple[Tensor, ...]:
    return tuple(instead if tensor is None else tensor for tensor in tensors)


def _fits_tma(rows: Tensor) -> bool:
    """Whether a contiguous (B, heads, N, D) tensor can be copied by the tensor memory accelerator, head after head."""
    aligned = rows.data_ptr() % 16 == 0 and rows.shape[3] * rows.element_size() % 16 == 0
    return aligned and rows.numel() // rows.shape[3] < 2**31


def _descriptor(rows: Tensor, block: int, width: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = rows.view(-1, rows.shape[3])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [block, width])


@triton.jit
def _tile(
    source,
    head,
    length,
    begin,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows begin..begin + ROWS of a head; columns from DIM on are zeros.

    EDGE: rows may lie past the end of the head. By pointers they are zeros, else the rows of the next head.
    """
    if TMA:
        tile = source.load([head * length + begin, 0])
    else:
        row = tl.arange(0, ROWS)
        d = tl.arange(0, WIDTH)
        place = source + (head.to(tl.int64) * length + begin) * DIM + (row[:, None] * DIM + d[None, :])
        if EDGE:
            tile = tl.load(place, mask=(begin + row < length)[:, None] & (d < DIM)[None, :], other=0.0)
        elif DIM == WIDTH:
            tile = tl.load(place)
        else:
            tile = tl.load(place, mask=(d < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def _item(rows, items, processors):
    """Block, counted from the longest walk, and head of this program.

    Long walks come first, so that no straggler is left at the end. Every other round over the multiprocessors runs
    backwards: where all programs run at once, each multiprocessor then has long and short walks.
    """
    item = tl.program_id(0)
    turn = item // processors
    backwards = turn * processors + tl.minimum((turn + 1) * processors, items) - 1 - item
    item = tl.where(turn % 2 == 1, backwards, item)
    return item // rows, item % rows


@triton.jit(do_not_specialize=["length", "rows", "heads", "ratio", "items", "processors"])
def _log_sum_exp(
    query,
    key,
    start,
    real,
    padding,
    lse,
    factor,
    length,
    rows,
    heads,
    ratio,
    items,
    processors,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BOUNDED: tl.constexpr,
    PADDED: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last queries have the longest walks.
    place, head = _item(rows, items, processors)
    first = (tl.cdiv(length, M) - 1 - place) * M
    key_head = head // ratio
    row = (head // heads).to(tl.int64) * length
    i = first + tl.arange(0, M)
    n = tl.arange(0, N)
    q = _tile(query, head, length, first, M, DIM, WIDTH, True, False)

    # Keys low..low + main · N are seen by every query of the tile. Each query's newest key, itself, is not among them.
    low = 0
    main = first // N
    i_start = i
    if BOUNDED:
        low = tl.load(start + row + first)
        same = tl.load(start + row + tl.minimum(first + M, length) - 1) == low
        main = tl.where(same, tl.maximum(first - low, 0) // N, 0)
        i_start = tl.load(start + row + i, mask=i < length, other=0)
    if PADDED:
        padding += (head // heads).to(tl.int64) * (length + 1)
        inside = tl.load(padding + low + main * N) - tl.load(padding + low)
        main = tl.where(inside == 0, main, 0)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for begin in tl.range(low + main * N, tl.minimum(first + M, length), N, num_stages=1):
        j = begin + n
        k = _tile(key, key_head, length, begin, N, DIM, WIDTH, True, TMA)
        seen = j[None, :] <= i[:, None]
        if BOUNDED:
            seen = seen & (j[None, :] >= i_start[:, None])
        if PADDED:
            seen = seen & (tl.load(real + row + j, mask=j < length, other=0) != 0)[None, :]
        s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet has top -inf; -inf - -inf would be NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        top = new_top

    # The main part keeps the reference point that the diagonal gave, and so needs no running maximum. The sum holds
    # at least the weight 1 of that point and cannot vanish; it overflows where a logit lies far (2^127) above the
    # point. Such a tile, or one with a row that has no point yet, is walked again with a running maximum.
    base = tl.where(top == float("-inf"), 0.0, top)
    main_total = tl.zeros([M], tl.float32)
    for step in tl.range(0, main, num_stages=STAGES):
        k = _tile(key, key_head, length, low + step * N, N, DIM, WIDTH, False, TMA)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        main_total += tl.sum(tl.exp2(s * factor - base[:, None]), 1)
    failed = (main_total == float("inf")) | (top == float("-inf"))
    if tl.max(failed.to(tl.int32), 0) > 0:
        for step in tl.range(0, main, num_stages=1):
            k = _tile(key, key_head, length, low + step * N, N, DIM, WIDTH, False, TMA)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
            top = new_top
    else:
        total += main_total
    tl.store(lse + head.to(tl.int64) * length + i, top + tl.log2(total), mask=i < length)


@triton.jit(do_not_specialize=["length", "local", "first_query", "rows", "heads", "ratio", "items", "processors"])
def _largest(
    query,
    key,
    end,
    real,
    padding,
    lse,
    largest,
    factor,
    length,
    local,
    first_query,
    rows,
    heads,
    ratio,
    items,
    processors,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BOUNDED: tl.constexpr,
    PADDED: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The first keys have the longest walks.
    place, head = _item(rows, items, processors)
    first = place * N
    key_head = head // ratio
    row = (head // heads).to(tl.int64) * length
    lse += head.to(tl.int64) * length
    j = first + tl.arange(0, N)
    m = tl.arange(0, M)
    k = tl.trans(_tile(key, key_head, length, first, N, DIM, WIDTH, True, False))

    # Queries low..stop may count for some key of the tile; those from `clear` to `whole` count for every key.
    last = tl.minimum(first + N, length) - 1
    low = tl.maximum(first + local, first_query)
    stop = length
    whole = length
    j_end = j
    if BOUNDED:
        stop = tl.load(end + row + last)
        whole = tl.load(end + row + first)
        j_end = tl.load(end + row + j, mask=j < length, other=0)
    before = tl.cdiv(tl.maximum(last + local, first_query) - low, M)
    clear = low + before * M
    main = tl.maximum(whole - clear, 0) // M
    if PADDED:
        padding += (head // heads).to(tl.int64) * (length + 1)
        clear_in = tl.minimum(clear, length)
        inside = tl.load(padding + tl.minimum(clear + main * M, length)) - tl.load(padding + clear_in)
        main = tl.where(inside == 0, main, 0)
    tested = tl.cdiv(tl.maximum(stop - low, 0), M) - main

    best = tl.full([M, N], float("-inf"), tl.float32)
    for step in tl.range(0, main, num_stages=STAGES):
        begin = clear + step * M
        q = _tile(query, head, length, begin, M, DIM, WIDTH, False, TMA)
        sums = tl.load(lse + begin + m)
        s = tl.dot(q, k, input_precision=PRECISION)
        best = tl.maximum(best, s * factor - sums[:, None], propagate_nan=tl.PropagateNan.ALL)
    for step in tl.range(0, tested, num_stages=1):
        begin = low + (step + tl.where(step >= before, main, 0)) * M
        i = begin + m
        q = _tile(query, head, length, begin, M, DIM, WIDTH, True, TMA)
        sums = tl.load(lse + i, mask=i < length, other=0.0)
        counted = (i[:, None] >= j[None, :] + local) & (i < stop)[:, None]
        if BOUNDED:
            counted = counted & (i[:, None] < j_end[None, :])
        if PADDED:
            counted = counted & (tl.load(real + row + i, mask=i < length, other=0) != 0)[:, None]
        s = tl.dot(q, k, input_precision=PRECISION)
        s = tl.where(counted, s * factor - sums[:, None], float("-inf"))
        best = tl.maximum(best, s, propagate_nan=tl.PropagateNan.ALL)

    # `tl.max` drops a NaN. The limit is for rounding.
    invalid = tl.max((best != best).to(tl.int32), 0) > 0
    weight = tl.minimum(tl.exp2(tl.max(best, 0)), 1.0)
    bits = tl.where(invalid, _NAN, weight.to(tl.int32, bitcast=True))
    written = (j < length) & (bits != 0)
    if PADDED:
        written = written & (tl.load(real + row + j, mask=j < length, other=0) != 0)
    tl.atomic_max(largest + key_head.to(tl.int64) * length + j, bits, mask=written, sem="relaxed")
