"""Dynamic Mask Attention (arXiv 2508.02124): keep, for every query, the best-ranked keys of its prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.cache import BoundedLayer, bounded_layer
from dynamask.errors import InvalidInputError
from dynamask.mixers.base import GroupedQueryMixer, SequenceInfo, cached_rows
from dynamask.mixers.gate import DynamicMaskGate
from dynamask.mixers.head_shard import HeadShard
from dynamask.mixers.rank_loss import rank_loss, rank_target
from dynamask.mixers.rank_predictor import RankPredictor, sloped_ranks
from dynamask.ops.bias import finite_bias
from dynamask.ops.context_parallel.api import context_parallel_attention
from dynamask.ops.expiry import key_expiry
from dynamask.ops.interval.api import attend
from dynamask.packed_ranks import check_carries_ranks, pack_ranks, unpack_ranks

LEARNING_ROWS = 4
"""Of so many rows of a training batch one teaches the ranks, at least one: future attention costs as much as dense
attention. Rows are drawn at random by whoever makes the batches, so no choice is left to make here, and the same rows
teach when a checkpointed layer is computed again."""


class DynamicMaskAttention(GroupedQueryMixer):
    """Grouped-query attention whose queries each see the best-ranked keys of their prefix.

    With `config.ranking="learned"` a `RankPredictor` on the layer's hidden state ranks the keys, and `config.slopes`
    raise the ranks with the position. It learns in training by a loss of its own, which reaches no other parameter.
    With "paper" a `DynamicMaskGate` on the values ranks them, and its scores are added to the logits, from which it
    learns.
    """

    bounded: ClassVar[bool] = True
    ranks_keys: ClassVar[bool] = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.slopes: tuple[float, ...] | None = config.head_slopes[layer_idx]
        self.gate: DynamicMaskGate | None = None
        self.rank_predictor: RankPredictor | None = None
        if config.ranking == "paper":
            self.gate = DynamicMaskGate(self.num_key_value_heads, self.head_dim)
        else:
            self.rank_predictor = RankPredictor(config.hidden_size, self.num_key_value_heads)

    def hold_heads(self, shard: HeadShard, group: Any) -> None:
        """See `GroupedQueryMixer.hold_heads`."""
        if self.gate is not None:
            raise InvalidInputError(
                'ranking="paper" scores every head from the values of all heads, which tensor parallelism (tp_plan) '
                'splits over the processes. Use ranking="learned", or FSDP'
            )
        super().hold_heads(shard, group)
        self.slopes = None if self.slopes is None else shard.of(self.slopes)

    @classmethod
    def cache_layer(cls, config: Any, layer_idx: int) -> CacheLayerMixin:
        """Make a `BoundedLayer` of the layer's windows."""
        return BoundedLayer(config.head_windows[layer_idx], local=config.local, sinks=config.sinks)

    def check_cache(self, cache: Cache) -> None:
        """See `Mixer.check_cache`."""
        layer = bounded_layer(cache, self.layer_idx)
        if layer is not None:
            layer.check_fits(self.windows, local=self.local, sinks=self.sinks, slopes=self.slopes)
        elif self.gate is None:
            check_carries_ranks(cache, self.layer_idx, self.head_dim)

    def forward(
        self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        if self.gate is not None:
            ranks = self.gate(value)
        else:
            assert self.rank_predictor is not None
            ranks = self.rank_predictor(hidden_states.detach())
        output = dynamic_mask_mix(
            query,
            key,
            value,
            ranks if self.slopes is None else sloped_ranks(ranks.detach(), self.slopes, sequence.position_ids),
            sequence,
            windows=self.windows,
            local=self.local,
            sinks=self.sinks,
            cache=cache,
            # Not read without a cache: compiled layer by layer, one graph serves every layer then.
            layer_idx=self.layer_idx if cache is not None else 0,
            gate=self.gate,
            slopes=self.slopes,
        )
        output = self.merge_heads(output)
        if self.rank_predictor is not None and cache is None and sequence.learns:
            return output, self._rank_loss(query, key, ranks, sequence)
        return output

    def _rank_loss(self, query: Tensor, key: Tensor, ranks: Tensor, sequence: SequenceInfo) -> Tensor:
        """() the distance of ranks from what they should be, over the rows that teach them."""
        rows = slice(None, None, LEARNING_ROWS)
        segment_ids, key_mask = sequence.segment_ids, sequence.key_mask
        target, valid = rank_target(
            query[rows],
            key[rows],
            local=self.local,
            segment_ids=None if segment_ids is None else segment_ids[rows],
            key_mask=None if key_mask is None else key_mask[rows],
            shards=sequence.shards,
            rows=rows,
        )
        return rank_loss(ranks[rows], target, valid, group=self.head_group, shards=sequence.shards)


def dynamic_mask_mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranks: Tensor,
    sequence: SequenceInfo,
    *,
    windows: Sequence[int],
    local: int,
    sinks: int,
    cache: Cache | None,
    layer_idx: int,
    scale: float | None = None,
    gate: DynamicMaskGate | None = None,
    slopes: tuple[float, ...] | None = None,
) -> Tensor:
    """Compute dynamic mask attention over projected heads, whatever the cache: none, a `BoundedCache`, or another.

    A cache that keeps every key gives the same attention. Shared by the mixer and by the attention of converted models.

    Args:
        query: (B, H, Nq, D), rotated; key (B, G, Nq, D), rotated; value (B, G, Nq, D): this call's tokens.
        ranks: (B, G, Nq) of this call's keys.
        sequence: positions, segments and padding.
        windows: G numbers, keys that each query keeps.
        local, sinks: newest and first positions that are always kept.
        cache, layer_idx: what to update, and which of its layers.
        scale: factor on the logits, default D**-0.5.
        gate: computed the ranks from the values, which are then added to the logits (the paper's form). None: learned
            ranks, which only rank.
        slopes: that the ranks already have, which a cache must share; None: none.

    Returns:
        (B, H, Nq, D).

    Raises:
        InvalidInputError: a cache that cannot carry ranks.
    """
    if sequence.shards is not None:
        return context_parallel_attention(
            query,
            key,
            value,
            ranks if gate is not None else ranks.detach(),
            windows,
            shards=sequence.shards,
            local=local,
            sinks=sinks,
            bias_is_rank=gate is not None,
            scale=scale,
        )
    layer = None if cache is None else bounded_layer(cache, layer_idx)
    if layer is not None:
        layer.check_fits(windows, local=local, sinks=sinks, slopes=slopes)
        new = sequence.new_key_mask()
        return layer.attend(query, key, value, ranks, key_mask=new, bias_is_rank=gate is not None, scale=scale)
    if cache is not None:
        if gate is None:
            check_carries_ranks(cache, layer_idx, value.shape[-1], value.dtype)
            key, stored = cached_rows(cache, key, pack_ranks(value, ranks), layer_idx, sequence)
            value, ranks = unpack_ranks(stored)
        else:
            key, value = cached_rows(cache, key, value, layer_idx, sequence)
            ranks = gate(value)
    expiry = key_expiry(
        ranks.detach(),
        windows,
        local=local,
        sinks=sinks,
        segment_ids=sequence.segment_ids,
        key_mask=sequence.key_mask,
    )
    bias = None if gate is None else finite_bias(ranks)
    return attend(query, key, value, expiry, bias=bias, scale=scale, max_live=tuple(windows))
