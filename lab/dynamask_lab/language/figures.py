"""Figures of a run: losses by position and by last use, what the gates became."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from dynamask.models import DynamaskForCausalLM


def losses_by_last_use(losses: np.ndarray, tokens: np.ndarray) -> list[dict[str, Any]]:
    """Mean loss of tokens by the distance to their last use, in buckets that double.

    A token's last use is the last place before it in the row where it followed the same token as here: a copy of it
    would be found there. Tokens without one count in a bucket of their own, "from" 0.

    Args:
        losses: (rows, length), of predicting `tokens[:, 1:]`.
        tokens: (rows, length + 1).

    Returns:
        Buckets with "from", "to", "loss" and "tokens".
    """
    sums: dict[int, list[float]] = {}
    for row, predicted in zip(tokens, losses, strict=True):
        pairs = row[:-1].astype(np.int64) << 32 | row[1:].astype(np.int64)
        order = np.argsort(pairs, kind="stable")
        distance = np.zeros(len(pairs), dtype=np.int64)
        same = pairs[order[1:]] == pairs[order[:-1]]
        distance[order[1:][same]] = (order[1:] - order[:-1])[same]
        bucket = np.where(distance == 0, 0, 1 << np.floor(np.log2(np.maximum(distance, 1))).astype(np.int64))
        for start in np.unique(bucket):
            inside = bucket == start
            entry = sums.setdefault(int(start), [0.0, 0])
            entry[0] += float(predicted[inside].sum())
            entry[1] += int(inside.sum())
    return [
        {"from": start, "to": 2 * start, "loss": total / count, "tokens": count}
        for start, (total, count) in sorted(sums.items())
    ]


def position_buckets(by_position: Tensor) -> list[dict[str, Any]]:
    """Mean loss in buckets of positions that double: 0 to 63, 64 to 127, 128 to 255, ..."""
    buckets, start, size = [], 0, 64
    while start < len(by_position):
        stop = min(len(by_position), start + size)
        buckets.append({"from": start, "to": stop, "loss": float(by_position[start:stop].mean())})
        start, size = stop, stop
    return buckets


def gate_figures(model: DynamaskForCausalLM) -> list[dict[str, list[float]]]:
    """What the gates became: A and slopes of each layer that has them."""
    found = []
    for number, layer in enumerate(model.model.layers):
        values = {}
        for name, parameter in layer.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if last in ("log_recency", "log_slope"):
                values["slope"] = parameter.detach().exp().tolist()
            elif last == "log_rank_recency":
                values["rank_slope"] = parameter.detach().exp().tolist()
            elif name.endswith("gate.gate"):
                values["gate"] = parameter.detach().tolist()
            elif name.endswith("gate.own_delta"):
                values["own_delta_norm"] = parameter.detach().norm(dim=-1).tolist()
            elif name.endswith("gate.delta.weight"):
                values["delta_norm"] = parameter.detach().norm(dim=-1).tolist()
        if values:
            found.append({"layer": [float(number)], **values})
    return found


def thinned(losses: list[float], points: int = 200) -> list[float]:
    """Means of at most `points` equal stretches."""
    if not losses:
        return []
    return [float(np.mean(part)) for part in np.array_split(np.asarray(losses), min(points, len(losses)))]
