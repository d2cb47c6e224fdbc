"""The rank predictor on a few positions, as in decoding, in two launches instead of ten.

Rounds where the torch operations of `dynamask.mixers.rank_predictor` round, so that both differ by the order of sums
alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_UNITS = 16
"""Hidden units of a program."""


def predict_ranks_launch(hidden_states: Tensor, up: Tensor, down: Tensor, bias: Tensor, grid: float) -> Tensor:
    """Compute `down · silu( up · rmsnorm(x) ) + bias`, rounded to a grid.

    Args:
        hidden_states: (B, N, hidden) float32, bfloat16 or float16, contiguous.
        up: (width, hidden), contiguous, of such a dtype.
        down: (G, width), contiguous.
        bias: (G,).
        grid: steps per unit.

    Returns:
        (B, G, N) float32.
    """
    batch, length, hidden = hidden_states.shape
    width, groups = up.shape[0], down.shape[0]
    rows = batch * length
    device = hidden_states.device
    active = torch.empty(rows, width, dtype=torch.float32, device=device)
    ranks = torch.empty(batch, groups, length, dtype=torch.float32, device=device)
    if rows == 0:
        return ranks
    epsilon = rms_epsilon(hidden_states.dtype, device)
    _up[(triton.cdiv(width, _UNITS), rows)](
        hidden_states, up, active, epsilon, hidden, width, UNITS=_UNITS, BLOCK=256, num_warps=4
    )
    _down[(rows, groups)](active, down, bias, ranks, width, length, GRID=grid, BLOCK=256, num_warps=2)
    return ranks


@lru_cache(maxsize=64)
def rms_epsilon(dtype: torch.dtype, device: torch.device) -> float:
    """Return the constant that `F.rms_norm` without `eps` adds to a mean square: releases of torch differ."""
    probe = torch.full((1, 64), 2.0**-6, dtype=dtype, device=device)
    narrow, wide = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    ratio = F.rms_norm(probe, (64,))[0, 0].float().item()
    # 1 without the constant, much less with the large one.
    return min((narrow, wide), key=lambda eps: abs(ratio - 2.0**-6 / (2.0**-12 + eps) ** 0.5))


@triton.jit(do_not_specialize=["hidden", "width"])
def _up(x, up, active, epsilon, hidden, width, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """silu( up · rmsnorm(x) ) of some hidden units of one row."""
    row = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    k = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, hidden, BLOCK):
        part = tl.load(x + row * hidden + begin + k, mask=begin + k < hidden, other=0.0).to(tl.float32)
        squares += part * part
    inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / hidden + epsilon)
    total = tl.zeros([UNITS, BLOCK], tl.float32)
    for begin in range(0, hidden, BLOCK):
        there = begin + k < hidden
        part = tl.load(x + row * hidden + begin + k, mask=there, other=0.0)
        part = (part.to(tl.float32) * inverse).to(x.dtype.element_ty).to(up.dtype.element_ty).to(tl.float32)
        at = up + unit[:, None].to(tl.int64) * hidden + begin + k[None, :]
        weight = tl.load(at, mask=(unit < width)[:, None] & there[None, :], other=0.0).to(tl.float32)
        total += weight * part[None, :]
    value = tl.sum(total, 1).to(up.dtype.element_ty).to(tl.float32)
    value = (value / (1.0 + tl.exp(-value))).to(up.dtype.element_ty).to(tl.float32)
    tl.store(active + row * width + unit, value, mask=unit < width)


@triton.jit(do_not_specialize=["width", "length"])
def _down(active, down, bias, ranks, width, length, GRID: tl.constexpr, BLOCK: tl.constexpr):
    """The rank of one row and head, on the grid."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    k = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        there = begin + k < width
        weight = tl.load(down + group * width + begin + k, mask=there, other=0.0).to(tl.float32)
        total += weight * tl.load(active + row * width + begin + k, mask=there, other=0.0)
    steps = (tl.sum(total, 0) + tl.load(bias + group).to(tl.float32)) * GRID
    # Adding and taking 1.5 · 2^23 rounds to the nearest integer, ties to the even one, as torch.round does.
    steps = tl.where(tl.abs(steps) < 4194304.0, (steps + 12582912.0) - 12582912.0, steps)
    place = (row // length * tl.num_programs(1) + group) * length + row % length
    tl.store(ranks + place, steps / GRID)


__all__ = ["predict_ranks_launch", "rms_epsilon"]
