"""The ranks of the keys of a text, and what each layer keeps by them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynamask.mixers.gate import DynamicMaskGate
from dynamask.mixers.rank_predictor import RankPredictor


class RankedLayer(NamedTuple):
    """The choice of one layer with dynamic mask attention.

    Attributes:
        ranks: (1, G, N) float.
        windows: G numbers, keys that each query keeps.
        local, sinks: newest and first positions that are always kept.
    """

    ranks: Tensor
    windows: tuple[int, ...]
    local: int
    sinks: int


@torch.no_grad()
def ranked_layers(model: Any, input_ids: Tensor) -> list[RankedLayer]:
    """Rank the keys of a text in every layer that chooses them.

    Args:
        model: a causal LM (a dynamask or a converted model).
        input_ids: (1, N) tokens.

    Returns:
        One entry for every layer with dynamic mask attention, in order; nothing where there is none.
    """
    found: list[RankedLayer] = []
    hooks = []
    for module in model.modules():
        for child in module.children():
            if isinstance(child, (DynamicMaskGate, RankPredictor)):
                hooks.append(child.register_forward_hook(_recorder(module, model.config, found)))
    try:
        if hooks:  # without the output layer, whose (N, vocabulary) logits nobody needs
            model.model(input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _recorder(layer: nn.Module, config: Any, found: list[RankedLayer]) -> Any:
    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        own: Any = layer
        windows = getattr(own, "windows", None) or (own.window,) * output.shape[1]
        local, sinks = getattr(own, "local", config.local), getattr(own, "sinks", config.sinks)
        found.append(RankedLayer(output, tuple(windows), local, sinks))

    return record
