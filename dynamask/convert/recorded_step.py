"""The forward and backward pass of a step of distillation as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dynamask.errors import InvalidInputError
from dynamask.training.recorded_gradients import RecordedGradients

_CLOSE = 0.02
"""Largest relative difference of loss and norm of the gradients from the pass as it is: bfloat16 and atomic sums."""


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
        self._parameters = list(parameters)
        self._shape = tokens.shape

        def total(tokens: Tensor) -> Tensor:
            loss, ranks = losses_of(tokens)
            self._loss.copy_(loss.detach())
            return loss if ranks is None else loss + ranks

        total(tokens).backward()  # type: ignore[no-untyped-call]
        expected = torch.stack([self._loss, self._norm()])
        self._clear()  # before recording: what a pass keeps is as much memory as the graph's
        self._recorded = RecordedGradients(total, self._parameters, tokens)
        found = torch.stack([self(tokens), self._norm()])
        self._clear()
        difference = ((found - expected) / expected).abs().max()
        if not bool(difference < _CLOSE):
            raise InvalidInputError(
                f"the recorded step gives loss and norm of the gradients {found.tolist()}, the step as it is "
                f"{expected.tolist()}: distil with recorded=False"
            )

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def serves(self, tokens: Tensor) -> bool:
        """Return whether tokens have the recorded shape."""
        return tokens.shape == self._shape

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the loss, without the ranks', and put the gradients of both into `grad`."""
        self._recorded(tokens)
        return self._loss.clone()


__all__ = ["RecordedStep"]
