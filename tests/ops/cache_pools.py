"""Pools of a ragged cache and ranks for it, on a GPU where there is one."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def empty_pools(batch: int, windows: tuple[int, ...], dim: int, value_dim: int) -> dict[str, Tensor]:
    slots = sum(windows)
    return {
        "keys": torch.zeros(batch, slots, dim, device=DEVICE),
        "values": torch.zeros(batch, slots, value_dim, device=DEVICE),
        "ranks": torch.zeros(batch, slots, device=DEVICE),
        "positions": torch.full((batch, slots), -1, dtype=torch.int32, device=DEVICE),
        "clock": torch.zeros(batch, len(windows), dtype=torch.int64, device=DEVICE),
    }


def ranks_of(*shape: int) -> Tensor:
    """Many ties, NaN, infinities and both zeros."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 2.0])
    return values[torch.randint(8, shape, generator=torch.Generator().manual_seed(0))].to(DEVICE)
