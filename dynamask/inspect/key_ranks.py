"""The ranks of the keys of a text, and what each layer keeps by them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynamask.mixers.gate import DynamicMaskGate
from dynamask.mixers.rank_predictor import RankPredictor, sloped_ranks
from dynamask.models.decoder import decoder_of


class RankedLayer(NamedTuple):
    """The choice of one layer with dynamic mask attention.

    Attributes:
        ranks: (1, G, N) float.
        windows: G numbers, keys that each query keeps.
        local, sinks: newest and first positions that are always kept.
        layer: its number in the model.
    """

    ranks: Tensor
    windows: tuple[int, ...]
    local: int
    sinks: int
    layer: int


@torch.no_grad()
def ranked_layers(model: Any, input_ids: Tensor) -> list[RankedLayer]:
    """Rank the keys of a text in every layer that chooses them.

    Args:
        model: a causal LM (a dynamask or a converted model).
        input_ids: (1, N) tokens.

    Returns:
        One entry for every layer with dynamic mask attention, in order; nothing where there is none.
    """
    recorder = RankRecorder(model)
    try:
        if recorder.hooks:  # without the output layer, whose (N, vocabulary) logits nobody needs
            decoder_of(model)(input_ids, use_cache=False)
    finally:
        recorder.remove()
    return recorder.found


class RankRecorder:
    """Records the ranks of the next forward passes, until `remove`.

    Args:
        model: a causal LM.

    Attributes:
        found: one entry for every layer with dynamic mask attention and forward pass, in order.
        hooks: what is attached to the model.
    """

    def __init__(self, model: Any) -> None:
        self.found: list[RankedLayer] = []
        self.hooks: list[Any] = []
        for module in model.modules():
            for child in module.children():
                if isinstance(child, DynamicMaskGate):
                    self.hooks.append(child.register_forward_hook(self._gate_of(module, model.config)))
                elif isinstance(child, RankPredictor):
                    # Not on the predictor: a layer does not call it for a text that is shorter than its windows.
                    hook = self._predictor_of(module, child, model.config)
                    self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Detach from the model."""
        for hook in self.hooks:
            hook.remove()

    def _gate_of(self, layer: nn.Module, config: Any) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._add(layer, config, output)

        return record

    def _predictor_of(self, layer: nn.Module, predictor: RankPredictor, config: Any) -> Any:
        def record(_module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
            hidden_states = inputs[0] if inputs else named["hidden_states"]
            self._add(layer, config, predictor(hidden_states.detach()))

        return record

    def _add(self, layer: Any, config: Any, ranks: Tensor) -> None:
        windows = getattr(layer, "windows", None)
        if windows is None:
            windows = config.head_windows[layer.layer_idx]
        local, sinks = getattr(layer, "local", config.local), getattr(layer, "sinks", config.sinks)
        positions = torch.arange(ranks.shape[2], device=ranks.device)[None]
        ranks = sloped_ranks(ranks.detach(), getattr(layer, "slopes", None), positions)
        self.found.append(RankedLayer(ranks, tuple(windows), local, sinks, int(layer.layer_idx)))
