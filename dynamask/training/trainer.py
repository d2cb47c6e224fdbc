"""transformers' Trainer with checkpoints that are either whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class AtomicTrainer(Trainer):
    """Writes each checkpoint beside its place and renames it when every file is on disk.

    Args:
        keep: checkpoints kept; older ones are deleted once a newer one is whole.
    """

    def __init__(self, *args: Any, keep: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep = keep
        self._staging: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final = Path(super()._get_output_dir(trial))
        staging = final / ".partial"
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()  # every rank writes its own random state
        if self.args.should_save:
            for file in (staging / name).rglob("*"):
                _flush(file)
            if (final / name).exists():
                shutil.rmtree(final / name)
            os.replace(staging / name, final / name)
            _flush(final)
            shutil.rmtree(staging, ignore_errors=True)
            for old in checkpoints(final)[: -self.keep]:
                shutil.rmtree(old)


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), path) for path in output.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to disk, so that a rename cannot overtake what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
