"""What every mixer shares: one signature, the facts of a batch, and the projections of a grouped-query layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.mixers.rotary import rotary_angles, rotate
from dynamask.ops.expiry import key_expiry
from dynamask.ops.nsa.blocks import BlockLayout


@dataclass(frozen=True)
class SequenceInfo:
    """Facts about a batch that every layer needs; the model builds it once per forward.

    Attributes:
        position_ids: (B, Nq) int64, the position of each query inside its own document.
        segment_ids: (B, Nq) non-decreasing int64 of packed documents, or None for one document per row. Only
            without a cache that already holds keys.
        key_mask: (B, N) bool, N = past + Nq, True for a real token, or None where nothing is padding.
        length: N, where the batch continues a cache; None leaves it to what the cache returns.
        angles: of `position_ids`, as `rotary_angles` gives them for the mixer's `rotary_dim`; None: not computed yet.
        blocks: nsa's, of all N keys; None: not laid out yet.
    """

    position_ids: Tensor
    segment_ids: Tensor | None = None
    key_mask: Tensor | None = None
    length: int | None = None
    angles: tuple[Tensor, Tensor] | None = None
    blocks: BlockLayout | None = None

    @property
    def plain(self) -> bool:
        """Neither packed nor padded."""
        return self.segment_ids is None and self.key_mask is None

    def new_key_mask(self) -> Tensor | None:
        """(B, Nq) bool, the part of `key_mask` that belongs to this call's own tokens."""
        return None if self.key_mask is None else self.key_mask[:, -self.position_ids.shape[1] :]

    def key_position_ids(self, length: int) -> Tensor:
        """(B, N) int64, the position of every key, cached ones included, inside its own document."""
        if length == self.position_ids.shape[1]:
            return self.position_ids
        if self.key_mask is not None:
            return (self.key_mask.long().cumsum(-1) - 1).clamp(min=0)
        first = self.position_ids[:, :1] - (length - self.position_ids.shape[1])
        return first + torch.arange(length, device=first.device)


def packed_segments(position_ids: Tensor) -> Tensor | None:
    """Segments of documents packed end to end, read off positions that start over, as in transformers.

    Args:
        position_ids: (B, N).

    Returns:
        (B, N) non-decreasing int64, or None where no position starts over. While compiling, which must not look
        at the data, always a tensor.
    """
    starts_over = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if torch.compiler.is_compiling() or bool(starts_over.any()):
        return F.pad(starts_over.long(), (1, 0)).cumsum(-1)
    return None


class Mixer(nn.Module, ABC):
    """A layer that moves information between the positions of a sequence, causally.

    Every mixer takes (B, Nq, hidden) and returns (B, Nq, hidden), and promises: outputs before position t do
    not depend on tokens from t on; cached and uncached, packed and separate, padded and unpadded runs agree.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        windows = getattr(config, "layer_windows", None)
        # Against the config's window, which may change while a model trains; not looked up by layer_idx at every call,
        # so that compiled layers of one window share a graph.
        self.window_share = (windows[layer_idx], config.window) if windows else (1, 1)
        rotating = getattr(config, "rope_layers", None)
        self.rotates: bool = rotating is None or rotating[layer_idx]

    @property
    def layer_window(self) -> int:
        """Keys that each query of this layer keeps."""
        own, common = self.window_share
        return max(1, self.config.window * own // common)

    @property
    def layer_local(self) -> int:
        """How many of them are the newest positions."""
        own, common = self.window_share
        return self.config.local * own // common  # type: ignore[no-any-return]

    @property
    def slope_factor(self) -> float:
        """From the config's slopes to this layer's: the wider its window, the flatter."""
        own, common = self.window_share
        return common / own  # type: ignore[no-any-return]

    @property
    @abstractmethod
    def rotary_dim(self) -> int:
        """How many dimensions of a head vector are rotated by its position."""

    @abstractmethod
    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """Mix.

        Args:
            hidden_states: (B, Nq, hidden) in the model's dtype.
            sequence: positions, segments and padding of the batch.
            cache: updated in place with this call's keys; None when nothing is to be remembered.

        Returns:
            (B, Nq, hidden). Padding positions hold numbers without meaning, never NaN.
        """

    def angles(self, sequence: SequenceInfo, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotary angles of the queries: the model's, computed once for all layers, or this layer's own."""
        if sequence.angles is not None:
            return sequence.angles
        return rotary_angles(sequence.position_ids, self.rotary_dim, self.config.rope_theta, dtype)

    def rotated(self, heads: Tensor, sequence: SequenceInfo) -> Tensor:
        """Head vectors (B, heads, Nq, rotary_dim) by their positions; as they are in a layer without RoPE."""
        return rotate(heads, self.angles(sequence, heads.dtype)) if self.rotates else heads

    def prepared(self, sequence: SequenceInfo) -> SequenceInfo:
        """The facts with what all layers of this kind would else compute each for itself. Most need nothing."""
        return sequence

    def remember(self, cache: Cache, key: Tensor, value: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor]:
        """Add this call's keys and values to a transformers cache.

        Returns:
            All keys and values so far, (B, G, N, D) each. A static cache returns the slots it has not written, too:
            they are cut off here.
        """
        return cached_rows(cache, key, value, self.layer_idx, sequence)

    @classmethod
    @abstractmethod
    def cache_layer(cls, config: Any) -> CacheLayerMixin:
        """A fresh cache layer of the kind this mixer decodes with."""


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

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), in the input's dtype."""
        # Under autocast weight and input differ, and only equal dtypes reach the fused kernel.
        weight = self.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, weight.shape, weight, self.eps)


class GroupedQueryMixer(Mixer):
    """Projections of Qwen3's attention: grouped-query q/k/v, RMSNorm on query and key heads, RoPE, output."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, groups, dim
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    @property
    def rotary_dim(self) -> int:
        """All of a head."""
        return self.head_dim

    def project(self, hidden_states: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, Nq, D), key and value (B, G, Nq, D), query and key rotated where the layer rotates."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        return self.rotated(query, sequence), self.rotated(key, sequence), value

    def merge_heads(self, output: Tensor) -> Tensor:
        """(B, H, Nq, D) -> (B, Nq, hidden) through the output projection."""
        return self.o_proj(output.transpose(1, 2).flatten(2))


def recency_expiry(
    batch: int, groups: int, length: int, window: int, sequence: SequenceInfo, device: torch.device
) -> Tensor:
    """Expiry (B, G, N) of the newest `window` positions; `window >= N` is dense causal attention."""
    nothing = torch.zeros(1, 1, 1, device=device).expand(batch, groups, length)
    return key_expiry(nothing, window, local=window, segment_ids=sequence.segment_ids, key_mask=sequence.key_mask)
