"""What autocast asks of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast computes in on the tensor's device, None where it is off."""
    device = tensor.device.type
    # "meta" knows no autocast. `torch.amp.is_autocast_available` would say so, but torch 2.11 cannot compile that
    # question: it broke the graph of every layer.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in autocast's dtype, as it is where autocast leaves it alone (float64, no float)."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def without_autocast(function: Callable[..., Result], *tensors: Tensor, dtype: torch.dtype) -> Result:
    """Call a function of tensors as autocast would call an operator, with autocast off inside.

    Norms with float32 weights leave query and key wider than value, so inputs are narrowed one by one. Inside, sums
    stay float32: with autocast on, products of widened tensors would be narrowed again.

    Args:
        function: takes the tensors.
        tensors: any shape; the first one's device names the autocast.
        dtype: from `autocast_dtype`.

    Returns:
        What the function returns.
    """
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(*(narrowed(tensor, dtype) for tensor in tensors))
