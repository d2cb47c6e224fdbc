"""Native sparse attention (NSA, arXiv 2502.11089): compressed, selected and sliding branches, learned gates."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from dynamask.mixers.base import GroupedQueryMixer, SequenceInfo
from dynamask.ops import attend
from dynamask.ops.nsa import block_layout, nsa_attention


class NativeSparseAttention(GroupedQueryMixer):
    """Grouped-query attention whose queries see block means, the best blocks, and a sliding window.

    On a GPU, flash-linear-attention's kernels run where they are installed and take the shape: H / G a power of
    two of at least 16, which no preset has, blocks of a power of two, no padding, no packing, as many queries as
    keys. Elsewhere `dynamask.ops.nsa`.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.g_proj = nn.Linear(config.hidden_size, self.num_heads * 3, bias=False)

    @classmethod
    def default_dimensions(cls, config: Any) -> dict[str, int]:
        """Block, selection and window so that a query sees about `config.window` keys in the last two branches."""
        block = config.nsa_block_size or max(4, min(64, config.window // 8))
        return {
            "nsa_block_size": block,
            # The first, current and previous block are always among them.
            "nsa_block_counts": max(4, config.window // 2 // block),
            "nsa_window": max(1, config.window // 2),
        }

    @classmethod
    def cache_layer(cls, config: Any) -> CacheLayerMixin:
        """transformers' growing layer: any block may be selected again, so every key is kept."""
        return DynamicLayer()

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        if cache is not None:
            key, value = self.remember(cache, key, value, sequence)
        gates = self.g_proj(hidden_states).sigmoid().unflatten(-1, (self.num_heads, 3)).transpose(1, 2)
        batch, _, length, _ = key.shape
        config = self.config
        options = {"block_size": config.nsa_block_size, "block_counts": config.nsa_block_counts}
        if (
            sequence.plain
            and query.shape[2] == length
            and _kernels_take(query, key, config.nsa_block_size, config.nsa_block_counts)
        ):
            return self.merge_heads(_kernels(query, key, value, gates, window=config.nsa_window, **options))
        layout = block_layout(batch, length, config.nsa_block_size, key.device, sequence.segment_ids, sequence.key_mask)
        output = nsa_attention(query, key, value, gates, window=config.nsa_window, layout=layout, **options)
        return self.merge_heads(output)


def _kernels_take(query: Tensor, key: Tensor, block_size: int, block_counts: int) -> bool:
    """Whether flash-linear-attention is installed and its kernels support these heads and blocks."""
    ratio = query.shape[1] // key.shape[1]
    powers = all(n & (n - 1) == 0 for n in (ratio, block_size, block_counts))
    # fla asks for 16 heads to fill a tile, and sorts candidates in tiles of half a block.
    if not query.is_cuda or not powers or ratio < 16 or block_size < max(16, 2 * block_counts):
        return False
    return importlib.util.find_spec("fla") is not None


def _kernels(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, *, block_size: int, block_counts: int, window: int
) -> Tensor:
    """(B, H, N, D): fla's compressed and selected branches, and the sliding one as interval attention.

    fla's own sliding branch calls flash-attn, which it does not bring along.
    """
    from fla.ops.nsa import parallel_nsa

    by_position = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    compressed, selected, sliding = gates.to(query.dtype).unbind(-1)
    output = parallel_nsa(
        *by_position,
        g_cmp=compressed.transpose(1, 2).contiguous(),
        g_slc=selected.transpose(1, 2).contiguous(),
        block_size=block_size,
        block_counts=block_counts,
    ).transpose(1, 2)
    batch, groups, length = key.shape[:3]
    position = torch.arange(length, dtype=torch.int32, device=key.device)
    expiry = (position + window).clamp(max=length).expand(batch, groups, length).contiguous()
    return output + sliding.unsqueeze(-1) * attend(query, key, value, expiry, max_live=window)
