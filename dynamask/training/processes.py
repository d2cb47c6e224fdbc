"""The processes of a training: how many there are, and what they must agree on to continue a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

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
