"""Which inputs the Gluon kernels for Hopper take, and where to get those kernels."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor


def hopper(module: str, query: Tensor, value: Tensor) -> ModuleType | None:
    """Module `module` of this package if its kernel can run on these inputs, else None.

    Args:
        module: "forward", "backward_dkv" or "backward_dq".
        query, value: as the kernel would get them. It takes 16-bit numbers, widths of 32, 64 or 128, and up to 64
            query heads per key/value head, on a Hopper GPU, under a Triton that has Gluon.
    """
    if not query.is_cuda or torch.cuda.get_device_capability(query.device)[0] != 9:
        return None
    widths, ratio = (query.shape[3], value.shape[3]), query.shape[1] // value.shape[1]
    # Rows of keys and values are addressed in 32 bits from the head's first.
    if query.element_size() != 2 or ratio > 64 or value.shape[2] * max(widths) >= 2**31:
        return None
    if any(width not in (32, 64, 128) for width in widths):
        return None
    return importlib.import_module(f"dynamask.ops.hopper.{module}") if _has_gluon() else None


@lru_cache(maxsize=1)
def _has_gluon() -> bool:
    """Looked for by itself: an import that fails in this package is a fault, and no reason to take the slower path."""
    try:
        import triton.experimental.gluon  # noqa: F401
    except ImportError:
        return False
    return True
