"""Calibration texts with planted facts: sentences that say something drawn at random, and questions far behind them.

Who answers must have kept the fact, and the fact stands out from its text, so ranks can learn to keep such. A block
that repeats its first half asks for every key of it, which is more than a model with few key/value heads can keep.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dynamask.convert.calibration import CalibrationBlocks
from dynamask.errors import InvalidInputError

SENTENCES = (
    (
        "\nNote: the locker of {name} opens with {value}.\n",
        "\nWhat opens the locker of {name}? It opens with {value}.\n",
    ),
    ("\n{name} is filed under {value}.\n", "\nLook it up: {name} is filed under {value}.\n"),
    ("\nRemember that {name} was given {value}.\n", "\nAs noted before, {name} was given {value}.\n"),
    ("\nThe entry for {name} reads {value}.\n", "\nQuestion: what does the entry for {name} read? Answer: {value}\n"),
)
"""Pairs of a sentence that states a fact and one that comes back to it."""

LEAST_ROOM = 64
"""Tokens of a block that each sentence needs at least."""


class PlantedFacts:
    """Blocks of calibration texts with facts planted in them.

    Args:
        blocks: the texts; `repeat_share=0` leaves them as they are but for the facts.
        tokenizer: a transformers tokenizer, the model's.
        facts: in a block.

    Raises:
        InvalidInputError: fewer facts than 1, or blocks too short for them.
    """

    def __init__(self, blocks: CalibrationBlocks, tokenizer: Any, facts: int = 12) -> None:
        if facts < 1 or blocks.block < 2 * facts * LEAST_ROOM:
            raise InvalidInputError(
                f"{facts} facts and their questions need blocks of at least {2 * max(facts, 1) * LEAST_ROOM} tokens, "
                f"and there must be 1 at least; got blocks of {blocks.block}"
            )
        self.blocks, self.tokenizer, self.facts = blocks, tokenizer, facts

    def __len__(self) -> int:
        """Return how many batches one pass over the texts gives."""
        return len(self.blocks)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield int64 (<= batch, block): every block of the texts once."""
        for step, batch in enumerate(self.blocks):
            yield self._planted(batch, step)

    def from_step(self, step: int = 0) -> Iterator[Tensor]:
        """Yield int64 (batch, block) without end, beginning with the batch of that step."""
        for number, batch in enumerate(self.blocks.from_step(step), step):
            yield self._planted(batch, number)

    def _planted(self, batch: Tensor, step: int) -> Tensor:
        made = plant_facts(batch, self.tokenizer, seed=self.blocks.seed, step=step, facts=self.facts)
        return self.blocks.opened(made)  # a fact may have been written over it


def plant_facts(batch: Tensor, tokenizer: Any, *, seed: int = 0, step: int = 0, facts: int = 12) -> Tensor:
    """Write facts into a batch of texts, and questions with their answers behind them.

    Args:
        batch: (B, N) token ids, not changed.
        tokenizer: a transformers tokenizer, the model's.
        seed, step: of what is drawn.
        facts: in a block.

    Returns:
        (B, N), with some tokens of the texts overwritten. A sentence longer than N / (2 facts) tokens is cut.
    """
    made = batch.clone()
    room = batch.shape[1] // (2 * facts)
    for number, row in enumerate(made):
        drawn = random.Random(f"{seed} {step} {number}")
        slots = drawn.sample(range(2 * facts), 2 * facts)
        for first, second in zip(slots[::2], slots[1::2], strict=True):
            filled = {"name": _name(drawn), "value": _value(drawn)}
            sentences = drawn.choice(SENTENCES)
            for slot, sentence in zip(sorted((first, second)), sentences, strict=True):
                ids = tokenizer(sentence.format(**filled), add_special_tokens=False)["input_ids"][:room]
                place = slot * room + drawn.randint(0, room - len(ids))
                row[place : place + len(ids)] = torch.tensor(ids, dtype=row.dtype)
    return made


def _word(drawn: random.Random) -> str:
    return "".join(drawn.choice("bdfgklmnprstvz") + drawn.choice("aeiou") for _ in range(drawn.randint(2, 3)))


def _name(drawn: random.Random) -> str:
    return (
        f"{_word(drawn).title()} {_word(drawn).title()}" if drawn.random() < 0.5 else f"{_word(drawn)}-{_word(drawn)}"
    )


def _value(drawn: random.Random) -> str:
    kind = drawn.random()
    if kind < 0.5:
        return str(drawn.randint(10**4, 10**8))
    if kind < 0.75:
        return str(uuid.UUID(int=drawn.getrandbits(128), version=4))
    return f"{_word(drawn)} {_word(drawn)}"
