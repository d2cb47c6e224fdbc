"""What the stages of a conversion share: progress reports, blocks of tokens, and states that survive a kill."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.integers import check_integer


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: its name.
        step: steps done.
        steps: steps in all.
        loss: of the latest step; NaN for stages without one.
        tokens_per_second: since the stage was started or resumed.
        seconds_left: estimate of the time that the rest of the stage takes.
    """

    stage: str
    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


Report = Callable[[Progress], None]


class Clock:
    """Turns counts of steps and tokens into `Progress`.

    Args:
        stage: name of the stage.
        steps: steps in all.
        start: steps that an earlier run has done.
    """

    def __init__(self, stage: str, steps: int, start: int = 0) -> None:
        self.stage, self.steps, self.start = stage, steps, start
        self.tokens, self.began = 0, time.perf_counter()

    def progress(self, step: int, loss: float = float("nan")) -> Progress:
        """Return the progress after `step` steps."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        done = max(step - self.start, 1)
        left = seconds / done * (self.steps - step)
        return Progress(self.stage, step, self.steps, loss, self.tokens / seconds, left)


def check_training(caller: str, steps: int, **rates: float) -> int:
    """Return the number of steps as a Python integer.

    Args:
        caller: named in messages.
        steps: at least 1.
        **rates: finite numbers above 0.

    Raises:
        InvalidInputError: another number of steps, or another rate.
    """
    steps = check_integer(steps, f"{caller}: steps", 1, "steps of training")
    for name, rate in rates.items():
        if isinstance(rate, str) or not 0 < rate < math.inf:
            raise InvalidInputError(f"{caller}: {name} must be a finite number above 0; got {rate!r}")
    return steps


def token_blocks(blocks: Iterable[Any], start: int, caller: str, vocab_size: int) -> Iterator[Tensor]:
    """Yield blocks of token ids without end, beginning with number `start`.

    An iterable that ends is read again from its beginning, except an iterator, which cannot be.

    Args:
        blocks: iterable of (B, N) integer tensors; with a method `from_step(step)` that is used.
        start: number of the first block wanted.
        caller: named in messages.
        vocab_size: tokens of the model.

    Raises:
        InvalidInputError: no blocks, fewer than wanted from an iterator, or something that is not (B, N) token ids.
    """
    if not isinstance(blocks, Iterable):
        raise InvalidInputError(f"{caller}: blocks must be an iterable of (batch, length) token ids; got {blocks!r}")
    endless = getattr(blocks, "from_step", None)
    if endless is not None:
        for block in endless(start):
            yield checked_block(block, caller, vocab_size)
        return
    skip, count = start, 0
    while True:
        empty = True
        for block in islice(iter(blocks), skip, None) if skip else blocks:
            empty = False
            count += 1
            yield checked_block(block, caller, vocab_size)
        if isinstance(blocks, Iterator):
            raise InvalidInputError(
                f"{caller}: the blocks ended after {start + count}: give as many as there are steps, or a list, which "
                "is read again from its beginning"
            )
        size = len(blocks) if isinstance(blocks, Sized) else None
        if size == 0 or (empty and not skip):
            raise InvalidInputError(f"{caller}: there are no blocks of tokens")
        skip = max(0, skip - size) if empty and size else 0


def checked_block(block: Any, caller: str, vocab_size: int) -> Tensor:
    """Return the block as int64 or int32, or raise `InvalidInputError` unless it is (B, N) token ids."""
    if not isinstance(block, Tensor):
        try:
            block = torch.as_tensor(block)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(f"{caller}: blocks must be (batch, length) token ids; got {block!r}") from error
    if block.dim() != 2 or block.is_floating_point() or block.dtype == torch.bool or block.numel() == 0:
        raise InvalidInputError(
            f"{caller}: blocks must be (batch, length) token ids; got {block.dtype} of shape {tuple(block.shape)}"
        )
    block = block if block.dtype in (torch.int32, torch.int64) else block.long()  # what an embedding takes
    if block.device.type == "cpu" and not 0 <= int(block.min()) <= int(block.max()) < vocab_size:
        raise InvalidInputError(
            f"{caller}: token ids must be from 0 to {vocab_size - 1}; got {int(block.min())} to {int(block.max())}: "
            "the blocks were made with another tokenizer"
        )
    return block


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a state so that a kill or a full disk at any moment leaves the previous one."""
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        reason = str(error)
        if "inline_container" in reason:  # how torch reports a write that came back short
            reason = "not all of it could be written; free some disk space and continue"
        raise InvalidInputError(f"cannot write {path}: {reason}") from error


def load_state(path: Path | None, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read a state of `save_state`.

    Args:
        path: the file, or None.
        identity: facts of the run; a state of another run is refused.

    Returns:
        The state, or None where there is none.

    Raises:
        InvalidInputError: a state of another run, or a damaged file.
    """
    if path is None or not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidInputError(
            f"{path} is damaged ({type(error).__name__}): delete it to start this stage again"
        ) from error
    differing = [name for name, value in identity.items() if state.get("identity", {}).get(name) != value]
    if differing:
        raise InvalidInputError(
            f"{path} belongs to a run with other {', '.join(differing)}: delete it to start again, or give the same "
            "settings"
        )
    return state
