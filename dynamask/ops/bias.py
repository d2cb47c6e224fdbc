"""Scores as biases on logits."""

from __future__ import annotations

from torch import Tensor


def finite_bias(scores: Tensor) -> Tensor:
    """Give the bias that scores add to the logits: the scores, and 0 where a score is NaN or infinite.

    A score that is not finite still ranks its key (NaN lowest, +inf highest), but is not added to a logit: it
    would make the weights of every query that keeps the key NaN, or leave that key alone with all the weight.

    Args:
        scores: float tensor of any shape.

    Returns:
        Tensor of the shape and dtype of `scores`. Differentiable; the gradient is 0 where a score is not finite.
    """
    return scores.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
