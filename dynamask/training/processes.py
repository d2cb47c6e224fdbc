"""The processes of a training: how many there are, and what they must agree on to continue a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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


def neighbours(size: int) -> Any:
    """Return the process group of this process and the `size - 1` that stand beside it; all processes call this."""
    world = dist.get_world_size()
    group, _ = dist.new_subgroups_by_enumeration([list(range(i, i + size)) for i in range(0, world, size)])
    return group


def shards_of_all(inputs: dict[str, Tensor], group: Any) -> Iterator[dict[str, Tensor]]:
    """Take turns through the batches of a group's processes, and cut each into the shard of this process.

    Args:
        inputs: (B, N) tensors of this process's batch; shapes and names are the same in all processes.
        group: the processes that share their sequences.

    Yields:
        For each process of the group, the same names with (B, n) tensors.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    batches: dict[str, list[Tensor]] = {}
    for name, tensor in inputs.items():
        batches[name] = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(batches[name], tensor.contiguous(), group=group)
    for turn in range(size):
        yield {name: of_all[turn].tensor_split(size, dim=1)[rank].contiguous() for name, of_all in batches.items()}
