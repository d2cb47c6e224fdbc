"""The five exhibits that open `docs/results`: each a picture of raw lines, two sentences, and its runs' command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dynamask_lab.report.exhibits.choosing import effect_of_choosing
from dynamask_lab.report.exhibits.common import Drawn, Sweeps
from dynamask_lab.report.exhibits.cost import cost
from dynamask_lab.report.exhibits.loss_step import loss_against_step
from dynamask_lab.report.exhibits.loss_window import loss_against_window
from dynamask_lab.report.exhibits.match_distance import match_against_distance

__all__ = ["Drawn", "Sweeps", "exhibits"]


def exhibits(results: Path, sweeps: Sweeps, folder: Path) -> list[Drawn]:
    """Draw every exhibit that has raw lines.

    Args:
        results: folder of raw lines.
        sweeps: the runs of the experiments in it.
        folder: for the pictures.
    """
    draw: list[Callable[[Path, Sweeps, Path], Drawn | None]] = [
        loss_against_window,
        effect_of_choosing,
        loss_against_step,
        match_against_distance,
        cost,
    ]
    return [found for each in draw if (found := each(results, sweeps, folder)) is not None]
