"""One language run on several processes: each reads its part of every batch, and gradients are averaged.

The environment variable DYNAMASK_PROCESSES says how many; it is no setting of a run, whose numbers it changes by
rounding alone. The process that starts a run leads: it starts the others, looks at the validation split, keeps the
state and decides when the run ends. On GPUs process i uses the i-th visible one.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynamask.errors import InvalidInputError

PROCESSES = "DYNAMASK_PROCESSES"
"""Environment variable: processes of a run. Default: 1."""

_PATIENCE = datetime.timedelta(seconds=300)
"""How long a process waits for the others: the leader compiles for its first look at the validation split alone."""
_DRIFT = 1e-6
"""Largest relative difference of the weights' sums between two processes."""


class Group:
    """The processes of a run, as one of them sees them.

    Args:
        rank: number of this process; 0 leads.
        size: processes.
        store: through which the leader's words go; None where it is alone.
        followers: the other processes, known to the leader.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Any = None, followers: Iterable[subprocess.Popen[bytes]] = ()
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self._followers = store, list(followers)
        self._words = 0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that looks, saves and reports."""
        return self.rank == 0

    def part(self, count: int) -> range:
        """The sequences of a batch that this process reads.

        Raises:
            InvalidInputError: the processes cannot share them evenly.
        """
        if count % self.size:
            raise InvalidInputError(
                f"{self.size} processes ({PROCESSES}) must share the {count} sequences of a batch evenly: choose a "
                "divisor of them, or other batch_tokens"
            )
        share = count // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def average(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace the gradients of parameters by their mean over the processes; returns the mean of the losses, ()."""
        if self.size == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.reshape(1).float()])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat[:-1].split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(parts, gradients, strict=True)])
        return flat[-1]

    def lead(self, decide: Callable[[], Any]) -> Any:
        """Return what the leader's `decide` returns, plain JSON, in every process.

        Raises:
            What `decide` raises, in the leader; Stopped in the others.
            RuntimeError: another process has ended.
        """
        if self.size == 1:
            return decide()
        self._words += 1
        key = f"word-{self._words}"
        if not self.leads:
            word = json.loads(self._store.get(key))
            if "stop" in word:
                raise Stopped
            return word["value"]
        ended = [process.returncode for process in self._followers if process.poll() is not None]
        if ended:
            raise RuntimeError(f"a process that shares this run ended with exit code {ended[0]}")
        try:
            value = json.loads(json.dumps(decide()))
        except BaseException:
            self._store.set(key, json.dumps({"stop": True}))
            raise
        self._store.set(key, json.dumps({"value": value}))
        return value

    def check_alike(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raise RuntimeError where the weights of the processes have drifted apart."""
        if self.size == 1:
            return
        own = torch.stack([_sums(parameter) for parameter in parameters]).sum(0)
        sums = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(sums, own)
        for rank, other in enumerate(sums):
            if not bool((other[0] - own[0]).abs() <= _DRIFT * own[1]) and bool(own.isfinite().all()):
                raise RuntimeError(f"the weights of process {rank} differ from those of process {self.rank}")


def _sums(parameter: nn.Parameter) -> Tensor:
    """(2,) float64: sum of the weights, and of their sizes."""
    data = parameter.detach()
    return torch.stack([data.sum(dtype=torch.float64), data.abs().sum(dtype=torch.float64)])


class Stopped(Exception):
    """The leader has ended the run."""


def processes() -> int:
    """How many processes a run uses.

    Raises:
        InvalidInputError: not a number above zero, or more than there are GPUs.
    """
    given = os.environ.get(PROCESSES, "1")
    size = int(given) if given.isdecimal() else 0
    if size < 1:
        raise InvalidInputError(f"{PROCESSES} is the number of processes of a run, from 1; got {given!r}")
    if size > 1 and torch.cuda.is_available() and torch.cuda.device_count() < size:
        raise InvalidInputError(f"{PROCESSES}={size}, but {torch.cuda.device_count()} GPUs are visible: one for each")
    return size


@contextlib.contextmanager
def leading(config: dict[str, Any], initial: Path | None = None) -> Iterator[Group]:
    """Start the other processes of a run, and end them with it.

    Args:
        config, initial: of the run, see `run_language`.
    """
    size = processes()
    if size == 1:
        yield Group()
        return
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, timeout=_PATIENCE, wait_for_workers=False)
    task: dict[str, Any] = {"config": config, "initial": None if initial is None else str(initial)}
    task |= {"port": store.port, "size": size, "leader": os.getpid()}
    followers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, size):
            command = [sys.executable, "-m", "dynamask_lab.language.follower", json.dumps(task | {"rank": rank})]
            followers.append(subprocess.Popen(command))
        with _process_group(store, 0, size):
            yield Group(0, size, store, followers)
        for process in followers:
            process.wait(timeout=30)
    finally:
        for process in followers:
            process.kill()
            process.wait()


@contextlib.contextmanager
def following(task: dict[str, Any]) -> Iterator[Group]:
    """Join the run of a leader, as the task that it gave says."""
    rank, size = task["rank"], task["size"]
    store = dist.TCPStore("127.0.0.1", task["port"], size, is_master=False, timeout=_PATIENCE)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    with _process_group(store, rank, size):
        yield Group(rank, size, store)


@contextlib.contextmanager
def _process_group(store: Any, rank: int, size: int) -> Iterator[None]:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("gradients", store), rank=rank, world_size=size, timeout=_PATIENCE
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
