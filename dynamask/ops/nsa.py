"""Native sparse attention (NSA, arXiv 2502.11089) in plain torch: compressed, selected and sliding branches.

Works in document coordinates: every document starts a block of its own, so packing and padding change nothing.
The parameterisation is that of flash-linear-attention (mean-pooled blocks; the first, the current and the
previous block always selected), with which `tests/ops/test_nsa.py` compares it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError

QUERY_BLOCK = 128
"""Queries per tile: bounds memory at O(QUERY_BLOCK · (blocks + selected · block_size)) per head."""


@dataclass(frozen=True)
class BlockLayout:
    """Where the keys lie once every document has been padded to whole blocks.

    Attributes:
        slot: (B, N) int64, place of each key in the padded layout; padding keys point past its end.
        rows: (B, T) int64, the key at each place, or N where there is none; T a multiple of the block.
        block_start: (B, C) int64, first block of the document that block c belongs to, -1 for a block no
            document owns.
        block_size: keys per block.
    """

    slot: Tensor
    rows: Tensor
    block_start: Tensor
    block_size: int


def block_layout(
    batch: int,
    length: int,
    block_size: int,
    device: torch.device,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> BlockLayout:
    """Lay documents out in whole blocks.

    Args:
        batch, length: B and N.
        block_size: keys per block.
        segment_ids: (B, N) non-decreasing, or None for one document per row.
        key_mask: (B, N) bool, True for a real token, or None.

    Returns:
        The layout of the real tokens of each document, in order, each document starting a block.
    """
    if block_size < 1:
        raise InvalidInputError(f"block_size must be at least 1; got {block_size}")
    if segment_ids is None:
        segment_ids = torch.zeros(batch, length, dtype=torch.long, device=device)
    if key_mask is None:
        key_mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    opens = torch.ones_like(key_mask)
    opens[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    document = opens.long().cumsum(-1) - 1
    count = torch.zeros(batch, length, dtype=torch.long, device=device).scatter_add_(-1, document, key_mask.long())
    blocks = (count + block_size - 1) // block_size
    first_block = blocks.cumsum(-1) - blocks
    before = (count.cumsum(-1) - count).gather(-1, document)
    offset = key_mask.long().cumsum(-1) - 1 - before
    total = max(1, int(blocks.sum(-1).max()))
    slot = first_block.gather(-1, document) * block_size + offset
    slot = torch.where(key_mask, slot, total * block_size)
    rows = torch.full((batch, total * block_size + 1), length, dtype=torch.long, device=device)
    rows.scatter_(-1, slot, torch.arange(length, device=device).expand(batch, length))
    rows = rows[:, :-1]
    # Block c belongs to the last document that starts at or before it.
    block = torch.arange(total, device=device)
    owner = torch.searchsorted(first_block.contiguous(), block.expand(batch, total).contiguous(), right=True) - 1
    block_start = first_block.gather(-1, owner)
    used = rows.view(batch, total, block_size)[..., 0] < length
    return BlockLayout(slot, rows, torch.where(used, block_start, -1), block_size)


def nsa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    *,
    block_size: int,
    block_counts: int,
    window: int,
    layout: BlockLayout,
    scale: float | None = None,
) -> Tensor:
    """Gated sum of attention to compressed blocks, to selected blocks and to the newest keys.

    Args:
        query: (B, H, Nq, D), the last Nq positions; key, value (B, G, N, D).
        gates: (B, H, Nq, 3), weights of the compressed, selected and sliding branch.
        block_size: keys per block.
        block_counts: blocks a query selects, the first, current and previous one of its document included.
        window: newest keys the sliding branch sees.
        layout: from `block_layout`, over all N positions.
        scale: default D**-0.5.

    Returns:
        (B, H, Nq, D) in the query's dtype; zeros for padding queries.

    Source: arXiv 2502.11089, equations 5 to 12; `fla.ops.nsa.naive.naive_nsa`.
    """
    if block_counts < 1 or window < 0:
        raise InvalidInputError(f"block_counts must be >= 1 and window >= 0; got {block_counts} and {window}")
    batch, heads, num_queries, dim = query.shape
    groups, length = key.shape[1], key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    # One empty row behind the last key stands in wherever the layout has no key.
    padded_key = torch.nn.functional.pad(key.to(wide), (0, 0, 0, 1))
    padded_value = torch.nn.functional.pad(value.to(wide), (0, 0, 0, 1))
    rows = layout.rows[:, None, :, None].expand(batch, groups, -1, dim)
    laid_key = padded_key.gather(2, rows)
    laid_value = padded_value.gather(2, rows)
    blocks = layout.rows.shape[1] // block_size
    # Only whole blocks are ever seen compressed, so the mean over block_size is the mean over their keys.
    mean_key = laid_key.view(batch, groups, blocks, block_size, dim).mean(3)
    mean_value = laid_value.view(batch, groups, blocks, block_size, dim).mean(3)
    grouped = query.to(wide).view(batch, groups, heads // groups, num_queries, dim) * scale
    gate = gates.to(wide).view(batch, groups, heads // groups, num_queries, 3)
    slots = layout.slot[:, length - num_queries :]
    tiles = []
    for start in range(0, num_queries, QUERY_BLOCK):
        part = slice(start, min(start + QUERY_BLOCK, num_queries))
        tile_slot = slots[:, part]
        tiles.append(
            _tile(
                grouped[:, :, :, part],
                gate[:, :, :, part],
                tile_slot,
                (laid_key, laid_value, mean_key, mean_value),
                layout,
                block_counts,
                window,
            )
        )
    return torch.cat(tiles, dim=3).reshape(batch, heads, num_queries, dim).to(query.dtype)


def _tile(
    query: Tensor,
    gate: Tensor,
    slot: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    layout: BlockLayout,
    block_counts: int,
    window: int,
) -> Tensor:
    """One block of queries (B, G, R, M, D) at places `slot` (B, M); the rest as in `nsa_attention`."""
    laid_key, laid_value, mean_key, mean_value = tensors
    size, total = layout.block_size, layout.rows.shape[1]
    real = slot < total
    slot = slot.clamp(max=total - 1)
    block = torch.arange(mean_key.shape[2], device=slot.device)
    own = slot // size
    start = layout.block_start.gather(-1, own)
    in_document = (block >= start[..., None]) & (layout.block_start >= 0)[:, None]
    whole = in_document & ((block + 1) * size - 1 <= slot[..., None])  # (B, M, C)

    logits = torch.einsum("bgrmd,bgcd->bgrmc", query, mean_key)
    weights = _softmax(logits, whole[:, None, None])
    output = gate[..., 0:1] * torch.einsum("bgrmc,bgcd->bgrmd", weights, mean_value)

    # Selection: the probabilities above, averaged over the query heads that share the keys.
    with torch.no_grad():
        importance = weights.mean(2)
        forced = (block == own[..., None]) | (block == own[..., None] - 1) | (block == start[..., None])
        forced &= in_document & (block <= own[..., None])
        importance = torch.where(forced[:, None], 1.0, importance)
        allowed = (whole | forced)[:, None]
        importance = importance.masked_fill(~allowed, -1.0)
        best = importance.topk(min(block_counts, len(block)), dim=-1)
        chosen, selected = best.indices, best.values >= 0
    place = (chosen.unsqueeze(-1) * size + torch.arange(size, device=slot.device)).flatten(-2)  # (B, G, M, S·size)
    seen = selected.repeat_interleave(size, dim=-1) & (place <= slot[:, None, :, None])
    output = output + gate[..., 1:2] * _gathered(query, laid_key, laid_value, place, seen)

    if window:
        place = slot[..., None] - torch.arange(window - 1, -1, -1, device=slot.device)
        seen = place >= start[..., None] * size
        place = place.clamp(min=0)[:, None].expand(-1, laid_key.shape[1], -1, -1)
        output = output + gate[..., 2:3] * _gathered(query, laid_key, laid_value, place, seen[:, None])
    return output.masked_fill(~real[:, None, None, :, None], 0.0)


def _gathered(query: Tensor, key: Tensor, value: Tensor, place: Tensor, seen: Tensor) -> Tensor:
    """Attention of (B, G, R, M, D) queries to the keys at `place` (B, G, M, L) where `seen`."""
    batch, groups, rows, width = place.shape
    index = place.reshape(batch, groups, rows * width, 1).expand(-1, -1, -1, key.shape[-1])
    shape = (batch, groups, rows, width, key.shape[-1])
    logits = torch.einsum("bgrmd,bgmld->bgrml", query, key.gather(2, index).view(shape))
    weights = _softmax(logits, seen[:, :, None])
    return torch.einsum("bgrml,bgmld->bgrmd", weights, value.gather(2, index).view(shape))


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen; zeros, and zero gradients, where nothing is."""
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    return logits.softmax(-1).masked_fill(~seen, 0.0)
