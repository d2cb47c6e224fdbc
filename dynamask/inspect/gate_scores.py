"""What the gates of a model say of a text, for whoever looks at its masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynamask.mixers.gate import DynamicMaskGate


@torch.no_grad()
def gate_scores(model: Any, input_ids: Tensor) -> list[Tensor]:
    """The scores that rank the keys of every layer.

    Args:
        model: a causal LM (a dynamask or a converted model).
        input_ids: (1, N) tokens.

    Returns:
        (1, G, N) float of every layer with dynamic mask attention, in order; nothing where there is none.
    """
    found: list[Tensor] = []
    gates = [module for module in model.modules() if isinstance(module, DynamicMaskGate)]
    if not gates:
        return found
    hooks = [gate.register_forward_hook(lambda _m, _i, output: found.append(output)) for gate in gates]
    try:
        # Without the output layer, whose (N, vocabulary) logits nobody needs.
        model.model(input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
