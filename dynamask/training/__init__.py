"""Training: configuration, a Trainer with atomic checkpoints, and the run that ties data, model and both together."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamask.training.add_rank_loss import add_rank_loss
    from dynamask.training.checkpointing import checkpoints
    from dynamask.training.config import TrainConfig
    from dynamask.training.folder import model_folder, open_corpus, open_run
    from dynamask.training.optimizer import adamw, parameter_groups
    from dynamask.training.recorded_gradients import RecordedGradients
    from dynamask.training.recorded_steps import record_steps
    from dynamask.training.run import TrainResult, train
    from dynamask.training.trainer import AtomicTrainer
    from dynamask.training.window_schedule import ScheduledWindow

_HOME = {
    "AtomicTrainer": "trainer",
    "RecordedGradients": "recorded_gradients",
    "ScheduledWindow": "window_schedule",
    "TrainConfig": "config",
    "TrainResult": "run",
    "add_rank_loss": "add_rank_loss",
    "record_steps": "recorded_steps",
    "adamw": "optimizer",
    "checkpoints": "checkpointing",
    "model_folder": "folder",
    "open_corpus": "folder",
    "open_run": "folder",
    "parameter_groups": "optimizer",
    "train": "run",
}
"""Public name -> the module that defines it, imported on first use: evaluating a model needs no Trainer."""

__all__ = [
    "AtomicTrainer",
    "RecordedGradients",
    "ScheduledWindow",
    "TrainConfig",
    "TrainResult",
    "adamw",
    "add_rank_loss",
    "checkpoints",
    "model_folder",
    "open_corpus",
    "open_run",
    "parameter_groups",
    "record_steps",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"dynamask.training.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dynamask.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
