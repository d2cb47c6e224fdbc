"""Learned ranks: a small network predicts, from a layer's hidden state, how much each key will matter later."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from dynamask.ops.interval.operators import triton_available

_FEW = 32
"""Positions for which the kernel of a decoding step is worth it: every one of them reads all weights again."""


class RankPredictor(nn.Module):
    """Predicts one rank per position and key/value head from the hidden state that the attention layer reads.

        rank = W_down · silu( W_up · rmsnorm(x) ) + b

    The target is the logarithm of the largest attention weight that any later query gives the key
    (`dynamask.future_attention`), so ranks of different heads and layers are on one scale. The last product is
    computed in float32 whatever the model's dtype, because ranks only serve to be compared.

    Args:
        hidden_size: width of the hidden state.
        num_key_value_heads: G, ranks per position.
        width: hidden units; None: a quarter of `hidden_size`, at least 64. 0: a linear predictor.

    Source: design of KVzap (arXiv 2601.07891) and Locret (arXiv 2410.01805), with the maximum over all later queries
    as the target.
    """

    def __init__(self, hidden_size: int, num_key_value_heads: int, *, width: int | None = None) -> None:
        super().__init__()
        self.width = max(64, hidden_size // 4) if width is None else width
        self.up = CastingLinear(hidden_size, self.width, bias=False) if self.width else None
        self.down = RankHead(self.width or hidden_size, num_key_value_heads)

    def initialize_parameters(self) -> None:
        """Make all ranks equal, so that the mask is a sliding window with sinks."""
        self.down.initialize_parameters()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the ranks of the given positions.

        Args:
            hidden_states: (B, N, hidden_size).

        Returns:
            (B, G, N) float32 (float64 for float64 hidden states).
        """
        if self._few(hidden_states):
            from dynamask.ops.triton.predict_ranks import predict_ranks_launch

            assert self.up is not None
            weights = (self.up.weight, self.down.weight, self.down.bias)
            return predict_ranks_launch(hidden_states.contiguous(), *weights, RANK_GRID)
        hidden_states = F.rms_norm(hidden_states, hidden_states.shape[-1:])
        if self.up is not None:
            hidden_states = F.silu(self.up(hidden_states))
        return on_grid(self.down(hidden_states)).transpose(1, 2)

    def _few(self, hidden_states: Tensor) -> bool:
        """Whether these are the few positions of a decoding step on a GPU, on plain weights."""
        if not hidden_states.is_cuda or hidden_states.shape[0] * hidden_states.shape[1] > _FEW:
            return False
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
            return False
        up, down = self.up, self.down
        return (
            type(up) is CastingLinear
            and type(down) is RankHead
            and type(up.weight) is type(down.weight) is nn.Parameter
            and up.weight.device == down.weight.device == hidden_states.device
            and torch.float64 not in (hidden_states.dtype, up.weight.dtype)
            and up.weight.is_floating_point()
            and triton_available()
        )


class CastingLinear(nn.Linear):
    """A linear layer that takes inputs of any dtype: a predictor may be float32 in a bfloat16 model."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not torch.is_autocast_enabled(input.device.type):
            input = input.to(self.weight.dtype)
        return super().forward(input)


class Float32Linear(nn.Linear):
    """A linear layer that multiplies and returns in float32 (float64 for float64 inputs), whatever its dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        wide = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(wide)
            return F.linear(input.to(wide), self.weight.to(wide), bias)


RANK_GRID = 64.0
"""Steps per nat of the grid of ranks: far finer than predictions are good for."""


class RankHead(Float32Linear):
    """The last layer of a predictor, which starts at zero.

    A class of its own because transformers initialises modules that own parameters, and skips others.
    """

    def initialize_parameters(self) -> None:
        """Set weight and bias to zero."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)


def on_grid(ranks: Tensor) -> Tensor:
    """Round ranks to a grid, passing gradients straight through.

    Equal tokens have equal hidden states in the first layer, so their ranks tie and the later position wins. A matrix
    product over another chunk of the sequence sums in another order, and its last bits would break such ties
    differently in cached and uncached runs; the grid is so much coarser that this does not happen.
    """
    rounded = (ranks.detach() * RANK_GRID).round() / RANK_GRID
    if not ranks.requires_grad:
        return rounded
    return ranks + (rounded - ranks.detach())


_SLOPE_GRID = 8192.0
"""Steps per nat of the grid of slopes, a multiple of the grid of ranks: sums of both are exact below 2048 nats."""


def slope_on_grid(slope: float) -> float:
    """Round a slope, in nats per token, to the grid on which ranks with slopes are exact."""
    return math.floor(slope * _SLOPE_GRID + 0.5) / _SLOPE_GRID


def sloped_ranks(ranks: Tensor, slopes: Sequence[float] | None, positions: Tensor) -> Tensor:
    """Raise every rank by its head's slope times its position, so that a key loses against newer ones as it ages.

    Which of two keys ranks higher depends on their distance alone, and no rank changes when more tokens follow: the
    mask of a key is still an interval. Slope 0 leaves the ranks as they are, a steep one keeps the newest keys.

    On the grid of slopes the sums are exact in float32 while they stay below 2048 nats, wherever the text begins:
    packed and padded rows then choose as separate ones do. Farther on they are rounded, and still rise with the
    position.

    Args:
        ranks: (B, G, N) float.
        slopes: G numbers of at least 0, in nats per token, on the grid (`slope_on_grid`). None: all 0.
        positions: (B or 1, N) integers, the positions of the keys.

    Returns:
        (B, G, N) in the dtype of the ranks.
    """
    if slopes is None or not any(slopes):
        return ranks
    if torch.compiler.is_compiling():  # the graph keeps it
        slope = torch.tensor(tuple(slopes), dtype=torch.float32, device=ranks.device).to(ranks.dtype)
    else:
        slope = slope_tensor(tuple(slopes), ranks.device).to(ranks.dtype)
    return ranks + slope[:, None] * positions[:, None].to(ranks.dtype)


@functools.lru_cache(maxsize=4096)
def slope_tensor(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    """(G,) float32. Kept, because a stream that is captured allows no copy to the device."""
    with torch.inference_mode(False):
        return torch.tensor(slopes, dtype=torch.float32, device=device)


def settle(score: Tensor) -> Tensor:
    """Round off a score's last bits (8 of float32, 12 of float64), passing gradients straight through.

    Equal tokens have equal hidden states in the first layer, so their scores tie and the later position wins. A matrix
    product over another chunk of the sequence sums in another order, and its last bits would break such ties
    differently in cached and uncached runs; rounding them off keeps the two alike.
    """
    integer, dropped = (torch.int64, 12) if score.dtype == torch.float64 else (torch.int32, 8)
    bits = score.detach().contiguous().view(integer)
    rounded = ((bits + (1 << (dropped - 1))) & -(1 << dropped)).view(score.dtype)
    return score + (rounded - score).detach()
