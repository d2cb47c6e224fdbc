"""What every mixer shares: one signature, the facts of a batch, and the projections of a grouped-query layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.cache import bounded_layer
from dynamask.errors import InvalidInputError
from dynamask.mixers.head_shard import HeadShard, with_summed_gradient
from dynamask.mixers.rotary import RotaryFrequencies, rotate
from dynamask.ops.context_parallel.shards import ContextShards
from dynamask.ops.looks import looks_allowed
from dynamask.ops.nsa.blocks import BlockLayout
from dynamask.ops.positions import later_positions, real_positions, segment_bounds, sink_keys


@dataclass(frozen=True)
class SequenceInfo:
    """Facts about a batch that every layer needs; the model builds it once per forward.

    Attributes:
        position_ids: (B, Nq) int64, the position of each query inside its own document.
        segment_ids: (B, Nq) non-decreasing int64 of packed documents, or None for one document per row. Only
            without a cache that already holds keys.
        key_mask: (B, N) bool, N = past + Nq, True for a real token, or None where nothing is padding.
        length: N, where the batch continues a cache; None leaves it to what the cache returns.
        angles: of `position_ids`, as `RotaryFrequencies.angles` gives them for one mixer's `rotary_dim`; None: not
            computed yet.
        blocks: nsa's, of all N keys; None: not laid out yet.
        shards: how the sequence is split over processes, where it is; `position_ids` and `segment_ids` are then of this
            process's shard. Never with a cache or padding.
        learns: whether mixers that learn beside the language model return their losses. Decided once for a forward: a
            checkpointed layer runs without gradients first, and must return as much as when it runs again.
    """

    position_ids: Tensor
    segment_ids: Tensor | None = None
    key_mask: Tensor | None = None
    length: int | None = None
    angles: tuple[Tensor, Tensor] | None = None
    blocks: BlockLayout | None = None
    shards: ContextShards | None = None
    learns: bool = False

    @property
    def plain(self) -> bool:
        """Return whether the rows are neither packed nor padded."""
        return self.segment_ids is None and self.key_mask is None

    def new_key_mask(self) -> Tensor | None:
        """Return the part of `key_mask` that belongs to the tokens of this call, (B, Nq) bool."""
        return None if self.key_mask is None else self.key_mask[:, -self.position_ids.shape[1] :]

    def key_position_ids(self, length: int) -> Tensor:
        """Return the position of every key inside its document, cached keys included, (B, N) int64."""
        if length == self.position_ids.shape[1]:
            return self.position_ids
        if self.key_mask is not None:
            return (self.key_mask.long().cumsum(-1) - 1).clamp(min=0)
        first = self.position_ids[:, :1] - (length - self.position_ids.shape[1])
        return first + torch.arange(length, device=first.device)


def packed_segments(position_ids: Tensor, key_mask: Tensor | None = None, *, gaps_split: bool) -> Tensor | None:
    """Find the documents packed end to end in each row, from positions that start over.

    Args:
        position_ids: (B, N).
        key_mask: (B, N) bool, True for a real token; positions of padding are not read. None: no padding.
        gaps_split: see `starts_over`.

    Returns:
        (B, N) non-decreasing int64, or None where no position starts over. While compiling or recording, which
        must not look at the data, always a tensor.
    """
    starts = starts_over(position_ids, key_mask, gaps_split=gaps_split)
    if not looks_allowed() or bool(starts.any()):
        return starts.long().cumsum(-1)
    return None


def starts_over(position_ids: Tensor, key_mask: Tensor | None = None, *, gaps_split: bool) -> Tensor:
    """Mark the first token of every packed document but a row's first.

    Args:
        position_ids: (B, N). A document starts where a position does not rise. Behind padding it starts at position 0
            alone: `generate()` counts on from the padding there.
        key_mask: (B, N) bool, True for a real token; positions of padding are not read. None: no padding.
        gaps_split: whether a document also starts behind a position that rises by another step than 1. transformers
            reads positions so where a call has neither an attention mask nor a cache, and not at all elsewhere: the
            other steps are then gaps inside of a document, or interpolated positions.

    Returns:
        (B, N) bool.
    """
    before = F.pad(position_ids[:, :-1], (1, 0))
    starts = position_ids != before + 1 if gaps_split else position_ids <= before
    starts[:, 0] = False
    if key_mask is not None:
        behind_real = F.pad(key_mask[:, :-1], (1, 0))
        some = F.pad(key_mask.cumsum(-1)[:, :-1] > 0, (1, 0))  # a row's first real token starts nothing over
        starts = key_mask & torch.where(behind_real, starts, some & (position_ids == 0))
    return starts


class Mixer(nn.Module, ABC):
    """A layer that moves information between the positions of a sequence, causally.

    Every mixer takes (B, Nq, hidden) and returns (B, Nq, hidden), and promises: outputs before position t do
    not depend on tokens from t on; cached and uncached, packed and separate, padded and unpadded runs agree.
    """

    bounded: ClassVar[bool] = False
    """Whether `windows` keys per KV head are all that later queries can see: `BoundedCache` serves such mixers."""

    ranks_keys: ClassVar[bool] = False
    """Whether `config.slopes` are added to ranks that this mixer gives its keys."""

    sub_configuration: ClassVar[str | None] = None
    """Field of `DynamaskConfig` that holds the dimensions of this mixer alone, filled by `default_dimensions`."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        # Not looked up by layer_idx at every call, so that compiled layers of equal windows share a graph.
        self.windows: tuple[int, ...] = config.head_windows[layer_idx]
        self.local: int = config.local
        self.sinks: int = config.sinks
        self._frequencies: RotaryFrequencies | None = None

    @property
    def max_window(self) -> int:
        """Return the most keys that a query of any head keeps."""
        return max(self.windows)

    @property
    @abstractmethod
    def rotary_dim(self) -> int:
        """Return how many dimensions of a head vector are rotated by its position."""

    @abstractmethod
    def forward(
        self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            hidden_states: (B, Nq, hidden) in the model's dtype.
            sequence: positions, segments and padding of the batch.
            cache: updated in place with this call's keys; None when nothing is to be remembered.

        Returns:
            (B, Nq, hidden). Padding positions hold numbers without meaning, never NaN. In training a mixer may return
            a pair: this, and a loss () of its own, which the model adds to its loss.
        """

    def angles(self, sequence: SequenceInfo, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return rotary angles of the queries: the model's, or this layer's where its heads are of another width."""
        if sequence.angles is not None and sequence.angles[0].shape[-1] == self.rotary_dim:
            return sequence.angles
        if self._frequencies is None:
            self._frequencies = RotaryFrequencies(self.config, self.rotary_dim)
        return self._frequencies.angles(sequence.position_ids, dtype)

    def rotated(self, heads: Tensor, sequence: SequenceInfo) -> Tensor:
        """Rotate head vectors (B, heads, Nq, rotary_dim) by their positions."""
        return rotate(heads, self.angles(sequence, heads.dtype))

    def prepared(self, sequence: SequenceInfo) -> SequenceInfo:
        """Add to the facts what all layers of this kind share. Most need nothing."""
        return sequence

    def check_cache(self, cache: Cache) -> None:
        """Refuse a cache whose layer cannot serve this mixer. A model asks all mixers before any of them writes to it.

        Raises:
            InvalidInputError: it cannot.
        """
        if not self.bounded and bounded_layer(cache, self.layer_idx) is not None:
            raise InvalidInputError(
                f"layer {self.layer_idx} ({type(self).__name__}) sees every past key, and a bounded cache does not "
                "keep them: use dynamask.models.new_cache(model.config) or DynamicCache()"
            )

    def remember(self, cache: Cache, key: Tensor, value: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Add this call's keys and values to a transformers cache.

        Returns:
            All keys and values so far, (B, G, N, D) each. A static cache returns the slots it has not written, too:
            they are cut off here.
        """
        return cached_rows(cache, key, value, self.layer_idx, sequence)

    @classmethod
    @abstractmethod
    def cache_layer(cls, config: Any, layer_idx: int) -> CacheLayerMixin:
        """Make an empty cache layer of the kind this mixer decodes with in that layer."""

    @classmethod
    def default_dimensions(cls, config: Any, given: dict[str, Any]) -> dict[str, int | None]:
        """Fill the mixer's sub-configuration.

        Args:
            config: the configuration.
            given: dimensions that were given, some or all of them.

        Returns:
            Every dimension the mixer has, given or derived.
        """
        return {}


def cached_rows(
    cache: Cache, key: Tensor, value: Tensor, layer_idx: int, sequence: SequenceInfo
) -> tuple[Tensor, Tensor]:
    """See `Mixer.remember`."""
    key, value = cache.update(key, value, layer_idx)
    if sequence.length is None or key.shape[2] <= sequence.length:
        return key, value
    return key[:, :, : sequence.length], value[:, :, : sequence.length]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.group: Any = None  # of processes that apply it to heads of their own

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise (..., dim), in the input's dtype."""
        # Under autocast weight and input differ, and only equal dtypes reach the fused kernel.
        weight = self.weight if self.group is None else with_summed_gradient(self.weight, self.group)
        weight = weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, weight.shape, weight, self.eps)


class GroupedQueryMixer(Mixer):
    """Projections of Qwen3's attention: grouped-query q/k/v, RMSNorm on query and key heads, RoPE, output."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_shard: HeadShard | None = None
        self.head_group: Any = None
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, groups, dim
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    @property
    def rotary_dim(self) -> int:
        """Return the width of a head: all of it is rotated."""
        return self.head_dim

    def hold_heads(self, shard: HeadShard, group: Any) -> None:
        """Take over a part of the heads, after the projections have been split over the processes of a group."""
        self.windows = shard.of(self.windows)
        self.num_heads, self.num_key_value_heads = self.num_heads // shard.size, self.num_key_value_heads // shard.size
        self.head_shard, self.head_group = shard, group
        self.q_norm.group = self.k_norm.group = group

    def project(self, hidden_states: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor, Tensor]:
        """Project to query (B, H, Nq, D), key and value (B, G, Nq, D), query and key rotated."""
        query = self.q_norm(self._heads(self.q_proj(hidden_states))).transpose(1, 2)
        key = self.k_norm(self._heads(self.k_proj(hidden_states))).transpose(1, 2)
        value = self._heads(self.v_proj(hidden_states)).transpose(1, 2)
        return self.rotated(query, sequence), self.rotated(key, sequence), value

    def _heads(self, projected: Tensor) -> Tensor:
        """View (B, Nq, heads · D) as (B, Nq, heads, D). An empty batch does not tell a -1 in a shape."""
        return projected.view(*projected.shape[:-1], projected.shape[-1] // self.head_dim, self.head_dim)

    def merge_heads(self, output: Tensor) -> Tensor:
        """Project heads (B, H, Nq, D) to (B, Nq, hidden)."""
        return self.o_proj(output.transpose(1, 2).flatten(2))


def recency_expiry(key: Tensor, windows: Sequence[int], sequence: SequenceInfo, *, sinks: int = 0) -> Tensor:
    """Compute the expiry of a sliding window that also keeps the first positions of each document.

    Equals `key_expiry` of equal scores, without a contest.

    Args:
        key: (B, G, N, D); its shape and device are read.
        windows: G numbers, keys that each query keeps, the sinks among them. `windows >= N` is dense causal attention.
        sequence: segments and padding of all N positions.
        sinks: first positions of each document that are kept.

    Returns:
        (B, G, N) int32.
    """
    batch, _, length, _ = key.shape
    segment_ids, key_mask = sequence.segment_ids, sequence.key_mask
    before, nth = real_positions(key_mask, batch, length, key.device)
    _, end = segment_bounds(segment_ids, batch, length, key.device)
    by_window = {
        window: torch.minimum(later_positions(min(window - sinks, length), before, nth), end)
        for window in dict.fromkeys(windows)
    }
    expiry = torch.stack([by_window[window] for window in windows], dim=1)
    sink = sink_keys(min(sinks, length), before, nth, segment_ids)
    if sink is not None:
        expiry = torch.where(sink[:, None], end[:, None], expiry)
    if key_mask is not None:
        expiry = torch.where(key_mask[:, None], expiry, torch.arange(length, device=key.device))
    return expiry.to(torch.int32).contiguous()
