"""Looks at the data on the host, which a recorded pass must not take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_forbidden = 0


@contextlib.contextmanager
def without_looks() -> Iterator[None]:
    """Let the passes of the block take no look at their data: they assume padding and packed documents where given.

    For all threads: a backward pass has threads of its own.
    """
    global _forbidden
    _forbidden += 1
    try:
        yield
    finally:
        _forbidden -= 1


def looks_allowed() -> bool:
    """Whether a pass may look at its data: not within `without_looks`, and not while it is compiled."""
    if torch.compiler.is_compiling():  # first: a compiled graph would be guarded by the number below
        return False
    return not _forbidden


__all__ = ["looks_allowed", "without_looks"]
