"""Rotary position embedding (RoPE, arXiv 2104.09864), rotating halves as Llama and Qwen do."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, position_ids: Tensor, theta: float) -> Tensor:
    """Rotate the head vectors by their positions.

    Args:
        x: (B, heads, N, dim), dim even.
        position_ids: (B, N) integers.
        theta: base of the frequencies.

    Returns:
        (B, heads, N, dim) in x's dtype; angles and products are computed in float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=wide) / half
    angle = position_ids.to(wide)[:, None, :, None] * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half].to(wide), x[..., half:].to(wide)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
