"""Training: configuration, a Trainer with atomic checkpoints, and the run that ties data, model and both together."""

from dynamask.training.config import TrainConfig
from dynamask.training.run import TrainResult, model_folder, open_corpus, open_run, train
from dynamask.training.trainer import AtomicTrainer, checkpoints
from dynamask.training.window_schedule import ScheduledWindow

__all__ = [
    "AtomicTrainer",
    "ScheduledWindow",
    "TrainConfig",
    "TrainResult",
    "checkpoints",
    "model_folder",
    "open_corpus",
    "open_run",
    "train",
]
