"""Dynamic mask attention with the call of flash-linear-attention's layers.

These layers take `(hidden_states, attention_mask, past_key_values, use_cache, output_attentions, **kwargs)` and return
`(output, None, past_key_values)`. The library itself is not imported: its caches are caches of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dynamask.cache import BoundedCache, BoundedLayer
from dynamask.errors import InvalidInputError
from dynamask.layers import DynamicMaskAttention as Layer


class DynamicMaskAttention(nn.Module):
    """`dynamask.DynamicMaskAttention` with the constructor and the call of an fla layer.

    Args:
        hidden_size: width of the input and output.
        num_heads: query heads.
        num_kv_heads: key/value heads; None: `num_heads`.
        layer_idx: which layer of a cache belongs to this layer; None: 0.
        **options: further arguments of `dynamask.DynamicMaskAttention`: window, local, sinks, ranking, head_dim,
            rope_theta, norm_eps.

    Attributes:
        attention: the layer itself; `attention.rank_loss` must be added to the loss, see there.

    Raises:
        InvalidInputError: as `dynamask.DynamicMaskAttention`.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        layer_idx: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layer_idx = 0 if layer_idx is None else layer_idx
        self.attention = Layer(
            hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, layer_idx=self.layer_idx, **options
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Cache | None]:
        """Attend.

        Args:
            hidden_states: (B, N, hidden_size).
            attention_mask: (B, past + N), 1 for a real token, or None.
            past_key_values: fla's `Cache`, or one of transformers. Where this layer's place in it is empty, a layer of
                bounded size is put there.
            use_cache: return a cache; one is made where none was given.
            output_attentions: not available.
            **kwargs: `cu_seqlens`, (documents + 1,) integers: the borders of documents packed into one row. Others
                are ignored, as in fla.

        Returns:
            (B, N, hidden_size), None, and the cache.

        Raises:
            InvalidInputError: output_attentions, `cu_seqlens` with several rows or a cache that holds keys, or what
                `dynamask.DynamicMaskAttention.forward` refuses.
        """
        if output_attentions:
            raise InvalidInputError("output_attentions: attention weights are never materialised")
        if use_cache and past_key_values is None:
            past_key_values = BoundedCache(windows=[], num_hidden_layers=0)
        segment_ids = None
        borders = kwargs.get("cu_seqlens")
        if borders is not None:
            segment_ids = segments_of(borders, hidden_states)
            if past_key_values is not None:
                raise InvalidInputError("documents packed by cu_seqlens leave no cache: call without past_key_values")
        if past_key_values is not None:
            self._take_place(past_key_values)
        output = self.attention(hidden_states, attention_mask, segment_ids=segment_ids, cache=past_key_values)
        return output, None, past_key_values

    def _take_place(self, cache: Cache) -> None:
        """Put a bounded layer into the cache where this layer's place in it is empty."""
        mixer, layers, index = self.attention.mixer, cache.layers, self.layer_idx
        if index < len(layers) and layers[index].is_initialized:
            if hasattr(layers[index], "state"):
                raise InvalidInputError(
                    f"layer {index} of this cache holds the state of another kind of layer: give each layer a "
                    "layer_idx of its own"
                )
            return
        bounded = BoundedLayer(mixer.windows, local=mixer.local, sinks=mixer.sinks)
        if index < len(layers):
            if not isinstance(layers[index], BoundedLayer):
                layers[index] = bounded
            return
        make = getattr(cache, "layer_class_to_replicate", None)
        while len(layers) < index:  # layers that are called later, or keep nothing
            layers.append(bounded if make is None else make())
        layers.append(bounded)


def segments_of(borders: Tensor, hidden_states: Tensor) -> Tensor:
    """Return the segment of each position, (1, N) int64, from the borders of packed documents.

    Args:
        borders: (documents + 1,) integers from 0 to N, not decreasing.
        hidden_states: (1, N, hidden).

    Raises:
        InvalidInputError: several rows, or borders that do not run from 0 to N.
    """
    batch, length = hidden_states.shape[:2]
    if batch != 1:
        raise InvalidInputError(f"cu_seqlens packs documents into one row; got a batch of {batch}")
    borders = borders.to(hidden_states.device).long()
    if borders.dim() != 1 or len(borders) < 2 or int(borders[0]) or int(borders[-1]) != length:
        raise InvalidInputError(f"cu_seqlens must run from 0 to {length}; got {borders.tolist()}")
    lengths = borders.diff()
    if bool((lengths < 0).any()):
        raise InvalidInputError(f"cu_seqlens must not decrease; got {borders.tolist()}")
    return torch.repeat_interleave(torch.arange(len(lengths), device=borders.device), lengths)[None]


__all__ = ["DynamicMaskAttention", "segments_of"]
