"""The loss of learned ranks: a regression on the logarithm of future attention.

Shared by models that train from scratch (`dynamask.mixers.dma`) and by converted models
(`dynamask.convert.learn_ranks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamask.mixers.head_shard import summed
from dynamask.ops.future_attention import future_attention

_FLOOR = 1e-4
"""Weights below this count as this: keys that no query attends to need no order among themselves."""


class RankLosses(Sequence[Tensor]):
    """The losses of the layers in one forward pass.

    Not a list: FSDP takes the lists among a layer's arguments apart and gives the next layer a copy.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def append(self, loss: Tensor) -> None:
        """Add the loss () of a layer."""
        self._losses.append(loss)

    def drop(self, loss: Tensor) -> None:
        """Remove a loss that is part of a model's loss already."""
        self._losses = [each for each in self._losses if each is not loss]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return self._losses[index]

    def __len__(self) -> int:
        return len(self._losses)

    def mean(self) -> Tensor | None:
        """Return the mean () on the device of the first loss; None where there are none."""
        if not self._losses:
            return None
        return torch.stack([loss.to(self._losses[0].device) for loss in self._losses]).mean()


@torch.no_grad()
def rank_target(
    query: Tensor,
    key: Tensor,
    local: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what the ranks of a layer should be: the log of the largest attention weight of any later query.

    Args:
        query: (B, H, N, D), rotated.
        key: (B, G, N, D), rotated.
        local: newest positions that are kept anyway; only queries at least so many positions later count.
        segment_ids: (B, N) non-decreasing integers of packed documents, or None.
        key_mask: (B, N) bool, True for a real token, or None.
        scale: factor on the query-key products, default D**-0.5.

    Returns:
        target: (B, G, N) float32 (float64 for float64 queries), at most 0. No gradient.
        valid: (B, G, N) bool, False for a key that no later query of its document can attend to (near the end of a
            document, padding): it has no target.
    """
    weight = future_attention(
        query.detach(), key.detach(), local=local, segment_ids=segment_ids, key_mask=key_mask, scale=scale
    )
    return weight.clamp(min=_FLOOR).log(), weight > 0


def rank_loss(ranks: Tensor, target: Tensor, valid_mask: Tensor, *, group: Any = None) -> Tensor:
    """Compute the mean squared distance of ranks from their targets.

    Squares, because most keys are attended to rarely: the minimum is then the mean of the targets, which a rare high
    one raises. Absolute distances have their minimum at the median, which it does not move.

    Args:
        ranks: (B, G, N) float, differentiable.
        target: (B, G, N) float, as `rank_target` returns it.
        valid_mask: (B, G, N) bool, or a shape that broadcasts to it: the keys that count.
        group: processes of torch.distributed that hold other heads, or other parts of the sequence, of the same
            layer: the mean is over the keys of all of them, in every process. Each computes the gradient of its part.

    Returns:
        () in the target's dtype, the mean over the valid keys; 0 where there are none.
    """
    valid = valid_mask.expand_as(target)
    # Before the loss: a NaN behind the mask would have a NaN gradient, times zero.
    ranks, target = ranks.to(target.dtype).masked_fill(~valid, 0.0), target.masked_fill(~valid, 0.0)
    total, count = F.mse_loss(ranks, target, reduction="sum"), valid.sum()
    if group is not None:
        both = summed(torch.stack([total, count.to(total.dtype)]), group)
        total, count = both[0], both[1].detach()
    return total / count.clamp(min=1)
