"""Interval attention on the CPU against PyTorch's SDPA: masked (the same attention) and dense causal."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamask import interval_attention, key_expiry
from dynamask.ops.interval.reference import visible
from dynamask_lab.sweeps.provenance import processor_name


def environment() -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions."""
    return {
        "device": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def benchmark_cpu(
    lengths: list[int], window: int, *, heads: int = 8, groups: int = 2, dim: int = 64, repeats: int = 5
) -> list[dict[str, Any]]:
    """Time forward and forward + backward, float32, random data.

    Args:
        lengths: sequence lengths N.
        window: keys per query.
        heads, groups, dim: H, G and D; batch 1.
        repeats: timed runs after one warm-up; the median counts.

    Returns:
        One row per length: seconds of each peer, and `error`, the largest difference from masked SDPA.
    """
    return [_one_length(length, window, heads, groups, dim, repeats) for length in lengths]


def _one_length(length: int, window: int, heads: int, groups: int, dim: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(1, heads, length, dim, generator=generator, requires_grad=True)
    key, value = (torch.randn(1, groups, length, dim, generator=generator, requires_grad=True) for _ in range(2))
    scores = torch.randn(1, groups, length, generator=generator, requires_grad=True)
    grad = torch.randn(query.shape, generator=generator)
    seen = visible(key_expiry(scores, window), length)

    def interval(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        return interval_attention(q, k, v, key_expiry(s, window), bias=s, backend="torch")

    def masked(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        # The mask is made beforehand: SDPA is not charged for finding out which keys are seen.
        mask = s[:, :, None].masked_fill(~seen, float("-inf")).repeat_interleave(heads // groups, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def dense(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    inputs = (query, key, value, scores)
    with torch.no_grad():
        error = (interval(*inputs) - masked(*inputs)).abs().max().item()
    if not error < 1e-4:
        raise AssertionError(f"interval attention is off by {error} at N={length}: its time would mean nothing")
    row: dict[str, Any] = {"length": length, "window": window, "heads": heads, "groups": groups, "dim": dim}
    row["error"] = error
    for name, attend in (("interval", interval), ("masked_sdpa", masked), ("dense_sdpa", dense)):
        row[f"{name}_forward_s"] = _median(partial(_forward, attend, inputs), repeats)
        row[f"{name}_train_s"] = _median(partial(_train, attend, inputs, grad), repeats)
    return row


def _forward(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        attend(*inputs)


def _train(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    torch.autograd.grad(attend(*inputs), inputs, grad, allow_unused=True)


def _median(run: Callable[[], None], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
