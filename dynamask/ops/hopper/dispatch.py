"""Which inputs the Gluon kernels for Hopper take, and where to get those kernels."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def hopper(module: str, query: Tensor, value: Tensor) -> ModuleType | None:
    """Module `module` of this package if its kernel can run on these inputs, else None.

    Args:
        module: "forward", "backward_dkv" or "backward_dq"; "backward" stands for both.
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
    if not _has_gluon() or (_pass_of(module), *variant(query, value)) in _distrusted:
        return None
    return importlib.import_module(f"dynamask.ops.hopper.{_MODULES.get(module, module)}")


_distrusted: set[tuple[Any, ...]] = set()
_MODULES = {"backward": "backward_dkv"}
"""A pass -> one of its modules, where they are named differently."""


def variant(query: Tensor, value: Tensor) -> tuple[Any, ...]:
    """What a kernel is compiled for: dtype, head widths, query heads per key/value head, and the device."""
    return query.dtype, query.shape[3], value.shape[3], query.shape[1] // value.shape[1], query.device.index


def distrust(attention_pass: str, query: Tensor, value: Tensor) -> None:
    """Use the portable kernels in place of this package's from now on.

    Args:
        attention_pass: "forward" or "backward".
        query, value: inputs of the variant.
    """
    _distrusted.add((attention_pass, *variant(query, value)))


def _pass_of(module: str) -> str:
    return module.split("_")[0]


@lru_cache(maxsize=1)
def _has_gluon() -> bool:
    """Looked for by itself: an import that fails in this package is a fault, and no reason to take the slower path."""
    try:
        import triton.experimental.gluon  # noqa: F401
    except ImportError:
        return False
    return True
