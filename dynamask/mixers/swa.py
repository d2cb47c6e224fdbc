"""Sliding-window attention (SWA): every query sees the newest positions and the first ones."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.cache import BoundedLayer, bounded_layer
from dynamask.mixers.base import GroupedQueryMixer, SequenceInfo, recency_expiry
from dynamask.ops.context_parallel.api import context_parallel_attention
from dynamask.ops.interval.api import attend


class SlidingWindowAttention(GroupedQueryMixer):
    """Dynamic mask attention without a choice: the newest keys, and the first `sinks` of each document.

    Source: arXiv 2309.17453 (sinks).
    """

    bounded: ClassVar[bool] = True

    @classmethod
    def cache_layer(cls, config: Any, layer_idx: int) -> CacheLayerMixin:
        """Make a `BoundedLayer` that keeps the newest keys."""
        windows = config.head_windows[layer_idx]
        return BoundedLayer(windows, local=min(windows) - config.sinks, sinks=config.sinks)

    def check_cache(self, cache: Cache) -> None:
        """See `Mixer.check_cache`."""
        layer = bounded_layer(cache, self.layer_idx)
        if layer is not None:
            layer.check_fits(self.windows, local=min(self.windows) - self.sinks, sinks=self.sinks)

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        if sequence.shards is not None:
            shards, sinks = sequence.shards, self.sinks
            output = context_parallel_attention(query, key, value, None, self.windows, shards=shards, sinks=sinks)
            return self.merge_heads(output)
        layer = None if cache is None else bounded_layer(cache, self.layer_idx)
        if layer is not None:
            layer.check_fits(self.windows, local=min(self.windows) - self.sinks, sinks=self.sinks)
            return self.merge_heads(layer.attend(query, key, value, None, key_mask=sequence.new_key_mask()))
        if cache is not None:
            key, value = self.remember(cache, key, value, sequence)
        expiry = recency_expiry(key, self.windows, sequence, sinks=self.sinks)
        return self.merge_heads(attend(query, key, value, expiry, max_live=self.max_window))
