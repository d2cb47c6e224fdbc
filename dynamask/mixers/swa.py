"""Sliding-window attention (SWA): every query sees the newest `window` positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.cache import BoundedLayer, bounded_layer
from dynamask.mixers.alibi import distance_penalty
from dynamask.mixers.base import GroupedQueryMixer, SequenceInfo, recency_expiry
from dynamask.ops.interval.api import attend


class SlidingWindowAttention(GroupedQueryMixer):
    """Dynamic mask attention in which recency is the only score: `expiry = position + window`."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.penalty = distance_penalty(config, self.slope_factor)

    @classmethod
    def cache_layer(cls, config: Any) -> CacheLayerMixin:
        """A `BoundedLayer` whose window is all local."""
        return BoundedLayer(config.window, local=config.window)

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        layer = None if cache is None else bounded_layer(cache, self.layer_idx)
        if layer is not None:
            layer.check_fits(self.layer_window, local=self.layer_window)
            # All of the window is local, so the scores decide nothing: they are where the cache keeps the penalty.
            bias = None if self.penalty is None else self.penalty(sequence.position_ids)
            live = layer.extend(key, value, bias, sequence.new_key_mask())
            bias = None if bias is None else live.score
            return self.merge_heads(
                attend(query, live.key, live.value, live.expiry, bias=bias, max_live=self.layer_window)
            )
        if cache is not None:
            key, value = self.remember(cache, key, value, sequence)
        batch, groups, length = key.shape[:3]
        expiry = recency_expiry(batch, groups, length, self.layer_window, sequence, key.device)
        bias = None
        if self.penalty is not None:
            bias = self.penalty(sequence.key_position_ids(length)).expand(batch, groups, length)
        return self.merge_heads(attend(query, key, value, expiry, bias=bias, max_live=self.layer_window))
