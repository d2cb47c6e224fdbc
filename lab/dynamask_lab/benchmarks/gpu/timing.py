"""How long a call takes on the GPU, and how much memory it needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_SPAN_MS = 60.0
_WARMUP_MS = 15.0
_MOST = 200
_CYCLES_PER_SECOND = 2e9
_LONGEST_PAUSE = 2e-3


def milliseconds(run: Callable[[], Any], *, least: int = 3) -> float:
    """Median time of a call on the device, by events, its inputs not in the L2 cache.

    As `triton.testing.do_bench` does it, but with `least` repetitions and one warm-up where a call takes long (that
    one runs everything eight times or more, which slow peers would spend seconds on), and with the GPU held busy
    until the host has launched the whole call: a short call of several launches is otherwise timed by the host.
    """
    run()
    flush = _l2_sized()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    pause = pause_cycles(time.perf_counter() - began)
    first = max(_events(run, flush, 1, pause)[0], 1e-3)
    for _ in range(int(_WARMUP_MS / first)):
        run()
    return statistics.median(_events(run, flush, min(_MOST, max(least, int(_SPAN_MS / first))), pause))


def pause_cycles(seconds: float) -> int:
    """GPU cycles that last a little longer than the host takes for its launches; bounded, as some calls wait."""
    return int(min(1.3 * seconds, _LONGEST_PAUSE) * _CYCLES_PER_SECOND)


def _events(run: Callable[[], Any], flush: Tensor, repeats: int, pause: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        torch.cuda._sleep(pause)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


@lru_cache(maxsize=1)
def _l2_sized() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def graph_milliseconds(run: Callable[[], Any], steps: int = 20) -> float:
    """Time of a call as short as a launch: replays of a CUDA graph of `steps` of them."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            run()
    return milliseconds(graph.replay) / steps


def kernel_microseconds(run: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Time of each kernel of a call, by the profiler; names are cut after 24 characters."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return {
        event.key[:24]: round(event.device_time_total / repeats, 1)
        for event in found.key_averages()
        if event.device_time_total
    }


def extra_memory(run: Callable[[], Any], inputs: tuple[Tensor, ...]) -> float:
    """Peak memory of a run above what stood before it and what it returns, as a share of the inputs' size."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    peak = torch.cuda.max_memory_allocated() - before
    kept = sum(t.nbytes for t in (results if isinstance(results, tuple) else (results,)))
    return (peak - kept) / sum(t.nbytes for t in inputs)
