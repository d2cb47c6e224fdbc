"""Windows that change while a model trains: what a setting `window_schedule` means, and how a model is given one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamask.errors import InvalidInputError

WindowSchedule = Sequence[Sequence[float]]
"""[share of the training, factor on the window] in rising order of shares."""


def check_window_schedule(schedule: WindowSchedule) -> None:
    """Raise InvalidInputError for what is not pairs, shares that do not rise, or a factor that is not above 0."""
    try:
        shares = [float(share) for share, _ in schedule]
        factors = [float(factor) for _, factor in schedule]
        fits = shares == sorted(shares) and all(factor > 0 for factor in factors)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise InvalidInputError(f"window_schedule is [share, factor > 0] in rising order of shares; got {schedule}")


def scheduled_window(window: int, schedule: WindowSchedule, step: int, steps: int) -> int:
    """Keys per query in a step, the first of `steps` being 0; before the first share, `window` itself."""
    factor = 1.0
    for share, value in schedule:
        if step >= share * steps:
            factor = value
    return max(1, round(window * factor))


def set_window(model: Any, window: int | None) -> None:
    """Let the mixers of a dynamask model that choose keep so many keys, those of uneven windows in proportion; None
    leaves a model alone that has none of them."""
    # Mixers read the window from the config at every call, and share the one config.
    if window is not None and model.config.window != window:
        model.config.window = window
