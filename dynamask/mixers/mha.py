"""Dense causal attention with grouped queries (MHA/GQA): the baseline every sparse mixer is measured against."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from dynamask.mixers.base import GroupedQueryMixer, SequenceInfo, recency_expiry
from dynamask.mixers.distance import distance_penalty
from dynamask.ops import attend, interval_attention


class MultiHeadAttention(GroupedQueryMixer):
    """Every query sees its whole prefix; with `config.distance_penalty`, the far of it less."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.penalty = distance_penalty(config)

    @classmethod
    def cache_layer(cls, config: Any) -> CacheLayerMixin:
        """transformers' growing layer: dense attention forgets nothing."""
        return DynamicLayer()

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        if cache is not None:
            key, value = self.remember(cache, key, value, sequence)
        if self.penalty is None:
            return self.merge_heads(dense_attention(query, key, value, sequence))
        batch, groups, length = key.shape[:3]
        bias = self.penalty(sequence.key_position_ids(length)).expand(batch, groups, length)
        expiry = recency_expiry(batch, groups, length, length, sequence, key.device)
        return self.merge_heads(attend(query, key, value, expiry, bias=bias, max_live=length))


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, sequence: SequenceInfo, scale: float | None = None
) -> Tensor:
    """Causal attention of the last Nq positions over all N: fused SDPA where its masks suffice, else intervals.

    Args:
        query: (B, H, Nq, D); key (B, G, N, D); value (B, G, N, Dv).
        sequence: segments and padding.
        scale: factor on the logits, default D**-0.5.

    Returns:
        (B, H, Nq, Dv).
    """
    batch, _, num_queries, _ = query.shape
    groups, length = key.shape[1], key.shape[2]
    if sequence.plain and (num_queries == length or num_queries == 1):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=num_queries > 1, scale=scale, enable_gqa=True
        )
    expiry = recency_expiry(batch, groups, length, length, sequence, key.device)
    return interval_attention(query, key, value, expiry, scale=scale)
