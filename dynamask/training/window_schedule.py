"""A Trainer callback for windows that shrink in training, with which ranks learn what a text asks for later."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from dynamask.errors import InvalidInputError
from dynamask.models import DynamaskConfig
from dynamask.models.window_schedule import WindowSchedule, check_window_schedule, scheduled_windows
from dynamask.models.windows import HeadWindows, set_head_windows


class ScheduledWindow(TrainerCallback):
    """Steps see the scheduled window; evaluation, checkpoints and the finished model have the config's own.

    Keys that no query sees cannot be learned of: a model that is to find what was said far back begins with a wide
    window and narrows it.

    Args:
        schedule: [share of the training, factor on the window] in rising order of shares: from that share of the steps
            on, the window is so many times the config's, until the next. [[0, 4], [0.5, 2], [0.7, 1]] made models of
            12M parameters find as much as dense attention with an eighth of its keys (`docs/results`, needle).

    Raises:
        InvalidInputError: a schedule that does not rise or has a factor that is not above 0; when training begins, a
            model that is not a dynamask one: an upcycled model has learned to attend with all of its keys already.
    """

    def __init__(self, schedule: WindowSchedule) -> None:
        check_window_schedule(schedule)
        self.schedule = schedule
        self._windows: HeadWindows | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the window to return to."""
        config = kwargs["model"].config
        if not isinstance(config, DynamaskConfig):
            raise InvalidInputError(
                f"windows are scheduled for dynamask models; got a {type(config).__name__}, which begins dense as it is"
            )
        self._windows = config.head_windows

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the window of this step."""
        assert self._windows is not None
        windows = scheduled_windows(self._windows, self.schedule, state.global_step, state.max_steps)
        set_head_windows(kwargs["model"], windows)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the window of the configuration, for whatever uses or saves the model between steps."""
        assert self._windows is not None
        set_head_windows(kwargs["model"], self._windows)
