"""The learning rate of a distillation, beside the size of the weights that it moves."""

from __future__ import annotations

from typing import Any

RATE_SHARE = 2e-3
"""Of the root mean square of the weights: what moved SmolLM2-135M to its goals."""


def scaled_rate(model: Any) -> float:
    """Return the highest rate for AdamW that suits a model's weights, rounded to one digit.

    AdamW moves every weight by about the rate in a step, whatever its gradient: models of small weights take a lower
    rate.

    Args:
        model: a converted causal LM.

    Returns:
        `RATE_SHARE` of the root mean square of the matrices of the decoder layers, without rank predictors. 4e-4 where
        all of them are 0.
    """
    squares, count = 0.0, 0
    outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "rank_predictor" not in name and id(parameter) not in outside:
            squares += float(parameter.detach().float().square().sum())
            count += parameter.numel()
    return float(f"{RATE_SHARE * (squares / count) ** 0.5:.0e}") if squares else 4e-4
