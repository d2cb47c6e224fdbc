"""The key/value heads that one process of a tensor-parallel group holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynamask.errors import InvalidInputError

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class HeadShard:
    """A contiguous part of the key/value heads, the same share in every process, in the order of the processes.

    Attributes:
        rank: place of this process in the group.
        size: processes in the group.
    """

    rank: int
    size: int

    def of(self, per_head: Sequence[Entry]) -> tuple[Entry, ...]:
        """Return this process's part of G values, one per key/value head.

        Raises:
            InvalidInputError: G is not a multiple of the number of processes.
        """
        heads = len(per_head)
        check_divides(heads, self.size)
        return tuple(per_head[heads * self.rank // self.size : heads * (self.rank + 1) // self.size])


def check_divides(heads: int, size: int) -> None:
    """Raise `InvalidInputError` unless `size` processes can hold as many of `heads` key/value heads each."""
    if heads % size:
        raise InvalidInputError(
            f"tensor parallelism gives every process as many key/value heads: {heads} of them cannot be divided by "
            f"{size} processes. Use a tp_size that divides {heads}"
        )


def summed(tensor: Tensor, group: Any, *, losses_are_summed: bool = False) -> Tensor:
    """Sum a tensor over the processes of a group.

    Args:
        tensor: this process's part, of any shape.
        group: of torch.distributed.
        losses_are_summed: whether the loss is the sum of the processes' losses: the gradient is then summed, too.
            False: every process has the whole loss.
    """
    return _Summed.apply(tensor, group, losses_are_summed)  # type: ignore[no-any-return]


def with_summed_gradient(weight: Tensor, group: Any) -> Tensor:
    """Return a weight that all processes hold alike, whose gradients from their different heads are summed."""
    return _SummedGradient.apply(weight, group)  # type: ignore[no-any-return]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, losses_are_summed: bool) -> Tensor:  # type: ignore[override]
        ctx.group = group if losses_are_summed else None
        total = tensor.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.group is not None:
            gradient = gradient.contiguous().clone()
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None, None


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
