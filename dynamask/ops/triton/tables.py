"""Small tables of integers that kernels read, copied to the device once."""

from __future__ import annotations

from functools import lru_cache
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_Key = tuple[tuple[tuple[int, ...], ...], torch.device]

_ALIVE: WeakValueDictionary[_Key, Tensor] = WeakValueDictionary()
"""Tables that exist, for whoever captures a graph."""

_RECORDED: dict[_Key, Tensor] = {}
"""Tables that graphs read: they must outlive them."""


def device_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Give rows of integers to kernels as one int32 tensor, the same one for the same integers.

    A CUDA graph that is being captured takes no copies from the host and keeps its memory to itself: where no step
    before the capture has made the table, the graph gets one of its own, filled number by number at each replay.

    Args:
        rows: as many numbers in each.
        device: where the kernels run.

    Returns:
        (rows, numbers) int32, not to be written to.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        known = _ALIVE.get((rows, device))
        if known is not None:
            _RECORDED[rows, device] = known
            return known
        table = torch.empty(len(rows), len(rows[0]), dtype=torch.int32, device=device)
        for target, numbers in zip(table, rows, strict=True):
            for place, number in zip(target, numbers, strict=True):
                place.fill_(number)
        return table
    return _cached_table(rows, device)


@lru_cache(maxsize=4096)
def _cached_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        table = torch.tensor(rows, dtype=torch.int32, device=device)
    _ALIVE[rows, device] = table
    return table
