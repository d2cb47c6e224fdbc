"""Training: configuration, a Trainer with atomic checkpoints, and the run that ties data, model and both together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamask.lazy import lazy_names

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
    "AtomicTrainer": "dynamask.training.trainer",
    "RecordedGradients": "dynamask.training.recorded_gradients",
    "ScheduledWindow": "dynamask.training.window_schedule",
    "TrainConfig": "dynamask.training.config",
    "TrainResult": "dynamask.training.run",
    "add_rank_loss": "dynamask.training.add_rank_loss",
    "record_steps": "dynamask.training.recorded_steps",
    "adamw": "dynamask.training.optimizer",
    "checkpoints": "dynamask.training.checkpointing",
    "model_folder": "dynamask.training.folder",
    "open_corpus": "dynamask.training.folder",
    "open_run": "dynamask.training.folder",
    "parameter_groups": "dynamask.training.optimizer",
    "train": "dynamask.training.run",
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

__getattr__, __dir__ = lazy_names(__name__, _HOME)
