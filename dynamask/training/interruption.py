"""Ctrl-C and SIGTERM end a training at the end of a step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from dynamask.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CHECK_EVERY = 10
"""Steps between checks where several processes must agree to stop."""


class StopAtSignal(TrainerCallback):
    """A Trainer callback and context manager: inside it, the first signal asks for a checkpoint at the next step's end.

    A second signal acts as it did before. Outside the main thread, which alone receives signals, nothing changes.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopAtSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer for a checkpoint and the end of the training once a signal came."""
        if args.world_size > 1:
            if state.global_step % _CHECK_EVERY:
                return
            received = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received) or None
        if self.received is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def raise_if_stopped(self, step: int, steps: int, output: str) -> None:
        """Raise Interrupted where the training ended before its last step."""
        if self.received is not None and step < steps:
            raise Interrupted(
                f"stopped at step {step} of {steps}; the checkpoint is in {output}: run the same command again to "
                "continue",
                self.received,
            )
