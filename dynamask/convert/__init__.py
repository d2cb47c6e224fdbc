"""Turn existing models into models whose attention runs on dynamask."""

from __future__ import annotations

from typing import TYPE_CHECKING

# These modules carry the names of their functions, so they are imported here: a module imported later would take the
# function's place.
from dynamask.convert.allocate_windows import allocate_windows
from dynamask.convert.compiled_layers import CompiledLayers, compiled_layers
from dynamask.convert.distill import distill
from dynamask.convert.learn_ranks import learn_ranks
from dynamask.convert.models import set_slopes, set_windows
from dynamask.convert.ranks_file import load_ranks, save_ranks
from dynamask.convert.upcycle import upcycle
from dynamask.lazy import lazy_names
from dynamask.models.recorded_prompts import RecordedPrompts, recorded_prompts

if TYPE_CHECKING:
    from dynamask.convert.distillation_trainer import DistillationTrainer
    from dynamask.convert.doge import from_doge

__all__ = [
    "CompiledLayers",
    "DistillationTrainer",
    "RecordedPrompts",
    "allocate_windows",
    "compiled_layers",
    "distill",
    "from_doge",
    "learn_ranks",
    "load_ranks",
    "recorded_prompts",
    "save_ranks",
    "set_slopes",
    "set_windows",
    "upcycle",
]

_HOME = {"DistillationTrainer": f"{__name__}.distillation_trainer", "from_doge": f"{__name__}.doge"}
"""Name -> the module that defines it, imported on first use."""

__getattr__, __dir__ = lazy_names(__name__, _HOME)
