"""Language models: configuration, decoder, presets, conversion from dense and Doge models."""

from dynamask.models.configuration import DynamaskConfig
from dynamask.models.layer_windows import uneven_windows
from dynamask.models.modeling import DynamaskForCausalLM, DynamaskModel, new_cache
from dynamask.models.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "DynamaskConfig",
    "DynamaskForCausalLM",
    "DynamaskModel",
    "new_cache",
    "preset",
    "uneven_windows",
]
