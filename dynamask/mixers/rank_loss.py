"""The loss of learned ranks: a regression on the logarithm of future attention.

Shared by models that train from scratch (`dynamask.mixers.dma`) and by converted models
(`dynamask.convert.learn_ranks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.mixers.head_shard import summed
from dynamask.ops.context_parallel.shards import ContextShards
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
    *,
    shards: ContextShards | None = None,
    rows: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Compute what the ranks of a layer should be: the log of the largest attention weight of any later query.

    Args:
        query: (B, H, N, D), rotated.
        key: (B, G, N, D), rotated.
        local: newest positions that are kept anyway; only queries at least so many positions later count.
        segment_ids: (B, N) non-decreasing integers of packed documents, or None.
        key_mask: (B, N) bool, True for a real token, or None.
        scale: factor on the query-key products, default D**-0.5.
        shards: where the sequence is split over processes: query and key are of this process's shard, and the queries
            of all shards count. The processes then exchange all keys; `segment_ids` and `key_mask` are not read.
        rows: with `shards`: rows of the batch that query and key are of.

    Returns:
        target: (B, G, N) float32 (float64 for float64 queries), at most 0. No gradient.
        valid: (B, G, N) bool, False for a key that no later query of its document can attend to (near the end of a
            document, padding): it has no target.
    """
    if shards is not None:
        weight = _over_shards(query.detach(), key.detach(), local, scale, shards, rows)
    else:
        weight = future_attention(
            query.detach(), key.detach(), local=local, segment_ids=segment_ids, key_mask=key_mask, scale=scale
        )
    return weight.clamp(min=_FLOOR).log(), weight > 0


def _over_shards(
    query: Tensor, key: Tensor, local: int, scale: float | None, shards: ContextShards, rows: slice
) -> Tensor:
    """Compute the largest weight that queries of any shard give the keys of this one, (B, G, n).

    Each process computes what its queries give to all keys before them; the maximum over the processes is exact.
    """
    batch, groups, length, _ = key.shape
    start, end = shards.start, shards.start + length
    every = [key.new_empty(batch, groups, n, key.shape[3]) for n in shards.lengths]
    shards.gather(every, key.contiguous())
    segments = None
    if shards.packed:
        whole = (shards.segment_ids if shards.segment_ids is not None else shards.first_document(1, key.device)).shape[
            0
        ]
        place = start + torch.arange(length, device=key.device)
        begins = (place - shards.positions(whole, length, key.device))[rows].expand(batch, length).contiguous()
        parts = [begins.new_empty(batch, n) for n in shards.lengths]
        shards.gather(parts, begins)
        segments = torch.cat(parts, 1)[:, :end]
    # The queries before this shard are other processes'; `first_query` leaves them out.
    padded = F.pad(query, (0, 0, start, 0))
    seen = torch.cat(every, 2)[:, :, :end].contiguous()
    weight = future_attention(padded, seen, local=local, first_query=start, segment_ids=segments, scale=scale)
    weight = F.pad(weight, (0, sum(shards.lengths) - end))
    dist.all_reduce(weight, dist.ReduceOp.MAX, group=shards.group)
    return weight[:, :, start:end].contiguous()


def rank_loss(
    ranks: Tensor, target: Tensor, valid_mask: Tensor, *, group: Any = None, shards: ContextShards | None = None
) -> Tensor:
    """Compute the mean squared distance of ranks from their targets.

    Squares, because most keys are attended to rarely: the minimum is then the mean of the targets, which a rare high
    one raises. Absolute distances have their minimum at the median, which it does not move.

    Args:
        ranks: (B, G, N) float, differentiable.
        target: (B, G, N) float, as `rank_target` returns it.
        valid_mask: (B, G, N) bool, or a shape that broadcasts to it: the keys that count.
        group: processes of torch.distributed that hold other heads of the same layer: the mean is over the keys of
            all of them. Every process has the same loss and computes the gradient of its part.
        shards: where the sequence is split over processes: the mean is over the keys of all shards. The processes'
            losses are summed, so each part's gradient is that of all of them.

    Returns:
        () in the target's dtype, the mean over the valid keys; 0 where there are none.

    Raises:
        InvalidInputError: `shards` that `context_shards` did not make, a `group` that is no process group, or ranks and
            targets of different shapes.
    """
    if shards is not None and not isinstance(shards, ContextShards):
        raise InvalidInputError(
            f"shards must be what dynamask.ops.context_parallel.context_shards returns; got {type(shards).__name__}"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise InvalidInputError(f"group must be a process group of torch.distributed; got {type(group).__name__}")
    if ranks.shape != target.shape:
        raise InvalidInputError(
            f"ranks and target must have one shape; got {tuple(ranks.shape)} and {tuple(target.shape)}"
        )
    valid = valid_mask.expand_as(target)
    # Before the loss: a NaN behind the mask would have a NaN gradient, times zero.
    ranks, target = ranks.to(target.dtype).masked_fill(~valid, 0.0), target.masked_fill(~valid, 0.0)
    total, count = F.mse_loss(ranks, target, reduction="sum"), valid.sum()
    for others, parts in ((group, False), (None if shards is None else shards.group, True)):
        if others is not None:
            both = summed(torch.stack([total, count.to(total.dtype)]), others, losses_are_summed=parts)
            total, count = both[0], both[1].detach()
    return total / count.clamp(min=1)
