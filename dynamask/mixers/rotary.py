"""Rotary position embedding (RoPE, arXiv 2104.09864), rotating halves as Llama and Qwen do."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(position_ids: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, the same for all heads and layers.

    Args:
        position_ids: (B, N) integers.
        dim: of a head vector, even.
        theta: base of the frequencies.
        dtype: of the model; angles are computed in float32 or wider.

    Returns:
        Two (B, 1, N, dim): each angle twice, for the two halves of a head vector.
    """
    wide = torch.promote_types(dtype, torch.float32)
    half = dim // 2
    exponent = torch.arange(half, device=position_ids.device, dtype=wide) / half
    angle = position_ids.to(wide)[:, None, :, None] * theta**-exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate head vectors by their positions.

    Args:
        x: (B, heads, N, dim).
        angles: as `rotary_angles` gives them.

    Returns:
        (B, heads, N, dim) in x's dtype; products are computed in the angles' dtype.
    """
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
