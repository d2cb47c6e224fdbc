"""Small tables of integers that kernels read, copied to the device once."""

from __future__ import annotations

import torch
from torch import Tensor

_kept: dict[tuple[tuple[tuple[int, ...], ...], torch.device], Tensor] = {}


def device_table(rows: tuple[tuple[int, ...], ...], device: torch.device, *, keep: bool = True) -> Tensor:
    """Give rows of integers to kernels as one int32 tensor, the same one for the same integers.

    A CUDA graph that is being captured takes no copies from the host and keeps its memory to itself: where a table was
    not made before, the graph gets one of its own, filled number by number.

    Args:
        rows: as many numbers in each.
        device: where the kernels run.
        keep: for the next call with these integers; False for integers that come from data.

    Returns:
        (rows, numbers) int32, not to be written to.
    """
    table = _kept.get((rows, device))
    if table is not None:
        return table
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        table = torch.empty(len(rows), len(rows[0]), dtype=torch.int32, device=device)
        for target, numbers in zip(table, rows, strict=True):
            for place, number in zip(target, numbers, strict=True):
                place.fill_(number)
        return table
    with torch.inference_mode(False):
        table = torch.tensor(rows, dtype=torch.int32, device=device)
    if keep:
        _kept[rows, device] = table
    return table
