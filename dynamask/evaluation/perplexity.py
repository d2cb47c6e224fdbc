"""Perplexity by position in the context, which shows whether a model uses long contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset


@dataclass(frozen=True)
class PositionPerplexity:
    """Mean cross-entropy of a set of blocks, by the position of the predicted token in its document.

    Attributes:
        loss: mean over all predicted tokens, nats per token.
        edges: bucket boundaries; bucket b covers positions edges[b] <= p < edges[b + 1], the last one its end, too.
        losses: mean per bucket, NaN for an empty one.
        counts: predicted tokens per bucket.
    """

    loss: float
    edges: list[int]
    losses: list[float]
    counts: list[int]

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        buckets = [
            {"from": low, "to": high, "tokens": count, "perplexity": math.exp(min(loss, 700.0)) if count else None}
            for low, high, loss, count in zip(self.edges, self.edges[1:], self.losses, self.counts, strict=False)
        ]
        return {"loss": self.loss, "perplexity": self.perplexity, "tokens": sum(self.counts), "buckets": buckets}


@torch.no_grad()
def perplexity_by_position(
    model: nn.Module,
    blocks: Dataset[dict[str, Tensor]],
    *,
    batch_size: int = 8,
    buckets: int = 8,
    limit: int | None = None,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
) -> PositionPerplexity:
    """Evaluate a causal LM on packed blocks.

    Args:
        model: returns `.logits` (B, N, vocab).
        blocks: items as `PackedDataset` gives them: input_ids, labels, position_ids, each (N,); shift_labels (N,)
            where the token after the block counts, too.
        batch_size: blocks per forward pass.
        buckets: how many; their edges double, so that early positions are resolved.
        limit: evaluate at most so many blocks.
        progress: wraps the batches, given a description.
    """
    if limit is not None:
        blocks = Subset(blocks, range(min(limit, len(blocks))))  # type: ignore[arg-type]
    length = len(blocks[0]["input_ids"])  # type: ignore[arg-type]
    edges = [0, *sorted({max(1, round(length / 2**k)) for k in range(buckets)})]
    bounds = torch.tensor(edges[1:-1])
    sums = torch.zeros(len(edges) - 1, dtype=torch.float64)
    counts = torch.zeros(len(edges) - 1, dtype=torch.long)
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    loader: Iterable[dict[str, Tensor]] = DataLoader(blocks, batch_size=batch_size)
    for batch in progress(loader, "evaluating") if progress else loader:
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
        labels = batch.pop("shift_labels", labels)
        logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).logits
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels.to(device), reduction="none").cpu()
        counted = labels != -100
        bucket = torch.bucketize(batch["position_ids"] + 1, bounds, right=True)
        sums.index_add_(0, bucket[counted], losses[counted].double())
        counts.index_add_(0, bucket[counted], torch.ones_like(bucket[counted]))
    model.train(was_training)
    return PositionPerplexity(float(sums.sum() / counts.sum()), edges, (sums / counts).tolist(), counts.tolist())
