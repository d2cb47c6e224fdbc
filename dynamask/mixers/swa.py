"""Sliding-window attention (SWA): every query sees the newest `window` positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.cache import BoundedLayer
from dynamask.mixers.base import GroupedQueryMixer, SequenceInfo, recency_expiry
from dynamask.mixers.dma import bounded_layer
from dynamask.ops import attend


class SlidingWindowAttention(GroupedQueryMixer):
    """Dynamic mask attention in which recency is the only score: `expiry = position + window`."""

    @classmethod
    def cache_layer(cls, config: Any) -> CacheLayerMixin:
        """A `BoundedLayer` whose window is all local."""
        return BoundedLayer(config.window, config.window)

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        layer = None if cache is None else bounded_layer(cache, self.layer_idx)
        if layer is not None:
            live = layer.extend(key, value, None, sequence.new_key_mask())
            return self.merge_heads(attend(query, live.key, live.value, live.expiry, max_live=self.config.window))
        if cache is not None:
            key, value = self.remember(cache, key, value, sequence)
        batch, groups, length = key.shape[:3]
        expiry = recency_expiry(batch, groups, length, self.config.window, sequence, key.device)
        return self.merge_heads(attend(query, key, value, expiry, max_live=self.config.window))
