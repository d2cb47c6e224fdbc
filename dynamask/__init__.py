"""Dynamic Mask Attention: trainable, content-aware sparse attention (arXiv 2508.02124)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dynamask import registration
from dynamask.lazy import lazy_names

if TYPE_CHECKING:
    from dynamask import convert
    from dynamask.cache import BoundedCache
    from dynamask.errors import CacheRollbackError, InvalidInputError
    from dynamask.layers import DynamicMaskAttention
    from dynamask.models import DynamaskConfig, DynamaskForCausalLM, DynamaskModel
    from dynamask.ops import (
        context_parallel,
        context_parallel_attention,
        dynamic_mask_attention,
        future_attention,
        interval_attention,
        key_expiry,
        split_sequence,
    )

__version__ = "0.2.0"

_HOME = {
    "BoundedCache": "dynamask.cache",
    "CacheRollbackError": "dynamask.errors",
    "DynamaskConfig": "dynamask.models",
    "DynamaskForCausalLM": "dynamask.models",
    "DynamaskModel": "dynamask.models",
    "DynamicMaskAttention": "dynamask.layers",
    "InvalidInputError": "dynamask.errors",
    "context_parallel": "dynamask.ops",
    "context_parallel_attention": "dynamask.ops",
    "dynamic_mask_attention": "dynamask.ops",
    "future_attention": "dynamask.ops",
    "interval_attention": "dynamask.ops",
    "key_expiry": "dynamask.ops",
    "split_sequence": "dynamask.ops",
}
"""Public name -> the module that defines it, imported on first use so that `import dynamask` stays cheap."""

__all__ = [
    "BoundedCache",
    "CacheRollbackError",
    "DynamaskConfig",
    "DynamaskForCausalLM",
    "DynamaskModel",
    "DynamicMaskAttention",
    "InvalidInputError",
    "context_parallel",
    "context_parallel_attention",
    "convert",
    "dynamic_mask_attention",
    "future_attention",
    "interval_attention",
    "key_expiry",
    "split_sequence",
]


def __getattr__(name: str) -> Any:
    return importlib.import_module("dynamask.convert") if name == "convert" else _find(name)


_find, __dir__ = lazy_names(__name__, _HOME)
registration.register()
