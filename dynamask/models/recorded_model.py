"""What a recording has read of a model, and whether the model is still the same."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

from torch import Tensor, nn

_RULES = ("windows", "slopes", "local", "sinks", "ranking", "sliding_window", "layer_types", "num_hidden_layers")
"""Fields of a configuration that say which keys are kept: a replay does not read them again."""


class RecordedModel:
    """Modules, places of weights and rules of a model at the time of a recording.

    Args:
        model: a dynamask or converted causal LM.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._rules = copy.deepcopy(_rules(model))
        # A replay checks all of this while the device waits, so it is laid out flat.
        self._modules: list[dict[str, Any]] = []
        self._children: list[tuple[dict[str, Any], list[nn.Module | None]]] = []
        self._held: list[dict[str, Tensor | None]] = []
        self._tensors: list[Tensor] = []
        for module in model.modules():
            own = module.__dict__
            if module is not model:
                self._modules.append(own)
            if own["_modules"]:
                self._children.append((own, list(own["_modules"].values())))
            for name in ("_parameters", "_buffers"):
                if own[name]:
                    self._held.append(own[name])
                    self._tensors.extend(tensor for tensor in own[name].values() if tensor is not None)
        self._known = self._identities()
        self._places = list(map(Tensor.data_ptr, self._tensors))

    def is_still(self, model: nn.Module) -> bool:
        """Whether a replay would do what the model would: same model, modules, rules and weights in place, no hooks."""
        if self._model() is not model or self._rules != _rules(model):
            return False
        for own in self._modules:
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "_hf_hook" in own:
                return False
        for own, children in self._children:
            if list(own["_modules"].values()) != children:
                return False
        return self._known == self._identities() and self._places == list(map(Tensor.data_ptr, self._tensors))

    def _identities(self) -> list[int]:
        """Which tensors the modules hold now, by identity."""
        return list(map(id, itertools.chain.from_iterable(map(dict.values, self._held))))


def listened_to(module: nn.Module) -> bool:
    """Whether somebody listens to this module: a replay would not call them."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__)


def _rules(model: nn.Module) -> list[Any]:
    config: Any = getattr(model, "config", None)
    return [getattr(config, name, None) for name in _RULES]


__all__ = ["RecordedModel", "listened_to"]
