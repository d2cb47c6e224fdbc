"""The mixers of dynamask 0.1: dynamic mask attention with its options, and rivals with a penalty on distance."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.cache import BoundedLayer, bounded_layer
from dynamask.mixers import MultiHeadAttention, MultiHeadLatentAttention, SlidingWindowAttention
from dynamask.mixers.base import GroupedQueryMixer, Mixer, SequenceInfo, recency_expiry
from dynamask.ops.expiry import key_expiry
from dynamask.ops.interval.api import attend
from dynamask_lab.legacy.alibi import DistancePenalty
from dynamask_lab.legacy.attention_ranking import learn_ranks
from dynamask_lab.legacy.gate import OldGate


def _share(config: Any, layer_idx: int) -> tuple[int, int]:
    """This layer's window, and the one that slopes and `local` are given for."""
    return config.head_windows[layer_idx][0], config.mixer_options["window"]


class _Rotating(Mixer):
    """A mixer that rotates by positions in the layers that `rope_layers` says."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        rotating = config.mixer_options["rope_layers"]
        self.rotates: bool = rotating is None or rotating[layer_idx]
        own, self._common = _share(config, layer_idx)
        self.slope_factor = self._common / own

    @property
    def layer_local(self) -> int:
        """Newest positions that are kept, in proportion to the window of the moment."""
        return self.config.mixer_options["local"] * self.max_window // self._common  # type: ignore[no-any-return]

    def rotated(self, heads: Tensor, sequence: SequenceInfo) -> Tensor:
        """See `Mixer.rotated`."""
        return super().rotated(heads, sequence) if self.rotates else heads

    def penalty_of(self, config: Any, factor: float = 1.0) -> DistancePenalty | None:
        """The penalty on distance that the options give, if they do."""
        options = config.mixer_options
        slope = factor * options["distance_penalty"]
        return DistancePenalty(config.num_key_value_heads, slope, options["recency_spread"]) if slope else None


class OldDynamicMask(_Rotating, GroupedQueryMixer):
    """Grouped-query attention whose queries each see the `window` best-scored keys of their prefix."""

    bounded: ClassVar[bool] = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        options, factor = config.mixer_options, self.slope_factor
        self.gate = OldGate(
            self.num_key_value_heads,
            self.head_dim,
            score_form=options["score_form"],
            recency=options["recency"] * factor,
            recency_spread=options["recency_spread"],
            zero=options["gate_init"],
            rank_noise=options["rank_noise"],
            rank_recency=None if options["rank_recency"] is None else options["rank_recency"] * factor,
            ranking=options["ranking"],
            rank_power=options["rank_power"],
        )

    @classmethod
    def cache_layer(cls, config: Any, layer_idx: int) -> CacheLayerMixin:
        """A `BoundedLayer` of the layer's window and local part."""
        own, common = _share(config, layer_idx)
        return BoundedLayer(own, local=config.mixer_options["local"] * own // common)

    def check_cache(self, cache: Cache) -> None:
        """See `Mixer.check_cache`."""
        layer = bounded_layer(cache, self.layer_idx)
        if layer is not None:
            layer.check_fits(self.max_window, local=self.layer_local)

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        gate, window, local = self.gate, self.max_window, self.layer_local
        layer = None if cache is None else bounded_layer(cache, self.layer_idx)
        if layer is not None:
            scores = gate(value, sequence.position_ids)
            live = layer.extend(key, value, scores, sequence.new_key_mask())
            bias = gate.logit_bias(live.score, live.position, live.value)
            return self.merge_heads(attend(query, live.key, live.value, live.expiry, bias=bias, max_live=window))
        if cache is not None:
            key, value = self.remember(cache, key, value, sequence)
        position = sequence.key_position_ids(key.shape[2])
        scores = gate(value, position)
        segment_ids, key_mask = sequence.segment_ids, sequence.key_mask
        expiry = key_expiry(gate.ranks(scores), window, local=local, segment_ids=segment_ids, key_mask=key_mask)
        bias = gate.logit_bias(scores, position.unsqueeze(1), value)
        output = attend(query, key, value, expiry, bias=bias, max_live=window)
        learns = gate.ranking == "attention" and gate.training and torch.is_grad_enabled()
        if learns and query.shape[2] == key.shape[2]:
            output = learn_ranks(
                output,
                query,
                key,
                bias,
                scores,
                window=window,
                local=local,
                segment_ids=segment_ids,
                key_mask=key_mask,
                scale=query.shape[-1] ** -0.5,
                power=gate.rank_power,
            )
        return self.merge_heads(output)


class OldSliding(_Rotating, SlidingWindowAttention):
    """Sliding-window attention, with a penalty on distance where the options give one."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.penalty = self.penalty_of(config, self.slope_factor)

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        if self.penalty is None:
            return super().forward(hidden_states, sequence, cache)
        query, key, value = self.project(hidden_states, sequence)
        layer = None if cache is None else bounded_layer(cache, self.layer_idx)
        if layer is not None:
            # All of the window is local, so the scores decide nothing: they are where the cache keeps the penalty.
            live = layer.extend(key, value, self.penalty(sequence.position_ids), sequence.new_key_mask())
            return self.merge_heads(
                attend(query, live.key, live.value, live.expiry, bias=live.score, max_live=self.max_window)
            )
        if cache is not None:
            key, value = self.remember(cache, key, value, sequence)
        bias = self.penalty(sequence.key_position_ids(key.shape[2])).expand(key.shape[:3])
        expiry = recency_expiry(key, self.windows, sequence)
        return self.merge_heads(attend(query, key, value, expiry, bias=bias, max_live=self.max_window))


class OldDense(_Rotating, MultiHeadAttention):
    """Dense attention, with a penalty on distance where the options give one."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.penalty = self.penalty_of(config)

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        if self.penalty is None:
            return super().forward(hidden_states, sequence, cache)
        query, key, value = self.project(hidden_states, sequence)
        if cache is not None:
            key, value = self.remember(cache, key, value, sequence)
        length = key.shape[2]
        bias = self.penalty(sequence.key_position_ids(length)).expand(key.shape[:3])
        expiry = recency_expiry(key, [length] * key.shape[1], sequence)
        return self.merge_heads(attend(query, key, value, expiry, bias=bias, max_live=length))


class OldLatent(_Rotating, MultiHeadLatentAttention):
    """Latent attention whose shared key is rotated in some layers only."""
