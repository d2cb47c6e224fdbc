"""What autocast asks of an operator."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast computes in on the tensor's device, None where it is off."""
    device = tensor.device.type
    # "meta" knows no autocast. `torch.amp.is_autocast_available` would say so, but torch 2.11 cannot compile that
    # question: it broke the graph of every layer.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
