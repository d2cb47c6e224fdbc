"""Retrieval tasks: what is hidden, the question, and a prompt of an exact number of tokens around both.

| task | hidden | question |
| --- | --- | --- |
| `single_needle` | one number under a key word | that number |
| `multi_key` | four keys, a number each | the number of one of them |
| `multi_value` | four numbers under one key | all four |
| `multi_query` | four keys, a number each | the numbers of all four |
| `passkey` | one number, written twice in one line | that number |
| `variable_tracking` | a chain of assignments | the names of all variables that hold the value |

Needles, questions and counts are RULER's (arXiv 2404.06654; github.com/NVIDIA/RULER, scripts/data/synthetic), the
passkey's those of arXiv 2305.16300. What differs from RULER: the given depth is met to a word instead of drawn; the
length is met exactly; the values of an answer stand in the order in which they are hidden, so that there is one right
continuation; variable tracking has no worked example before it.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from dynamask.errors import InvalidInputError, did_you_mean
from dynamask.evaluation.retrieval.haystack import Haystack
from dynamask.evaluation.retrieval.words import draw_keys

NEEDLES = 4
"""Keys, values or queries of the tasks that have several: RULER's number."""
HOPS = 4
"""Assignments that pass the value on, in variable tracking: RULER's number."""


@dataclass(frozen=True)
class RetrievalExample:
    """One prompt and its answer.

    Attributes:
        task: its name in `TASKS`.
        prompt: token ids, with the tokenizer's begin-of-text token where it writes one.
        answer: token ids that continue the prompt; `len(prompt) + len(answer)` is the given length.
        values: the values in the answer, each a string.
        depth: share of the haystack that stands before the first needle needed; 0 is the beginning.
        position: index in `prompt` of that needle's first token, which breaks the line.
    """

    task: str
    prompt: list[int]
    answer: list[int]
    values: tuple[str, ...]
    depth: float
    position: int


@dataclass(frozen=True)
class Puzzle:
    """Needles and question of a task, before there is a haystack.

    Attributes:
        head, tail: the text before and after the haystack.
        needles: needed for the answer, in the order in which they are hidden: the first at the given depth, the
            others after it.
        distractors: hidden anywhere, not needed.
        answer: the text that follows `tail`.
        values: what is looked for in the model's answer.
        secrets: strings the haystack must not hold already.
    """

    head: str
    needles: list[str]
    tail: str
    answer: str
    values: list[str]
    secrets: list[str]
    distractors: tuple[str, ...] = ()


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Draw different seven-digit numbers."""
    return [str(n) for n in rng.sample(range(10**6, 10**7), count)]


def _needle(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _listed(items: list[str], last: str = ", and ") -> str:
    return last.join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def _one_number(rng: random.Random, distractors: int) -> Puzzle:
    keys, values = draw_keys(rng, 1 + distractors), _numbers(rng, 1 + distractors)
    return Puzzle(
        head="A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n",
        needles=[_needle(keys[0], values[0])],
        distractors=tuple(_needle(k, v) for k, v in zip(keys[1:], values[1:], strict=True)),
        tail=f"\nWhat is the special magic number for {keys[0]} mentioned in the provided text? "
        f"The special magic number for {keys[0]} mentioned in the provided text is",
        answer=f" {values[0]}",
        values=values[:1],
        secrets=keys + values,
    )


def _many_numbers(keys: list[str], values: list[str]) -> Puzzle:
    named = _listed(list(dict.fromkeys(keys)))
    return Puzzle(
        head="Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n",
        needles=[_needle(k, v) for k, v in zip(keys, values, strict=True)],
        tail=f"\nWhat are all the special magic numbers for {named} mentioned in the provided text? "
        f"The special magic numbers for {named} mentioned in the provided text are",
        answer=f" {_listed(values)}",
        values=values,
        secrets=list(dict.fromkeys(keys)) + values,
    )


def single_needle(rng: random.Random) -> Puzzle:
    """Hide one number under a key word: RULER's niah_single."""
    return _one_number(rng, 0)


def multi_key(rng: random.Random) -> Puzzle:
    """Hide the wanted number, and three more under other keys: RULER's niah_multikey_1."""
    return _one_number(rng, NEEDLES - 1)


def multi_value(rng: random.Random) -> Puzzle:
    """Hide four wanted numbers under one key: RULER's niah_multivalue."""
    return _many_numbers(draw_keys(rng, 1) * NEEDLES, _numbers(rng, NEEDLES))


def multi_query(rng: random.Random) -> Puzzle:
    """Hide four wanted numbers under four keys: RULER's niah_multiquery."""
    return _many_numbers(draw_keys(rng, NEEDLES), _numbers(rng, NEEDLES))


def passkey(rng: random.Random) -> Puzzle:
    """Hide a five-digit pass key, written twice (arXiv 2305.16300, section 4.2)."""
    value = str(rng.randrange(10**4, 10**5))
    return Puzzle(
        head="There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n",
        needles=[f"The pass key is {value}. Remember it. {value} is the pass key."],
        tail="\nWhat is the pass key? The pass key is",
        answer=f" {value}",
        values=[value],
        secrets=[value],
    )


