"""Dense causal attention with grouped queries (MHA/GQA): the baseline every sparse mixer is measured against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from dynamask.mixers.base import GroupedQueryMixer, SequenceInfo, recency_expiry
from dynamask.ops.autocast import autocast_dtype
from dynamask.ops.interval.api import interval_attention


class MultiHeadAttention(GroupedQueryMixer):
    """Every query sees its whole prefix."""

    @classmethod
    def cache_layer(cls, config: Any, layer_idx: int) -> CacheLayerMixin:
        """Make transformers' growing layer: dense attention forgets nothing."""
        return DynamicLayer()

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        if cache is not None:
            key, value = self.remember(cache, key, value, sequence)
        return self.merge_heads(dense_attention(query, key, value, sequence))


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, sequence: SequenceInfo, scale: float | None = None
) -> Tensor:
    """Attend from the last Nq positions to all N, causally: fused SDPA where its masks suffice, else intervals.

    Args:
        query: (B, H, Nq, D); key (B, G, N, D); value (B, G, N, Dv).
        sequence: segments and padding.
        scale: factor on the logits, default D**-0.5.

    Returns:
        (B, H, Nq, Dv).
    """
    num_queries, length = query.shape[2], key.shape[2]
    if sequence.plain and (num_queries == length or num_queries == 1):
        width = value.shape[-1]
        dtype = autocast_dtype(query) or query.dtype  # that SDPA computes in
        if query.is_cuda and width != query.shape[-1] and not _fast_at(query.shape[-1], width, dtype):
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            query, key, value = _equal_widths(query, key, value)
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=num_queries > 1, scale=scale, enable_gqa=True
        )
        return output[..., :width]
    expiry = recency_expiry(key, [length] * key.shape[1], sequence)
    return interval_attention(query, key, value, expiry, scale=scale)


# A look at the machine, not at the data: one answer for all calls of a compiled graph.
@torch.compiler.assume_constant_result
def _fast_at(key_width: int, value_width: int, dtype: torch.dtype) -> bool:
    """Whether SDPA gives keys and values of these widths to a backend as fast as those for equal widths.

    cuDNN takes unequal widths (up to 128, and DeepSeek's 192 with 128) on Hopper and Blackwell, where PyTorch
    prefers it with a cuDNN newer than 9.15. Flash refuses them, and what is left runs on Ampere's instructions, at
    about half of flash's rate, while zeros up to the greater width add a fifth to the work of 192 with 128: hence
    `_equal_widths`. In float32, which only that last backend takes, zeros would win nothing.
    """
    if dtype not in (torch.float16, torch.bfloat16) or max(key_width, value_width) > 256:
        return True
    query = torch.empty(1, 1, 128, key_width, dtype=dtype, device="cuda", requires_grad=True)
    value = torch.empty(1, 1, 128, value_width, dtype=dtype, device="cuda", requires_grad=True)
    try:
        choice = torch._fused_sdp_choice(query, query, value, is_causal=True)
    except RuntimeError:  # the caller allows only backends that refuse them
        return False
    return choice in (SDPBackend.CUDNN_ATTENTION.value, SDPBackend.FLASH_ATTENTION.value)


def _equal_widths(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros up to the greater width: they add nothing to the products, and to the output only columns to cut off."""
    width = max(query.shape[-1], value.shape[-1])
    query, key, value = (F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (query, key, value))
    return query, key, value
