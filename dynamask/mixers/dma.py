"""Dynamic Mask Attention (arXiv 2508.02124): keep, for every query, the best-scored keys of its prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.cache import BoundedLayer, bounded_layer
from dynamask.mixers.attention_ranking import learn_ranks
from dynamask.mixers.base import GroupedQueryMixer, SequenceInfo, cached_rows
from dynamask.mixers.gate import DynamicMaskGate
from dynamask.ops.expiry import key_expiry
from dynamask.ops.interval.api import attend


class DynamicMaskAttention(GroupedQueryMixer):
    """Grouped-query attention whose queries each see the `window` best-scored keys of their prefix."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate = DynamicMaskGate(
            self.num_key_value_heads,
            self.head_dim,
            score_form=config.score_form,
            recency=config.recency * self.slope_factor,
            recency_spread=config.recency_spread,
            zero=config.gate_init,
            rank_noise=config.rank_noise,
            rank_recency=None if config.rank_recency is None else config.rank_recency * self.slope_factor,
            ranking=config.ranking,
            rank_power=config.rank_power,
        )

    @classmethod
    def cache_layer(cls, config: Any) -> CacheLayerMixin:
        """A `BoundedLayer` of the config's window and local part."""
        return BoundedLayer(config.window, local=config.local)

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        output = dynamic_mask_mix(
            query,
            key,
            value,
            self.gate,
            sequence,
            window=self.layer_window,
            local=self.layer_local,
            cache=cache,
            # Not read without a cache: compiled layer by layer, one graph serves every layer then.
            layer_idx=self.layer_idx if cache is not None else 0,
        )
        return self.merge_heads(output)


def dynamic_mask_mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: DynamicMaskGate,
    sequence: SequenceInfo,
    *,
    window: int,
    local: int,
    cache: Cache | None,
    layer_idx: int,
    scale: float | None = None,
) -> Tensor:
    """DMA over projected heads, whatever the cache: none, a `BoundedCache`, or any transformers cache.

    A cache that keeps every key gives the same attention: the scores are computed again from the values it
    returns. Shared by the mixer and by the attention of converted models.

    Args:
        query: (B, H, Nq, D), rotated; key (B, G, Nq, D), rotated; value (B, G, Nq, D): this call's tokens.
        gate: scores the keys.
        sequence: positions, segments and padding.
        window, local: keys per query, and how many of them are the newest.
        cache, layer_idx: what to update, and which of its layers.
        scale: factor on the logits, default D**-0.5.

    Returns:
        (B, H, Nq, D).
    """
    layer = None if cache is None else bounded_layer(cache, layer_idx)
    if layer is not None:
        layer.check_fits(window, local=local)
        scores = gate(value, sequence.position_ids)
        live = layer.extend(key, value, scores, sequence.new_key_mask())
        bias = gate.logit_bias(live.score, live.position, live.value)
        return attend(query, live.key, live.value, live.expiry, bias=bias, scale=scale, max_live=window)
    if cache is not None:
        key, value = cached_rows(cache, key, value, layer_idx, sequence)
    position = sequence.key_position_ids(key.shape[2])
    scores = gate(value, position)
    facts = {"segment_ids": sequence.segment_ids, "key_mask": sequence.key_mask}
    expiry = key_expiry(gate.ranks(scores), window, local=local, **facts)
    bias = gate.logit_bias(scores, position.unsqueeze(1), value)
    output = attend(query, key, value, expiry, bias=bias, scale=scale, max_live=window)
    if gate.ranking == "attention" and gate.training and torch.is_grad_enabled() and query.shape[2] == key.shape[2]:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        output = learn_ranks(
            output,
            query,
            key,
            bias,
            scores,
            window=window,
            local=local,
            scale=scale,
            power=gate.rank_power,
            **facts,
        )
    return output
