"""Expiry on a GPU: `dynamask.ops.expiry` in a few launches, more of them for longer rows.

Rank the keys of a row by (segment, score, position). Keys of later segments then outrank a key, but stand after its
segment, where its expiry is cut off: one order of the row serves all of its segments, and nothing below knows of them
but that cut.

A key x expires at the first position whose prefix holds `count` keys that outrank it. Cut the row into chunks of
positions. T(p), the `count`-th best rank among the first p positions, only rises, so x belongs to the one chunk [s, e)
with T(s) <= x < T(e): if it stands behind that chunk it is dead on arrival, as most keys of a long row are; if it is
among the `count` best of the row it never expires. The others are at most as many as the chunk's keys. Of these, the
keys that stand before s fall in order of rank, one for each better key that arrives, so x expires where the r-th better
key of the chunk stands, r being how many older keys rank at or below x and at or above T(s). That is counted by one
thread per x, in one pass over the chunk.

On long rows most keys are dead on arrival and need no ranks. A value that `count` keys of a prefix reach is at most the
threshold behind that prefix, and the threshold only rises: every later key below the value is dropped at once, which
changes no other key's expiry. Such values ("floors") are found for a few prefixes by bisection, and the keys that are
left stand packed, in the order of their positions, as a row of their own.

The ranks come from a merge sort: runs sorted in registers, then up to 16 runs merged at a time, each key finding its
place in the other runs by bisection. T at the chunks' bounds comes from a table of counts per (bin of ranks, chunk).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from dynamask.ops.triton.expiry_kernels import _drop, _find_floors, _merge, _resolve, _sort_runs, _table

LONGEST = 1 << 22
"""Keys of a row, above which the table's rows of chunks no longer fit one program."""

_MERGED = 64
"""Keys that one program merges at a time."""

_RUNS = ((1 << 12, 512, 4), (1 << 13, 256, 2), (1 << 15, 512, 4), (LONGEST, 2048, 8))
"""Up to this many keys: keys of a run, and warps to sort it. Short rows cannot fill the GPU with long runs."""

_WAYS = 8
"""Runs merged at a time."""

_CHUNKS = ((1 << 14, 128, 2), (1 << 17, 256, 4), (1 << 20, 512, 4), (LONGEST, 1024, 8))
"""Up to this many keys: positions of a chunk, and warps to resolve it. The table shrinks with its length, resolving
grows with the square."""

_BINS = 512
"""Bins of ranks in the table."""

_FLOORS = (1024, 4096, 16384)
"""Prefixes behind which a floor is sought, each a power of two."""

_FILTER = (1 << 15, 16)
"""Drop keys below the floors of rows that are at least so long, and so many times as long as the fewest places."""

_SIFTED = 1024
"""Positions that one program sifts."""

_FILTERED_RUNS = ((1 << 15, 512, 4), (1 << 17, 256, 2), (LONGEST, 1024, 4))
"""As `_RUNS`, where rows were filtered."""

_FILTERED_CHUNKS = ((1 << 15, 128, 2), *_CHUNKS[1:])
"""As `_CHUNKS`, where rows were filtered."""

_PROGRAMS = 4096
"""Programs that merge, at most: where keys were dropped most would have nothing to do."""


