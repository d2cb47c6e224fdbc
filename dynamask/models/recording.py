"""Record launches as a CUDA graph, and leave the process usable where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Record what the block launches.

    Only this thread is kept from operations that a graph cannot hold: threads that load data go on.

    Args:
        graph: new.
        pool: memory that it shares with graphs that never run at the same time, `torch.cuda.graph_pool_handle()`.

    Raises:
        RuntimeError: something in the block cannot be recorded; its message is that of the first cause. Nothing of the
            block has run on the device. torch leaves the recording's stream, random numbers and memory pool in place
            then; here they are put back, so that the process goes on.
    """
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    except BaseException as error:
        if stream is not None:
            _put_back(graph, stream)
        # Ending a recording that was broken raises an error of its own over the cause.
        cause = error.__context__
        if isinstance(error, RuntimeError) and isinstance(cause, Exception):
            raise RuntimeError(f"{type(cause).__name__}: {cause}") from cause
        raise


def _put_back(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device_index]
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(stream.device_index, graph.pool())
    with contextlib.suppress(RuntimeError, AttributeError):
        # A generator that still counts for the recording refuses to draw numbers; a copy of its state does not.
        generator.graphsafe_set_state(generator.clone_state())
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()  # takes the error of the recording off the device


__all__ = ["recording"]
