"""Weighted sums in which a value that is not finite reaches only the rows that see it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weighted_sum(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Multiply `weights @ values`, so that a NaN or infinity stays out of the rows that do not see it.

    In the plain product it would reach every row, because 0 · NaN is NaN.

    Args:
        weights: (..., M, L), 0 where not `seen`.
        values: (..., L, D).
        seen: (..., M, L) bool.

    Returns:
        (..., M, D). Differentiable; the gradient is 0 at values that are not finite.
    """
    total = torch.matmul(weights, values.masked_fill(~values.isfinite(), 0.0))
    for number in (math.nan, math.inf, -math.inf):
        there = values.isnan() if math.isnan(number) else values == number
        reached = torch.matmul(seen.to(values.dtype), there.to(values.dtype)) > 0
        total = total + torch.zeros_like(total).masked_fill(reached, number)
    return total
