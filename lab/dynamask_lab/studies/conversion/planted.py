"""Training texts that need more keys from far back than plain text does, and fewer than a block that repeats itself."""

from __future__ import annotations

import random
import uuid
from typing import Any

import torch
from torch import Tensor


def with_spans(batch: Tensor, seed: int, step: int, spans: int = 32, length: int = 32) -> Tensor:
    """Copy short spans of the text to places far behind them: the first tokens of a copy ask, the rest answer.

    Between plain text, which needs few keys from far back, and a block that repeats its first half, which needs
    them all.

    Args:
        batch: (B, N) token ids.
        seed, step: of the places.
        spans, length: copies in a block, fewer in a short one, and tokens of each.

    Returns:
        (B, N), the second half with copies of spans of the text at least `length` tokens before them.
    """
    made = batch.clone()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    half = batch.shape[1] // 2
    spans = max(1, min(spans, half // (2 * length)))
    room = (batch.shape[1] - half) // spans
    for row in made:
        shift = torch.randint(0, room - length + 1, (spans,), generator=generator)
        for number in range(spans):
            place = half + number * room + int(shift[number])
            source = int(torch.randint(0, place - length, (), generator=generator))
            row[place : place + length] = row[source : source + length].clone()
    return made


FACTS = (
    (
        "\nNote: the locker of {name} opens with {value}.\n",
        "\nWhat opens the locker of {name}? It opens with {value}.\n",
    ),
    ("\n{name} is filed under {value}.\n", "\nLook it up: {name} is filed under {value}.\n"),
    ("\nRemember that {name} was given {value}.\n", "\nAs noted before, {name} was given {value}.\n"),
    ("\nThe entry for {name} reads {value}.\n", "\nQuestion: what does the entry for {name} read? Answer: {value}\n"),
)
"""Sentences that state a fact, and that come back to it. None is a sentence of the tasks that are measured."""


def with_facts(batch: Tensor, tokenizer: Any, seed: int, step: int, facts: int = 12) -> Tensor:
    """Write facts into the text, and questions with their answers far behind them.

    What they say is drawn, so only who kept the fact can answer; and it stands out, so ranks can learn to keep it.

    Args:
        batch: (B, N) token ids, N at least 200 per fact.
        tokenizer: of the model.
        seed, step: of what is drawn.
        facts: in a block.

    Returns:
        (B, N), with some tokens of the text overwritten.
    """
    made = batch.clone()
    length = batch.shape[1]
    room = length // (2 * facts)
    for number, row in enumerate(made):
        drawn = random.Random(f"{seed} {step} {number}")
        slots = drawn.sample(range(2 * facts), 2 * facts)
        for first, second in zip(slots[::2], slots[1::2], strict=True):
            filled = {"name": _name(drawn), "value": _value(drawn)}
            sentences = drawn.choice(FACTS)
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
