"""AdamW with the parameter groups of a model with learned masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dynamask.mixers.rank_predictor import RankPredictor

GATES = (".gate.", ".penalty.")
"""Parts of the names of parameters that a gate or a distance penalty owns."""


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    gate_rate: float = 1.0,
    rank_rate: float = 1.0,
    ranks: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups of one learning rate and one weight decay.

    Matrices decay. Norms, biases, a gate's scalars, slopes and rank predictors do not: decay pulls a slope, which is
    stored as a logarithm, towards 1, and a predictor's outputs towards equal ranks.

    Args:
        model: any model; parameters that need no gradient are left out.
        learning_rate: of all other parameters.
        weight_decay: of the parameters that decay.
        gate_rate: learning rate of gates and slopes, divided by `learning_rate`.
        rank_rate: the same of rank predictors.
        ranks: ends of the names of further parameters that only rank keys and learn at `rank_rate`.

    Returns:
        Groups for an optimizer, with `params`, `lr`, `weight_decay` and `factor` (the rate over `learning_rate`).
    """
    predictors = {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if isinstance(module, RankPredictor)
        for own, _ in module.named_parameters()
    }
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = gate_rate if any(part in name for part in GATES) else 1.0
        if name in predictors or name.endswith(tuple(ranks)):
            factor = rank_rate
        decays = parameter.dim() >= 2 and name not in predictors
        groups.setdefault((factor, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * factor,
            "weight_decay": weight_decay if decays else 0.0,
            "factor": factor,
        }
        for (factor, decays), parameters in groups.items()
    ]


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    gate_rate: float = 1.0,
    rank_rate: float = 1.0,
    ranks: Sequence[str] = (),
) -> torch.optim.AdamW:
    """Build AdamW over `parameter_groups`, fused on a GPU."""
    groups = parameter_groups(
        model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        gate_rate=gate_rate,
        rank_rate=rank_rate,
        ranks=ranks,
    )
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
