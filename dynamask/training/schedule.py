"""Learning rate as a share of its peak, by step."""

from __future__ import annotations

import math

from dynamask.errors import InvalidInputError

SCHEDULES = ("cosine", "wsd", "constant")


def learning_rate_share(schedule: str, step: int, steps: int, warmup: int) -> float:
    """Return the learning rate of a step, divided by the peak rate.

    Args:
        schedule: "cosine" (to a tenth of the peak), "wsd" (warm-up, stable, linear to zero over the last fifth) or
            "constant".
        step: from 0 on.
        steps: steps of the whole training.
        warmup: steps over which the rate rises linearly; the first step has 1 / warmup of the peak.

    Raises:
        InvalidInputError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InvalidInputError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        return max(0.0, min(1.0, (steps - step) / max(1, steps // 5)))
    share = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
