"""Language models: configuration, decoder, presets."""

from dynamask.models.configuration import DynamaskConfig
from dynamask.models.modeling import DynamaskForCausalLM, DynamaskModel, new_cache
from dynamask.models.presets import PRESETS, preset
from dynamask.models.windows import uneven_windows

__all__ = [
    "PRESETS",
    "DynamaskConfig",
    "DynamaskForCausalLM",
    "DynamaskModel",
    "new_cache",
    "preset",
    "uneven_windows",
]
