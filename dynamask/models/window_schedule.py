"""Windows that change while a model trains: what a setting `window_schedule` means."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING

from dynamask.errors import InvalidInputError

if TYPE_CHECKING:
    from dynamask.models.windows import HeadWindows

WindowSchedule = Sequence[Sequence[float]]
"""[share of the training, factor on the windows] in rising order of shares."""


def check_window_schedule(schedule: WindowSchedule) -> None:
    """Refuse a schedule that does not end at the config's window.

    Raises:
        InvalidInputError: entries that are no pairs, shares that do not rise within 0 to below 1, a factor that is not
            above 0, or a last factor other than 1: the model would be evaluated and saved with a window it never saw.
    """
    try:
        shares = [float(share) for share, _ in schedule]
        factors = [float(factor) for _, factor in schedule]
        rising = all(first < second for first, second in pairwise(shares))
        fits = rising and all(0 <= share < 1 for share in shares) and all(0 < factor < inf for factor in factors)
        fits = fits and (not factors or factors[-1] == 1)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise InvalidInputError(
            "window_schedule is [share, factor] pairs in rising order of shares, from 0 to below 1, with factors above "
            f"0 of which the last is 1, such as [[0, 4], [0.5, 2], [0.7, 1]]; got {schedule}"
        )


def scheduled_windows(windows: HeadWindows, schedule: WindowSchedule, step: int, steps: int) -> HeadWindows:
    """Compute the windows of a step, the first of `steps` being 0; before the first share, `windows` themselves.

    Args:
        windows: of the model, L x G.
        schedule: see `WindowSchedule`.
        step, steps: of the training.

    Returns:
        L x G integers, at least 1.
    """
    factor = 1.0
    for share, value in schedule:
        if step >= share * steps:
            factor = value
    return tuple(tuple(max(1, round(window * factor)) for window in layer) for layer in windows)
