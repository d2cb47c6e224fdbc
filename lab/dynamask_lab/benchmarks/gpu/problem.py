"""One attention problem of the benchmark: its shape, its inputs, and which keys it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamask import key_expiry
from dynamask_lab.benchmarks.scores import load_scores

KINDS = ("random", "rising", "falling")


@dataclass(frozen=True)
class Shape:
    """Batch 1, H query heads over G key/value heads, N positions, `window` keys a query.

    Attributes:
        scores: one of `KINDS`, or "trained NAME" for a file of scores.
    """

    length: int
    window: int = 2048
    dim: int = 128
    heads: int = 16
    groups: int = 4
    scores: str = "random"

    @property
    def row(self) -> dict[str, Any]:
        """The shape as it stands in a row of results."""
        sizes = {"N": self.length, "D": self.dim, "H": self.heads, "G": self.groups, "w": self.window}
        return {**sizes, "scores": self.scores}


class Problem:
    """Random inputs of a shape, on the GPU.

    Args:
        shape: its sizes.
        dtype: of query, key, value and the gradient.
        scores: a file of trained scores (`dynamask_lab.benchmarks.scores`) where `shape.scores` is none of `KINDS`.

    Attributes:
        query: (1, H, N, D); key, value: (1, G, N, D); scores: (1, G, N) float32; expiry: (1, G, N) int32;
        grad: (1, H, N, D), the gradient that arrives at the output.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16, scores: Path | None = None) -> None:
        self.shape = shape
        batch, heads, groups = 1, shape.heads, shape.groups

        def draw(count: int) -> Tensor:
            return torch.randn(batch, count, shape.length, shape.dim, device="cuda", dtype=dtype)

        self.query, self.grad = draw(heads).requires_grad_(), draw(heads)
        self.key, self.value = (draw(groups).requires_grad_() for _ in range(2))
        if scores is None:
            found = scores_like(shape.scores, (batch, groups, shape.length))
        else:
            found = load_scores(scores, groups, shape.length).cuda()
        self.scores = found.requires_grad_()

    @cached_property
    def expiry(self) -> Tensor:
        return key_expiry(self.scores, self.shape.window)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operator is differentiable in."""
        return self.query, self.key, self.value, self.scores

    @property
    def flops(self) -> float:
        """Useful work of a forward pass: four operations for every pair of a query and a key that it sees."""
        position = torch.arange(self.shape.length, device="cuda")
        pairs = int((self.expiry - position).clamp(min=0).sum())
        return 4.0 * self.shape.dim * (self.shape.heads // self.shape.groups) * pairs


def scores_like(kind: str, shape: tuple[int, ...], device: str = "cuda") -> Tensor:
    """Scores that decide which keys are kept.

    "random" (kept keys scattered, the worst case for locality), "rising" (all clustered: a sliding window) or
    "falling" (the first keys stay for ever).
    """
    scores = torch.randn(shape, device=device)
    if kind == "random":
        return scores
    return scores.sort(-1, descending=kind == "falling").values
