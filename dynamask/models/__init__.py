"""Language models: configuration, decoder, presets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamask.lazy import lazy_names

if TYPE_CHECKING:
    from dynamask.models.configuration import DynamaskConfig
    from dynamask.models.modeling import DynamaskForCausalLM, DynamaskModel, new_cache
    from dynamask.models.presets import PRESETS, preset
    from dynamask.models.windows import uneven_windows

_HOME = {
    "PRESETS": "dynamask.models.presets",
    "DynamaskConfig": "dynamask.models.configuration",
    "DynamaskForCausalLM": "dynamask.models.modeling",
    "DynamaskModel": "dynamask.models.modeling",
    "new_cache": "dynamask.models.modeling",
    "preset": "dynamask.models.presets",
    "uneven_windows": "dynamask.models.windows",
}
"""Public name -> the module that defines it, imported on first use: the name of a preset needs no transformers."""

__all__ = [
    "PRESETS",
    "DynamaskConfig",
    "DynamaskForCausalLM",
    "DynamaskModel",
    "new_cache",
    "preset",
    "uneven_windows",
]

__getattr__, __dir__ = lazy_names(__name__, _HOME)
