"""Ranks inside the values of an ordinary key/value cache.

transformers' `DynamicCache` and `StaticCache` keep keys and values, and nothing from which a learned rank could be
computed again: ranks come from hidden states. The rank's bits therefore travel as extra channels of the value. A cache
copies, crops, reorders and offloads values without computing with them, so the bits arrive unchanged. A cache that
quantises values would destroy them and is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, QuantizedLayer

from dynamask.errors import InvalidInputError


def rank_channels(dtype: torch.dtype) -> int:
    """Return how many channels of this dtype a rank takes: 1 of float64 or float32, 2 of bfloat16 or float16.

    Raises:
        InvalidInputError: a dtype that cannot carry a rank.
    """
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise InvalidInputError(
            f"values of a cache must be float64, float32, bfloat16 or float16 to carry ranks; got {dtype}"
        )
    return 1 if dtype.itemsize >= 4 else 2


def pack_ranks(value: Tensor, ranks: Tensor) -> Tensor:
    """Append the bits of the ranks to the values as extra channels.

    Args:
        value: (B, G, N, D) float64, float32, bfloat16 or float16.
        ranks: (B, G, N) float32, or float64 for float64 values. Not differentiated.

    Returns:
        (B, G, N, D + c) in the value's dtype, c as `rank_channels` gives it. Differentiable in `value`.

    Raises:
        InvalidInputError: another dtype of the values, or ranks of another shape.
    """
    channels = rank_channels(value.dtype)
    if ranks.shape != value.shape[:-1]:
        raise InvalidInputError(f"ranks must be of shape {tuple(value.shape[:-1])}; got {tuple(ranks.shape)}")
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    bits = ranks.detach().to(wide).contiguous().unsqueeze(-1).view(value.dtype)
    assert bits.shape[-1] == channels
    return torch.cat([value, bits], dim=-1)


def unpack_ranks(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Take apart what `pack_ranks` put together.

    Args:
        stored: (B, G, N, D + c).

    Returns:
        value: (B, G, N, D), a view.
        ranks: (B, G, N) float32, or float64 for float64 values.
    """
    channels = rank_channels(stored.dtype)
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    value, bits = stored[..., :-channels], stored[..., -channels:]
    return value, bits.detach().contiguous().view(wide).squeeze(-1)


def check_carries_ranks(cache: Cache, layer_idx: int, dim: int, dtype: torch.dtype | None = None) -> None:
    """Refuse a cache layer that does not return values bit by bit, or holds values without ranks.

    Args:
        cache: an ordinary cache.
        layer_idx: index of the layer in it.
        dim: D of the values (B, G, N, D), without ranks.
        dtype: of the values of the call; None: that of the values that are held.

    Raises:
        InvalidInputError: a quantised cache, or one that another model or prefix tuning has filled.
    """
    if layer_idx >= len(cache.layers):
        return
    layer = cache.layers[layer_idx]
    if isinstance(layer, QuantizedLayer):
        raise InvalidInputError(
            "a quantised cache would change the ranks that travel with the values; use BoundedCache (the default of "
            "generate()), DynamicCache or StaticCache"
        )
    held = getattr(layer, "values", None)
    if held is None or held.dim() != 4 or not held.shape[2]:
        return
    if held.shape[-1] != dim + rank_channels(held.dtype if dtype is None else dtype):
        raise InvalidInputError(
            "the cache holds keys that have no ranks (a prefix made by another model, or prefix tuning): a model whose "
            "ranks are learned continues from caches that it has filled itself"
        )
