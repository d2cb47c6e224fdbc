"""The processes of a training: how many there are, and what they must agree on to continue a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

LAUNCH = "launch.json"
"""File of a run's folder that says how many processes wrote its checkpoints."""


def processes() -> int:
    """Return the number of processes that torchrun, accelerate or Slurm's launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Return whether a launcher of processes started this one, be it the only one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Return whether this process is the one that writes what all share."""
    return int(os.environ.get("RANK", "0")) == 0


def processes_of(output: Path) -> int:
    """Return how many processes the run in a folder had when it last began; 1 where that was not written down."""
    try:
        return int(json.loads((output / LAUNCH).read_text(encoding="utf-8"))["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def note_processes(output: Path) -> None:
    """Write down how many processes this run has."""
    (output / LAUNCH).write_text(json.dumps({"processes": processes()}), encoding="utf-8")


def agreed(decide: Callable[[], T]) -> T:
    """Let the first process decide, and return its answer in all of them; an error is raised in all of them, too."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return decide()
    answer: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]  # type: ignore[misc]
    return answer[0]  # type: ignore[return-value]
