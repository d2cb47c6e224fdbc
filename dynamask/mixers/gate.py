"""The gate of the paper: scores that rank keys, computed from their value vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from dynamask.mixers.rank_predictor import Float32Linear, settle


class DynamicMaskGate(nn.Module):
    """Scores every key from its value vector (arXiv 2508.02124, equations 5 and 6).

        score = exp( A · softplus( concat_heads(v) · Delta ) )

    Args:
        num_key_value_heads: G, one score per head.
        head_dim: D of a value head.
        bias: whether Delta has a bias.
    """

    def __init__(self, num_key_value_heads: int, head_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.delta = Float32Linear(num_key_value_heads * head_dim, num_key_value_heads, bias=bias)
        self.gate = nn.Parameter(torch.zeros(num_key_value_heads))

    def initialize_parameters(self) -> None:
        """Set A to zero: all scores are equal, so the mask is a sliding window. Delta stays random, or neither factor
        would get a gradient."""
        init.zeros_(self.gate)

    def forward(self, value: Tensor) -> Tensor:
        """Compute the scores of keys.

        Args:
            value: (B, G, N, D).

        Returns:
            (B, G, N) float32 (float64 for float64 values): scores rank keys, so they keep full precision whatever the
            model's dtype.
        """
        with torch.autocast(value.device.type, enabled=False):
            # Transposed first: compiled code takes the gradient of softplus to be contiguous, whatever comes in.
            z = self.delta(value.transpose(1, 2).flatten(2)).transpose(1, 2).contiguous()
            score = (self.gate.to(z.dtype)[:, None] * F.softplus(z)).exp()
            return settle(score)
