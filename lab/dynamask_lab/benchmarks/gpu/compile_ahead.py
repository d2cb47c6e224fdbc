"""Compile Triton's kernels without a launch, so that a process that times them later finds them in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime.jit import JITFunction

from dynamask.ops.hopper import self_check


@contextmanager
def compile_only() -> Iterator[None]:
    """Make every launch inside a compilation, for the tensors' device.

    Results are whatever stood in memory. The check of a Hopper kernel at its first use is launched as ever: its
    problem is small, and it looks at what it computes.
    """
    run, agrees = JITFunction.run, self_check._agrees

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def agrees_by_launches(*args: Any) -> bool:
        JITFunction.run = run  # type: ignore[method-assign]
        try:
            return agrees(*args)
        finally:
            JITFunction.run = compiled  # type: ignore[method-assign]

    JITFunction.run = compiled  # type: ignore[method-assign]
    self_check._agrees = agrees_by_launches  # type: ignore[assignment]
    try:
        yield
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        self_check._agrees = agrees