def variable_tracking(rng: random.Random) -> Puzzle:
    """Hide one chain of four hops: RULER's vt."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = str(rng.randrange(10**4, 10**5))
    return Puzzle(
        head="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        needles=[f"VAR {names[0]} = {value}"] + [f"VAR {new} = VAR {old}" for old, new in pairwise(names)],
        tail=f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
        f"According to the chain(s) of variable assignment in the text above, {len(names)} variables are assigned the "
        f"value {value}, they are:",
        answer=" " + " ".join(names),
        values=names,
        secrets=[value, *names],
    )


TASKS: dict[str, Callable[[random.Random], Puzzle]] = {
    task.__name__: task for task in (single_needle, multi_key, multi_value, multi_query, passkey, variable_tracking)
}


def check_task(task: str) -> None:
    """Raise InvalidInputError for an unknown task, naming the nearest known one."""
    if task not in TASKS:
        raise InvalidInputError(
            f"unknown retrieval task {task!r}{did_you_mean(task, TASKS)}: one of {', '.join(TASKS)}"
        )


def least_length(task: str, tokenizer: Any) -> int:
    """Return a length, in tokens, that holds every example of the task: a tenth above twenty examples.

    Raises:
        InvalidInputError: an unknown task.
    """
    check_task(task)
    sizes = [_size(_encode(TASKS[task](random.Random(f"size {seed}")), tokenizer)) for seed in range(20)]
    return max(sizes) * 11 // 10


def make_example(
    task: str,
    tokenizer: Any,
    length: int,
    depth: float,
    seed: int | str,
    *,
    haystack: Haystack | None = None,
) -> RetrievalExample:
    """Make one example of a task, the same for the same arguments.

    Args:
        task: a name in `TASKS`.
        tokenizer: a transformers tokenizer.
        length: tokens of prompt and answer together, met exactly.
        depth: 0 to 1: where in the haystack the first needle needed stands, to the nearest word. Further needles
            of the answer stand anywhere after it, distractors anywhere.
        seed: of the needles and of the haystack's beginning.
        haystack: text to hide them in; default: RULER's noise.

    Raises:
        InvalidInputError: an unknown task, a depth outside 0 to 1, a length too short for needles and question (the
            message gives the number of tokens they take), or a haystack that keeps holding the answers itself.
    """
    check_task(task)
    if not 0 <= depth <= 1:
        raise InvalidInputError(f"depth is a share of the haystack, from 0 to 1; got {depth}")
    haystack = haystack or Haystack(tokenizer)
    rng = random.Random(f"{task} {length} {depth} {seed}")
    for _ in range(100):
        puzzle = TASKS[task](rng)
        example, filler = _assemble(task, puzzle, tokenizer, haystack, length, depth, rng)
        text = tokenizer.decode(filler)
        if not any(secret in text for secret in puzzle.secrets):
            return example
    raise InvalidInputError(
        f"the haystack holds the keys or answers of {task} wherever it is cut (one of {', '.join(puzzle.secrets)}): "
        "give other documents"
    )


def _assemble(
    task: str, puzzle: Puzzle, tokenizer: Any, haystack: Haystack, length: int, depth: float, rng: random.Random
) -> tuple[RetrievalExample, list[int]]:
    """Assemble the example; return it with its filler."""
    pieces = _encode(puzzle, tokenizer)
    head, tail, answer, needles, distractors = pieces
    taken = _size(pieces)
    if length < taken:
        raise InvalidInputError(
            f"length {length} is too short for {task}: needles, question and answer alone take {taken} tokens"
        )
    filler, places = haystack.cut(length - taken, rng)
    first = min(places, key=lambda place: abs(place - depth * len(filler)))
    later = sorted(rng.choices([place for place in places if place >= first], k=len(needles) - 1))
    hidden = list(zip([first, *later], needles, strict=True)) + [(rng.choice(places), d) for d in distractors]

    prompt, done, position = list(head), 0, 0
    # Stable: needles at one place stay in order. The one that counts for the depth is the first of `hidden`.
    for index in sorted(range(len(hidden)), key=lambda i: hidden[i][0]):
        place, needle = hidden[index]
        prompt += filler[done:place]
        done = place
        if index == 0:
            position = len(prompt)
        prompt += needle
    prompt += filler[done:] + tail
    reached = first / len(filler) if filler else 0.0
    return RetrievalExample(task, prompt, answer, tuple(puzzle.values), reached, position), filler


class _Pieces(NamedTuple):
    """A puzzle as token ids."""

    head: list[int]
    tail: list[int]
    answer: list[int]
    needles: list[list[int]]
    distractors: list[list[int]]


def _size(pieces: _Pieces) -> int:
    return sum(map(len, (pieces.head, pieces.tail, pieces.answer, *pieces.needles, *pieces.distractors)))


def _encode(puzzle: Puzzle, tokenizer: Any) -> _Pieces:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    tail = encode(puzzle.tail)
    # The tokens the tokenizer itself would continue the question with; a sentencepiece vocabulary would otherwise
    # begin the answer as it begins a text, with a space of its own.
    whole = encode(puzzle.tail + puzzle.answer)
    return _Pieces(
        head=_begin_of_text(tokenizer) + encode(puzzle.head),
        tail=tail,
        answer=whole[len(tail) :] if whole[: len(tail)] == tail else encode(puzzle.answer),
        # Each on a line of its own, so that it is never part of a sentence of the haystack.
        needles=[encode(f"\n{needle}\n") for needle in puzzle.needles],
        distractors=[encode(f"\n{needle}\n") for needle in puzzle.distractors],
    )


def _begin_of_text(tokenizer: Any) -> list[int]:
    """Return what the tokenizer writes before a text: its begin-of-text token, or nothing."""
    written = list(tokenizer("")["input_ids"])
    return written[:1] if tokenizer.bos_token_id is not None and written[:1] == [tokenizer.bos_token_id] else []
