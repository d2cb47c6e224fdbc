"""Which of several windows and slopes diverges least from dense attention, measured instead of estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynamask.convert.attention import call_facts
from dynamask.convert.learn_ranks import run_decoder
from dynamask.convert.models import set_slopes, set_windows
from dynamask.errors import InvalidInputError
from dynamask.training.loss import output_head

_CHUNK = 1024


@dataclass(frozen=True)
class Rules:
    """Windows and slopes of a converted model.

    Attributes:
        windows, slopes: one per key/value head of the layers that rank, in their order.
    """

    windows: tuple[int, ...]
    slopes: tuple[float, ...]

    def set(self, model: Any) -> None:
        """Give a converted model these windows and slopes."""
        config = model.config
        groups = config.num_key_value_heads
        windows: list[Any] = [None if entry is None else list(entry) for entry in config.head_windows]
        slopes: list[list[float] | None] = [None] * len(windows)
        for number, layer in enumerate(config.ranked_layers):
            part = slice(number * groups, (number + 1) * groups)
            windows[layer], slopes[layer] = list(self.windows[part]), list(self.slopes[part])
        set_windows(model, windows)
        set_slopes(model, slopes)


@torch.no_grad()
def measured_divergences(model: Any, blocks: Sequence[Tensor], rules: Sequence[Rules], positions: int = 2048) -> Tensor:
    """Measure KL(dense || windows and slopes) of the next-token distributions.

    Args:
        model: a converted model; it has the last of the rules afterwards.
        blocks: (B, N) token ids.
        rules: what is compared.
        positions: of each block that are compared, evenly spaced.

    Returns:
        (blocks, rules) float64, nats, the mean over the positions.

    Raises:
        InvalidInputError: a model that computes NaN or infinity.
    """
    device = next(model.parameters()).device
    found = torch.zeros(len(blocks), len(rules), dtype=torch.float64)
    for number, block in enumerate(blocks):
        tokens = block.to(device)
        count = min(positions, tokens.shape[1])
        at = ((torch.arange(count, device=device) + 0.5) * (tokens.shape[1] / count)).long()
        dense = _hidden(model, tokens, at, dense=True)
        for place, rule in enumerate(rules):
            rule.set(model)
            found[number, place] = _divergence(model, dense, _hidden(model, tokens, at))
    if not bool(found.isfinite().all()):
        raise InvalidInputError("allocate_windows: divergences of windows are not finite: the model computes NaN")
    return found


def _hidden(model: Any, tokens: Tensor, at: Tensor, *, dense: bool = False) -> Tensor:
    """Last hidden states (B * positions, hidden)."""
    facts = call_facts(tokens.shape[0], tokens.shape[1], None, None, 0, tokens.device)
    if dense:
        facts.observer = _look_away
    return run_decoder(model, tokens, facts)[:, at].to(next(model.parameters()).dtype).flatten(0, 1)


def _look_away(layer: Any) -> None:
    """An observer that only makes the attention dense."""


def _divergence(model: Any, dense: Tensor, sparse: Tensor) -> float:
    head = output_head(model)
    total = torch.zeros((), dtype=torch.float64, device=dense.device)
    for wanted, given in zip(dense.split(_CHUNK), sparse.split(_CHUNK), strict=True):
        teacher, student = head(wanted).float().log_softmax(-1), head(given).float().log_softmax(-1)
        total += (teacher.exp() * (teacher - student)).sum(dtype=torch.float64)
    return float(total) / len(dense)
