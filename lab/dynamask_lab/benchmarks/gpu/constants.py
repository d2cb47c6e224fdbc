"""Tuning constants of the kernels, changed for a while."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any


def set_constant(name: str, value: Any) -> Any:
    """Set a constant of a module of `dynamask.ops`, and return what it was.

    Args:
        name: such as `triton.expiry._RUNS`.
        value: of the constant's type.
    """
    module_name, _, constant = name.rpartition(".")
    module = importlib.import_module(f"dynamask.ops.{module_name}")
    before = getattr(module, constant)
    setattr(module, constant, value)
    return before


@contextmanager
def constants(values: Mapping[str, Any]) -> Iterator[None]:
    """Give constants other values inside; names as in `set_constant`."""
    with ExitStack() as stack:
        for name, value in values.items():
            stack.callback(set_constant, name, set_constant(name, value))
        yield
