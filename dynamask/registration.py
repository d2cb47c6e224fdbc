"""Registration with transformers' Auto classes, done when those classes are first used.

`import dynamask` must stay cheap, and transformers takes seconds to import. A small import hook therefore waits for
transformers' registry of configurations and adds an entry that imports dynamask's models on the first use of their
`model_type`. Another waits for the registry of attention functions and adds `attn_implementation="dynamask"`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.models.auto.configuration_auto"
_LORA_TARGETS = "peft.utils.constants"
_NATIVE, _CONVERTED = "dynamask", "dynamask_"
_NATIVE_MODULE = "dynamask.models.modeling"
_CONVERTED_MODULE = "dynamask.convert.models"
_ATTENTION = "transformers.modeling_utils"
_ATTENTION_MODULE = "dynamask.attention_function"


def _module_of(model_type: Any) -> str | None:
    """Return the module that registers a `model_type`, or None for one that is not of dynamask."""
    if model_type == _NATIVE:
        return _NATIVE_MODULE
    if isinstance(model_type, str) and model_type.startswith(_CONVERTED):
        return _CONVERTED_MODULE
    return None


class _OnDemand(dict[str, Any]):
    """The registry's table of added configurations; dynamask's are imported when first looked up."""

    def __missing__(self, key: str) -> Any:
        module = _module_of(key)
        if module is not None:
            loaded = importlib.import_module(module)  # registers its configurations here
            if module == _CONVERTED_MODULE and key in loaded.converted_model_types():
                loaded.converted_classes(key)
            if dict.__contains__(self, key):
                return dict.__getitem__(self, key)
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        if dict.__contains__(self, key):
            return True
        try:
            self[key]  # type: ignore[index]
        except KeyError:
            return False
        return True


def _attach(registry: ModuleType) -> None:
    mapping: Any = registry.CONFIG_MAPPING
    known = getattr(mapping, "_extra_content", None)
    if isinstance(known, dict):
        mapping._extra_content = _OnDemand(known)
    else:  # another transformers: register at once, at the price of the import
        importlib.import_module(_NATIVE_MODULE)
        converted = importlib.import_module(_CONVERTED_MODULE)
        for model_type in converted.converted_model_types():
            converted.converted_classes(model_type)


def _add_lora_targets(constants: ModuleType) -> None:
    """Give PEFT default targets: those of a converted model's original, q_proj and v_proj of a new model, and ranks."""
    ranks = ["rank_predictor.up", "rank_predictor.down"]
    for name, known in vars(constants).items():
        if name == "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING" and isinstance(known, dict):
            found = {kind: targets for kind, targets in known.items() if isinstance(targets, list)}
            for kind, targets in found.items():
                known.setdefault(_CONVERTED + kind, [*targets, *ranks])
            known.setdefault(_NATIVE, ["q_proj", "v_proj", *ranks])


class _AfterImport(MetaPathFinder):
    """Runs an action as soon as a module has been imported."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        loader.exec_module = exec_module
        return spec


def _add_attention(module: ModuleType) -> None:
    """Register `attn_implementation="dynamask"`."""
    importlib.import_module(_ATTENTION_MODULE)


def register() -> None:
    """Register with transformers' Auto classes and attention functions and with PEFT, now or when they are imported."""
    for name, ready, action in (
        (_REGISTRY, "CONFIG_MAPPING", _attach),
        (_ATTENTION, "ALL_ATTENTION_FUNCTIONS", _add_attention),
        (_LORA_TARGETS, "", _add_lora_targets),
    ):
        module = sys.modules.get(name)
        if module is not None and (not ready or hasattr(module, ready)):
            action(module)
        else:
            sys.meta_path.insert(0, _AfterImport(name, action))
