"""Useful floating-point operations of a training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def causal_pairs(length: int, keys: float | None = None) -> float:
    """Count the query-key pairs of one sequence in one head.

    Args:
        length: tokens of the sequence, N.
        keys: keys that a query keeps at most; None: all before it.

    Returns:
        N (N + 1) / 2, or less with fewer keys.
    """
    keys = length if keys is None else min(keys, length)
    return keys * (keys + 1) / 2 + (length - keys) * keys


def block_sparse_pairs(length: int, *, block_size: int, block_counts: int, window: int) -> float:
    """Count the query-key pairs of nsa in one head: its compressed branch, the chosen blocks and the window."""
    chosen = causal_pairs(length, block_counts * block_size)
    return length * length / (2 * block_size) + chosen + causal_pairs(length, window)


def training_flops(
    *, parameters: int, query_width: int, length: int, tokens: int, pairs: Iterable[Sequence[float]]
) -> float:
    """Count the operations of steps that train on `tokens` tokens each: weights, and attention over the kept keys.

    Forward, and twice that backward. What a mixer spends on choosing keys is left out.

    Args:
        parameters: those that multiply every token; a tied embedding counts once, as output layer.
        query_width: query heads times head_dim.
        length: tokens of a sequence.
        tokens: of a step.
        pairs: of each step, the pairs of each layer (`causal_pairs`).

    Returns:
        Floating-point operations of all steps.
    """
    total = 0.0
    for layers in pairs:
        total += (6.0 * parameters + 12.0 * query_width * sum(layers) / length) * tokens
    return total
