"""The keys of a stretch of the sequence that a later query may still see: at most `window[g]` per head.

The set of a stretch that is two stretches end to end is the set of their two sets: merging is associative, because a
key that a window of others outranks never returns.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dynamask.ops.expiry import sortable_scores

_NOWHERE = 1 << 62


class LiveKeys(NamedTuple):
    """A set of keys per head, in the order of the sequence; empty places come last.

    Attributes:
        key: (B, G, W, D); value: (B, G, W, Dv).
        rank: (B, G, W) float.
        position: (B, G, W) int64 in the whole sequence, -1 for an empty place.
    """

    key: Tensor
    value: Tensor
    rank: Tensor
    position: Tensor


def choose_live(
    rank: Tensor,
    position: Tensor,
    begin: Tensor,
    end: int,
    windows: tuple[int, ...],
    width: int,
    *,
    local: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """Choose the keys of a stretch that the query at its end, or a later one, may see.

    Args:
        rank: (B, G, M) float; position: (B, G, M) int64, rising where it is not -1 (no key).
        begin: (B,) int64, position at which the last document of the stretch begins; earlier keys are dropped.
        end: position after the stretch.
        windows: keys that each head keeps.
        width: places of the result, at most M; at least the keys that any head keeps.
        local, sinks: newest keys, and first keys of the document, that are always kept.

    Returns:
        index: (B, G, width) int64 into M, in the order of the sequence, places without a key last.
        kept: (B, G, width) bool, False in a place without a key.
    """
    begin = begin[:, None, None]
    real = position >= begin
    order = sortable_scores(rank)
    info = torch.iinfo(order.dtype)
    always = (position >= end - local) | (position < begin + sinks)
    order = torch.where(always, info.max, order)
    order = torch.where(real, order, info.min)
    if order.dtype == torch.int32:
        column = torch.arange(order.shape[-1], device=order.device)
        distinct = (order.long() << 32) | column  # on equal ranks the later one
        best = distinct.topk(width, dim=-1, sorted=min(windows) < width).indices
    else:
        best = order.sort(dim=-1, stable=True).indices.flip(-1)[..., :width]
    places = torch.arange(width, device=order.device)
    kept = real.gather(-1, best) & (places < window_column(windows, order.device))
    by_position = torch.where(kept, position.gather(-1, best), _NOWHERE).argsort(dim=-1)
    return best.gather(-1, by_position), kept.gather(-1, by_position)


def take(keys: LiveKeys, index: Tensor, kept: Tensor) -> LiveKeys:
    """Take the keys `index` (B, G, W); where not `kept`, a place without a key."""
    return LiveKeys(
        rows_of(keys.key, index),
        rows_of(keys.value, index),
        keys.rank.gather(-1, index),
        torch.where(kept, keys.position.gather(-1, index), -1),
    )


def rows_of(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (B, G, M, D) at index (B, G, W) -> (B, G, W, D)."""
    return rows.gather(2, index[..., None].expand(*index.shape, rows.shape[-1]))


def joined(first: LiveKeys, second: LiveKeys) -> LiveKeys:
    """Lay two sets side by side."""
    return LiveKeys(*(torch.cat(pair, dim=2) for pair in zip(first, second, strict=True)))


def text_order(position: Tensor, begin: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
    """Order a set so that `key_expiry` may read it as the beginning of a row.

    Args:
        position: (B, G, W) int64 of a set, -1 for an empty place, empty places last.
        begin: (B,) int64, where the document begins.
        sinks: first keys that are always kept.

    Returns:
        order: (B, G, W) int64. Places that are empty in every head of a row come first, as padding does; those that
            only some heads have, whose window is full, come between the sinks and the other keys, where they lose
            every contest.
        empty: (B,) int64, how many places come first.
    """
    width = position.shape[-1]
    there = position >= 0
    count = there.sum(-1, keepdim=True)
    empty = (width - count).amin(1)
    missing = torch.arange(width, device=position.device) - count
    between = torch.where(missing < empty[:, None], -1, 2 * (begin[:, None, None] + sinks) + 1)
    order = torch.where(there, 2 * position + 2, between).argsort(dim=-1, stable=True)
    return order, empty[:, 0]


@functools.lru_cache(maxsize=256)
def window_column(windows: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the windows as a column, (G, 1) int64."""
    with torch.inference_mode(False):
        return torch.tensor(windows, device=device)[:, None]


@functools.lru_cache(maxsize=256)
def occupied_places(windows: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Return the places of a set that can hold a key, (S,) int64 into G·width: the first `windows[g]` of head g."""
    with torch.inference_mode(False):
        places = [head * width + place for head, window in enumerate(windows) for place in range(min(window, width))]
        return torch.tensor(places, device=device)
