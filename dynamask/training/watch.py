"""What goes wrong in a training: losses that are no numbers or jump, data that comes late, processes that are slow."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_REMEMBERED = 50
"""Steps whose losses a step is compared with."""

_ENOUGH = 10
"""Steps that must be remembered before one can be a jump."""

_LATE = 0.2
"""Share of the time that may be spent waiting for data before a line says so."""

_SLOW = 1.5
"""A process is slow where the same product takes it so many times the median."""


class LossWatch:
    """Judges the loss and the gradient of every step before the weights change.

    Args:
        spike: nats by which a loss may exceed the median of the last 50 steps; 0 for no limit.
    """

    def __init__(self, spike: float) -> None:
        self.spike = spike
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)

    def problem(self, loss: float, gradient_norm: float | None) -> str | None:
        """Say what is wrong with a step; None where nothing is, and then remember its loss.

        Args:
            loss: of the whole step, nats per token.
            gradient_norm: before clipping; None: not known.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            return f"the norm of the gradient is {gradient_norm} at a loss of {loss:.4f}"
        if self.spike and len(self._losses) >= _ENOUGH:
            usual = statistics.median(self._losses)
            if loss > usual + self.spike:
                return f"the loss is {loss:.4f}, and the median of the last {len(self._losses)} steps {usual:.4f}"
        self._losses.append(loss)
        return None


def save_batch(file: Path, batches: Iterable[dict[str, Any]], **facts: Any) -> None:
    """Save the micro-batches of a step, with facts about it, for `torch.load`; whole or not at all."""
    kept = [{name: v.cpu() if isinstance(v, Tensor) else v for name, v in batch.items()} for batch in batches]
    partial = file.with_name(f".{file.name}.partial")
    torch.save({**facts, "batches": kept}, partial)
    os.replace(partial, file)


class Pace:
    """Measures how long the steps wait for data, and how fast this process computes."""

    def __init__(self) -> None:
        self.waited, self._since = 0.0, time.perf_counter()

    def take(self, device: torch.device) -> list[float]:
        """Return the share of the time since the last call that was spent waiting, and seconds of a fixed product."""
        now = time.perf_counter()
        share = self.waited / max(now - self._since, 1e-9)
        self.waited, self._since = 0.0, now
        return [share, _probe(device)]


def _probe(device: torch.device) -> float:
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (192, torch.float32)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best


def pace_of_all(table: list[list[float]]) -> dict[str, float]:
    """Sum up what `Pace.take` returned in all processes, as numbers for a log.

    Returns:
        data_wait_share: of the process that waited longest, data_wait_process; and, of several processes,
        slowest_ratio: seconds of the slowest over the median, slowest_process.
    """
    shares, seconds = [row[0] for row in table], [row[1] for row in table]
    found: dict[str, float] = {
        "data_wait_share": round(max(shares), 4),
        "data_wait_process": shares.index(max(shares)),
    }
    if len(table) > 1:
        ratio = max(seconds) / max(statistics.median_low(seconds), 1e-12)
        found |= {"slowest_ratio": round(ratio, 3), "slowest_process": seconds.index(max(seconds))}
    return found


def pace_lines(logs: dict[str, Any]) -> list[str]:
    """Put into words what of `pace_of_all` is out of the ordinary."""
    lines = []
    if logs.get("data_wait_share", 0.0) > _LATE:
        lines.append(
            f"process {logs['data_wait_process']:.0f} waited for data {logs['data_wait_share']:.0%} of the time"
        )
    if logs.get("slowest_ratio", 1.0) > _SLOW:
        lines.append(
            f"process {logs['slowest_process']:.0f} is slow: the same product takes it {logs['slowest_ratio']:.1f} "
            "times the median of all processes"
        )
    return lines
