"""A learned penalty on distance, for mixers that do not choose their keys: what recency is to dma's logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init


def slopes(heads: int, middle: float, spread: float) -> Tensor:
    """Slopes of the heads, in a geometric sequence as in ALiBi (arXiv 2108.12409).

    Args:
        heads: how many.
        middle: their geometric mean.
        spread: the first slope is middle · spread, the last middle / spread.

    Returns:
        (heads,) float32.
    """
    place = torch.linspace(1.0, -1.0, heads) if heads > 1 else torch.zeros(1)
    return middle * spread**place


class DistancePenalty(nn.Module):
    """ALiBi (arXiv 2108.12409) with learned slopes, as a bias of the key alone.

    −λ·(i − j) and λ·j differ by a constant per query, which the softmax ignores.

    Args:
        heads: key/value heads G.
        slope, spread: initial λ of the heads, see `slopes`.
    """

    def __init__(self, heads: int, slope: float, spread: float = 1.0) -> None:
        super().__init__()
        self.slope, self.spread = slope, spread
        self.log_slope = nn.Parameter(slopes(heads, slope, spread).log())

    def initialize_parameters(self) -> None:
        """The initial slopes."""
        init.copy_(self.log_slope, slopes(self.log_slope.shape[0], self.slope, self.spread).log())

    def forward(self, position_ids: Tensor) -> Tensor:
        """(B, N) positions of keys -> (B, G, N) float32 (float64 for float64 slopes), to be added to their logits."""
        wide = torch.promote_types(self.log_slope.dtype, torch.float32)
        return self.log_slope.to(wide).exp()[:, None] * position_ids.unsqueeze(1)
