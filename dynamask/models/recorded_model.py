"""What a recording has read of a model, and whether the model is still the same."""

from __future__ import annotations

import copy
import itertools
import operator
import weakref
from collections.abc import Iterator
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
        # A replay checks all of this while the device waits: flat lists, walked without a loop in Python.
        self._modules = [module.__dict__ for module in model.modules() if module is not model]
        nodes = [module.__dict__ for module in model.modules()]
        self._nodes = [own for own in nodes if own["_modules"]]
        self._held = [own[name] for own in nodes for name in ("_parameters", "_buffers") if own[name]]
        self._tensors: list[Tensor] = [each for held in self._held for each in held.values() if each is not None]
        self._places = list(map(Tensor.data_ptr, self._tensors))
        self._parts = [*itertools.chain.from_iterable(map(dict.values, self._registries()))]  # keeps them alive
        self._identities = list(map(id, self._parts))

    def is_still(self, model: nn.Module) -> bool:
        """Whether a replay would do what the model would: same model, modules, rules and weights in place, no hooks."""
        return (
            self._model() is model
            and self._rules == _rules(model)
            and not any(map(operator.itemgetter("_forward_hooks"), self._modules))
            and not any(map(operator.itemgetter("_forward_pre_hooks"), self._modules))
            and not any(map(dict.__contains__, self._modules, itertools.repeat("_hf_hook")))
            and self._identities == list(map(id, itertools.chain.from_iterable(map(dict.values, self._registries()))))
            and self._places == list(map(Tensor.data_ptr, self._tensors))
        )

    def _registries(self) -> Iterator[dict[str, Any]]:
        """The dictionaries of children, then of tensors, that modules hold now."""
        return itertools.chain(map(operator.itemgetter("_modules"), self._nodes), self._held)


def listened_to(module: nn.Module) -> bool:
    """Whether somebody listens to this module: a replay would not call them."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__)


def _rules(model: nn.Module) -> list[Any]:
    config: Any = getattr(model, "config", None)
    return [getattr(config, name, None) for name in _RULES]


__all__ = ["RecordedModel", "listened_to"]