def contested_expiry(
    scores: Tensor,
    counts: Sequence[int],
    local: int,
    sinks: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Compute `key_expiry` with `counts[g]` contested places in head g, in one launch of each kernel for all heads.

    Args:
        scores: (B, G, N) float of up to 32 bits, or int32 that compare as the scores rank (none the lowest int32,
            which stands for padding, none above 2**31 - 2). N <= `LONGEST`.
        counts: G places in the contest, at least 0, at least one of them in 1..N - 1.
        local: real tokens by which every expiry moves; it then ends at the end of the segment.
        sinks: first real positions of each segment that win every contest, at most min(counts).
        segment_ids: (B, N) non-decreasing integers.
        key_mask: (B, N) bool, True for a real token.

    Returns:
        (B, G, N) int32.
    """
    batch, groups, length = scores.shape
    rows = batch * groups
    scores, local, sinks = scores.contiguous(), min(local, length), min(sinks, length)
    packed, padded = segment_ids is not None, key_mask is not None
    ids = segment_ids.contiguous() if segment_ids is not None else scores
    mask, later = (scores, scores) if key_mask is None else _of_padding(key_mask, segment_ids, local, sinks)
    contested = [count for count in counts if 0 < count < length]
    per_head = len(set(counts)) > 1
    count = _on_device(tuple(min(c, length) for c in counts), scores.device) if per_head else contested[0]
    filtered = not packed and length >= max(_FILTER[0], _FILTER[1] * min(contested))
    run, warps = _fitting(_FILTERED_RUNS if filtered else _RUNS, length)
    chunk, resolve_warps = _fitting(_FILTERED_CHUNKS if filtered else _CHUNKS, length)
    runs, chunks = triton.cdiv(length, run), triton.cdiv(length, chunk)
    width = max(64, triton.next_power_of_2(triton.cdiv(length, _BINS)))
    bins, chunks_pad = triton.cdiv(length, width), max(32, triton.next_power_of_2(chunks))

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=scores.device)

    expiry, place, table = empty(batch, groups, length), empty(rows, length), empty(rows, bins, chunks)
    end = empty(batch, length) if packed else place
    key_type = torch.int64 if packed else torch.int32
    key, position = empty(rows, length, dtype=key_type), empty(rows, length)
    key_out, position_out = empty(rows, length, dtype=key_type), empty(rows, length)
    blocks, source, total = triton.cdiv(length, _SIFTED), place, place
    sifted = (place, place, place)
    if filtered:
        source, total = empty(rows, length), empty(rows)
        sifted = _sift(scores, mask, later, expiry, count, local, sinks, padded, per_head)
    _sort_runs[(runs, rows)](
        scores,
        ids,
        mask,
        *sifted,
        source,
        total,
        end,
        key,
        position,
        length,
        groups,
        length.bit_length(),
        sinks,
        blocks,
        RUN=run,
        LOG=run.bit_length() - 1,
        SIFTED=_SIFTED,
        BLOCKS_PAD=triton.next_power_of_2(blocks + 1),
        PACKED=packed,
        PADDED=padded,
        SINKS=sinks > 0,
        FILTERED=filtered,
        num_warps=warps,
    )
    while True:
        # As few levels as `_WAYS` allows, the runs divided evenly among them.
        levels = 1
        while _WAYS**levels < runs:
            levels += 1
        ways = 1
        while ways**levels < runs:
            ways *= 2
        tiles = triton.cdiv(length, _MERGED)
        _merge[(min(tiles, max(1, _PROGRAMS // rows)) if filtered else tiles, rows)](
            key,
            position,
            key_out,
            position_out,
            place,
            expiry,
            end,
            later,
            source,
            total,
            length,
            groups,
            run,
            count,
            local,
            WAYS=ways,
            KEYS=_MERGED,
            LAST=ways >= runs,
            PACKED=packed,
            PADDED=padded,
            PER_HEAD=per_head,
            FILTERED=filtered,
            num_warps=4,
        )
        key, key_out, position, position_out = key_out, key, position_out, position
        if ways >= runs:
            break
        run, runs = run * ways, triton.cdiv(runs, ways)
    order, candidate, fallen = position, position_out, (key_out if key_type == torch.int32 else empty(rows, length))
    _table[(bins, rows)](
        order,
        table,
        total,
        length,
        chunks,
        WIDTH=width,
        STEP=min(width, 1024),
        CHUNK=chunk,
        CHUNKS_PAD=chunks_pad,
        FILTERED=filtered,
        num_warps=1 if width < 256 else 4 if chunks_pad <= 1024 else 8,
    )
    # Nothing expires in the chunks that the least `count` keys fill.
    skipped = min(contested) // chunk
    _resolve[(chunks - skipped, rows)](
        order,
        place,
        table,
        candidate,
        fallen,
        empty(rows, length),
        empty(rows, length),
        expiry,
        end,
        mask,
        later,
        source,
        total,
        length,
        groups,
        count,
        local,
        skipped,
        chunks,
        bins,
        WIDTH=width,
        STEP=min(width, 1024),
        BINS_PAD=max(32, triton.next_power_of_2(bins)),
        CHUNK=chunk,
        PACKED=packed,
        PADDED=padded,
        PER_HEAD=per_head,
        FILTERED=filtered,
        num_warps=resolve_warps,
    )
    return expiry


def _sift(
    scores: Tensor,
    mask: Tensor,
    later: Tensor,
    expiry: Tensor,
    count: Tensor | int,
    local: int,
    sinks: int,
    padded: bool,
    per_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the keys below the floors, and write their expiry.

    Returns:
        ranks: (rows, N) int32, those of the keys left, of each block of `_SIFTED` positions from its start.
        positions: (rows, N) int32, in the same places.
        left: (rows, blocks) int32, how many of each block.
    """
    batch, groups, length = scores.shape
    rows, blocks = batch * groups, triton.cdiv(length, _SIFTED)
    ranks, positions, left, floors = (
        torch.empty(rows, size, dtype=torch.int32, device=scores.device)
        for size in (length, length, blocks, len(_FLOORS))
    )
    layout = {"PADDED": padded, "SINKS": sinks > 0}
    _find_floors[(len(_FLOORS), rows)](
        scores,
        mask,
        floors,
        count,
        length,
        groups,
        sinks,
        FIRST=_FLOORS[0],
        GROWTH=_FLOORS[1] // _FLOORS[0],
        LONGEST=_FLOORS[-1],
        PER_HEAD=per_head,
        **layout,
        num_warps=max(1, min(32, _FLOORS[-1] // 512)),
    )
    _drop[(blocks, rows)](
        scores,
        mask,
        later,
        floors,
        ranks,
        positions,
        left,
        expiry,
        length,
        groups,
        sinks,
        local,
        FIRST=_FLOORS[0],
        GROWTH=_FLOORS[1] // _FLOORS[0],
        FLOORS=len(_FLOORS),
        BLOCK=_SIFTED,
        **layout,
        num_warps=max(1, min(4, _SIFTED // 32)),
    )
    return ranks, positions, left


def _of_padding(key_mask: Tensor, segment_ids: Tensor | None, local: int, sinks: int) -> tuple[Tensor, Tensor]:
    """What the kernels read of rows with padding.

    Returns:
        mask: (B, N) uint8: 0 at padding, 2 at a sink, 1 at every other real token.
        later: (B, N) int32: the position `local` real tokens after each position, N where there is none.
    """
    from dynamask.ops.positions import later_positions, real_positions, sink_keys

    batch, length = key_mask.shape
    key_mask = key_mask.contiguous()
    before, nth = real_positions(key_mask, batch, length, key_mask.device)
    mask, later = key_mask.to(torch.uint8), later_positions(local, before, nth).to(torch.int32)
    sink = sink_keys(sinks, before, nth, segment_ids)
    return mask if sink is None else mask + (sink & key_mask), later


def _on_device(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """The counts of the heads on the device. Kept, because a copy to it would stall the stream in every call."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Memory of a graph is not for others to use, and a graph takes no copies from the host.
        filled = torch.empty(len(counts), dtype=torch.int32, device=device)
        for head, count in enumerate(counts):
            filled[head].fill_(count)
        return filled
    return _copied(counts, device)


@functools.lru_cache(maxsize=256)
def _copied(counts: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(counts, dtype=torch.int32, device=device)


def _fitting(table: tuple[tuple[int, ...], ...], length: int) -> tuple[int, ...]:
    return next(entry[1:] for entry in table if length <= entry[0])
