"""A run of `dynamask train` towards a teacher."""

from __future__ import annotations

from typing import Any

from dynamask.convert.architectures import PREFIX
from dynamask.convert.distillation_trainer import DistillationTrainer
from dynamask.convert.teacher import check_vocabularies
from dynamask.errors import UsageError
from dynamask.hub import check_local_or_hub
from dynamask.training import AtomicTrainer, TrainConfig, TrainResult, open_run, train
from dynamask.training.folder import model_folder
from dynamask.training.run import saved_config


class DistillationRunTrainer(DistillationTrainer, AtomicTrainer):
    """Trains as `DistillationTrainer`, with the schedule, data order and checkpoints of `AtomicTrainer`."""

    def _get_num_items_in_batch(self, batch_samples: list, device: Any) -> Any:
        return None  # the divergence is a mean of its own


def train_towards(config: TrainConfig, **options: Any) -> TrainResult:
    """Train the converted model `config.init` towards the distributions of the dense model `config.teacher`.

    Blocks are read as texts that run on: the teacher sees what the student may see.

    Args:
        config: the run; `rank_rate` is that of the rank predictors.
        **options: of `dynamask.training.train`.

    Returns:
        The result; its loss is the divergence, in nats per token.

    Raises:
        UsageError: no teacher, or whatever `dynamask.training.train` raises.
        InvalidInputError: a model that is not converted, or a teacher with another vocabulary.
    """
    if config.teacher is None:
        raise UsageError("train_towards needs a teacher: teacher=MODEL")
    assert config.init is not None  # TrainConfig refuses a teacher without
    check_local_or_hub(config.init, "folder")
    student = saved_config(str(model_folder(config.init)))
    if not student.model_type.startswith(PREFIX):
        raise UsageError(
            f"teacher= trains a converted model, and init={config.init} is of kind {student.model_type!r}: convert it "
            "first (dynamask convert upcycle), or leave teacher out to train it on the texts"
        )
    teacher, _ = open_run(config.teacher)
    check_vocabularies(student, teacher.config)  # before the texts are read

    def make(*args: Any, rank_rate: float, **kwargs: Any) -> DistillationRunTrainer:
        return DistillationRunTrainer(*args, teacher=teacher, rank_rate=rank_rate, **kwargs)

    return train(config, trainer=make, **options)
