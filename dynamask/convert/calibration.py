"""Blocks of token ids to calibrate and distil converted models on, half of which repeat their first half.

A plain block of text rarely needs a key from far back; a block whose second half repeats its first half needs one at
every token of the second half. Ranks and windows that are learned on both keep the keys that retrieval needs.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamask.data.tokenizer import opening_tokens
from dynamask.errors import InvalidInputError


class CalibrationBlocks:
    """Batches of blocks cut from one stream of tokens, in an order that depends on the seed and the step alone.

    Iteration gives every block of the stream once; `from_step` goes on for ever and can start anywhere, so that a
    training run which was killed continues with the batches it would have seen.

    Args:
        tokens: (T,) token ids of any integer dtype, documents end to end, T >= block.
        block: tokens of a block, at least 2.
        batch: blocks of a batch.
        repeat_share: share of the blocks whose second half is a copy of their first half, 0 to 1. They are spread
            evenly: with 0.5 every other block is one.
        seed: of the order of the blocks and of where the stream is cut.
        opening: token ids that every block begins with, in place of its first tokens: those that the tokenizer puts
            before a text. A model that was trained with a token of beginning has its attention sink there.

    Raises:
        InvalidInputError: fewer tokens than one block holds, token ids that are not a vector of integers, or a number
            out of its range.
    """

    def __init__(
        self,
        tokens: Any,
        block: int,
        *,
        batch: int = 1,
        repeat_share: float = 0.5,
        seed: int = 0,
        opening: Sequence[int] = (),
    ) -> None:
        self.tokens = _vector(tokens)
        if block < 2 or batch < 1:
            raise InvalidInputError(f"block must be at least 2 and batch at least 1; got {block} and {batch}")
        if not 0 <= repeat_share <= 1:
            raise InvalidInputError(f"repeat_share is a share of the blocks, from 0 to 1; got {repeat_share}")
        if len(self.tokens) < block:
            raise InvalidInputError(
                f"the texts hold {len(self.tokens)} tokens, fewer than one block of {block}: give more text or a "
                "smaller block"
            )
        self.block, self.batch, self.repeat_share, self.seed = block, batch, repeat_share, seed
        ids = _vector([*opening][:block]).astype(np.int64)
        if (ids < 0).any():
            raise InvalidInputError(f"opening holds token ids, none below 0; got {ids.tolist()}")
        self.opening = torch.from_numpy(ids)
        self._blocks = len(self.tokens) // block

    def __len__(self) -> int:
        """Return how many batches one pass over the stream gives; the last one may hold fewer blocks."""
        return -(-self._blocks // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield int64 (<= batch, block): every block of the stream once."""
        for first in range(0, self._blocks, self.batch):
            yield self._stack(range(first, min(first + self.batch, self._blocks)))

    def from_step(self, step: int = 0) -> Iterator[Tensor]:
        """Yield int64 (batch, block) without end, beginning with the batch of that step.

        Each pass over the stream has an order of its own and cuts the stream at other places.
        """
        while True:
            yield self._stack(range(step * self.batch, (step + 1) * self.batch))
            step += 1

    def opened(self, batch: Tensor) -> Tensor:
        """Write the opening into each block of a batch (B, N), in place."""
        return open_blocks(batch, self.opening)

    def _stack(self, indices: range) -> Tensor:
        return self.opened(torch.from_numpy(np.stack([self._cut(index) for index in indices])))

    def _cut(self, index: int) -> np.ndarray:
        """The block of that index: blocks are counted on from pass to pass."""
        turn, place = divmod(index, self._blocks)
        rng = random.Random(f"{self.seed} {turn}")
        offset = rng.randint(0, len(self.tokens) - self._blocks * self.block)
        order = list(range(self._blocks))
        rng.shuffle(order)
        first = offset + order[place] * self.block
        made = np.asarray(self.tokens[first : first + self.block], dtype=np.int64)
        if int((index + 1) * self.repeat_share) > int(index * self.repeat_share):
            half = self.block // 2
            made = np.concatenate([made[:half], made[:half], made[2 * half :]])
        return made


def open_blocks(batch: Tensor, opening: Tensor) -> Tensor:
    """Write the tokens of an opening over the first of each block of a batch (B, N), in place."""
    first = opening[: batch.shape[1]]
    batch[:, : len(first)] = first.to(batch)
    return batch


def calibration_blocks(
    source: Iterable[str] | Sequence[int] | np.ndarray | Tensor,
    tokenizer: Any = None,
    block: int = 8192,
    *,
    batch: int = 1,
    repeat_share: float = 0.5,
    seed: int = 0,
    max_tokens: int | None = None,
) -> CalibrationBlocks:
    """Make the blocks that `learn_ranks`, `allocate_windows` and `distill` read.

    Args:
        source: texts, or the token ids (T,) of texts that stand end to end. Texts are joined by the tokenizer's
            end-of-text token, where it has one, and begin with the special tokens that it puts before a text, as every
            block does.
        tokenizer: a transformers tokenizer; needed for texts. With one, blocks of token ids begin as it begins a text.
        block: tokens of a block.
        batch: blocks of a batch.
        repeat_share: share of the blocks whose second half repeats their first half.
        seed: of the order of the blocks.
        max_tokens: no more tokens than these are read from texts.

    Returns:
        An iterable of int64 (batch, block) on the CPU.

    Raises:
        InvalidInputError: texts without a tokenizer, fewer tokens than one block holds, or a number out of its range.
    """
    if isinstance(source, str):
        source = [source]
    opening = [] if tokenizer is None else opening_tokens(tokenizer)
    if isinstance(source, (Tensor, np.ndarray)) or (isinstance(source, Sequence) and _are_numbers(source)):
        tokens: Any = source
    elif tokenizer is None:
        raise InvalidInputError("texts need a tokenizer: give the model's, or give token ids instead of texts")
    else:
        tokens = _encode(source, tokenizer, max_tokens, opening)
    return CalibrationBlocks(tokens, block, batch=batch, repeat_share=repeat_share, seed=seed, opening=opening)


def _are_numbers(source: Sequence[Any]) -> bool:
    return len(source) > 0 and all(isinstance(item, (int, np.integer)) for item in islice(source, 8))


def _encode(texts: Iterable[Any], tokenizer: Any, max_tokens: int | None, begin: list[int]) -> np.ndarray:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[np.ndarray] = []
    total = 0
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidInputError(f"text {number} must be a string; got {type(text).__name__}")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(np.asarray([*begin, *ids, *end], dtype=np.int64))
        total += len(pieces[-1])
        if max_tokens is not None and total >= max_tokens:
            break
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    return tokens if max_tokens is None else tokens[:max_tokens]


def _vector(tokens: Any) -> np.ndarray:
    array: np.ndarray = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        raise InvalidInputError(
            f"token ids must be a vector of integers; got shape {array.shape} and dtype {array.dtype}"
        )
    return array
