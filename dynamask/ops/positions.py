"""Positions of a padded or packed row: which tokens are real, which are sinks, where segments begin and end."""

from __future__ import annotations

import torch
from torch import Tensor


def real_positions(key_mask: Tensor | None, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Count the real tokens before each position, and find the position of each real token.

    Args:
        key_mask: (B, N) bool, True for a real token, or None where all are.
        batch, length, device: shape and place of the result.

    Returns:
        before: (B, N) int64, the number of real tokens before each position.
        nth: (B, N + 1) int64, the positions of the real tokens in order, then N to the end of the row.
    """
    position = torch.arange(length + 1, device=device).expand(batch, length + 1)
    if key_mask is None:
        return position[:, :length], position
    before = key_mask.cumsum(-1) - key_mask.long()
    nth = before.new_full((batch, length + 1), length)
    # Padding is written to the last place, which then is made N again.
    nth.scatter_(-1, torch.where(key_mask, before, length), position[:, :length])
    nth[:, length] = length
    return before, nth


def later_positions(local: int, before: Tensor, nth: Tensor) -> Tensor:
    """Find the real token that stands `local` real tokens after each position.

    Args:
        local: at least 0.
        before, nth: as `real_positions` returns them.

    Returns:
        (B, N) int64 positions; N where there is no such token.
    """
    return nth.gather(-1, (before + local).clamp(max=before.shape[-1]))


def sink_keys(sinks: int, before: Tensor, nth: Tensor, segment_ids: Tensor | None = None) -> Tensor | None:
    """Mark the first `sinks` real positions of each segment.

    Args:
        sinks: how many, 0 to N.
        before, nth: as `real_positions` returns them.
        segment_ids: (B, N) non-decreasing integers, or None for one segment.

    Returns:
        (B, N) bool, of no meaning at padding; None for no sinks.
    """
    if sinks == 0:
        return None
    sink = before < sinks
    if segment_ids is not None:
        # A key is a sink where the real token `sinks` places earlier belongs to another segment.
        earlier = nth.gather(-1, (before - sinks).clamp(min=0)).clamp(max=before.shape[-1] - 1)
        sink = sink | (segment_ids.gather(-1, earlier) != segment_ids)
    return sink


def segment_bounds(segment_ids: Tensor | None, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first position and one past the last position of each position's segment.

    Args:
        segment_ids: (B, N) non-decreasing integers, or None for one segment.
        batch, length, device: shape and place of the result.

    Returns:
        Two (B, N) int64 tensors.
    """
    position = torch.arange(length, device=device)
    if segment_ids is None:
        return position.new_zeros(batch, length), position.new_full((batch, length), length)
    opens = torch.ones_like(segment_ids, dtype=torch.bool)
    opens[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = torch.where(opens, position, 0).cummax(-1).values
    closes = torch.ones_like(opens)
    closes[:, :-1] = opens[:, 1:]
    end = torch.where(closes, position + 1, length).flip(-1).cummin(-1).values.flip(-1)
    return start, end
