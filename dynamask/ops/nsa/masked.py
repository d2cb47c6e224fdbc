"""The selected branch of native sparse attention as dense attention under a mask, for contexts of some thousand tokens.

Gathered keys cost `block_counts * block_size` rows per query in memory traffic, forward and backward, and their
gradients are scattered back one by one. Up to some thousand tokens, fused attention over all keys under a mask costs
less.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_ELEMENTS = 1 << 30
"""Entries of the largest mask, of all heads: 2 GiB in bfloat16."""


def mask_fits(query: Tensor, key: Tensor) -> bool:
    """Whether queries (B, H, N, D) of all N positions on a GPU have a mask of at most `MASK_ELEMENTS` entries."""
    batch, heads, queries, _ = query.shape
    return query.is_cuda and queries == key.shape[2] and batch * heads * queries * queries <= MASK_ELEMENTS


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, *, block_size: int, scale: float
) -> Tensor:
    """Attend causally to the keys of the chosen blocks.

    Args:
        query: (B, H, N, D); key (B, G, N, D); value (B, G, N, Dv).
        chosen: (B, G, N, S) integers, blocks per query with its own among them, -1 for none.
        block_size: keys per block.
        scale: factor on the logits.

    Returns:
        (B, H, N, Dv).
    """
    heads, length = query.shape[1], query.shape[2]
    groups = key.shape[1]
    blocks = -(-length // block_size)
    place = torch.where(chosen >= 0, chosen, blocks).long()
    seen = torch.zeros((*chosen.shape[:3], blocks + 1), dtype=torch.bool, device=query.device).scatter(-1, place, True)
    mask = seen[..., :blocks].repeat_interleave(block_size, -1)[..., :length]
    mask = mask & torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    repeats = heads // groups
    # The fused kernels that take a mask want as many heads of keys as of queries.
    key, value, mask = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value, mask))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
