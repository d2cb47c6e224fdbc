"""The forward and backward pass of a step of distillation as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dynamask.training.recorded_gradients import record_checked

Losses = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""(B, N) token ids -> the loss, and the ranks' loss or None."""


class RecordedStep:
    """Computes the losses of a batch and their gradients by replaying what was recorded.

    The first replay is compared with the pass as it is.

    Args:
        losses_of: see `Losses`.
        parameters: those whose gradients are wanted; their `grad` must be None.
        tokens: (B, N) on the GPU, of the shape of all later calls.

    Raises:
        InvalidInputError: tokens that are not on a GPU, or a replay that differs from the pass as it is.
        RuntimeError: something in the pass cannot be recorded, or too little memory.
    """

    def __init__(
        self,
        losses_of: Losses,
        parameters: Iterable[nn.Parameter],
        tokens: Tensor,
    ) -> None:
        self._loss = torch.zeros((), device=tokens.device)
        self._shape = tokens.shape

        def total(tokens: Tensor) -> Tensor:
            loss, ranks = losses_of(tokens)
            self._loss.copy_(loss.detach())
            return loss if ranks is None else loss + ranks

        self._recorded = record_checked(total, parameters, tokens, advice=": distil with recorded=False")

    def serves(self, tokens: Tensor) -> bool:
        """Return whether tokens have the recorded shape."""
        return tokens.shape == self._shape

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the loss, without the ranks', and put the gradients of both into `grad`."""
        self._recorded(tokens)
        return self._loss.clone()


__all__ = ["RecordedStep"]
