"""Retrieval and aggregation tasks by generation, after RULER (arXiv 2404.06654; NVIDIA/RULER, scripts/data/synthetic).

| task | in | hidden | question |
| --- | --- | --- | --- |
| `single_1` | noise | a number under a key word | that number |
| `single_2` | essays | the same | the same |
| `single_3` | essays | a UUID under a key word | that UUID |
| `multikey_1` | essays | four keys with a number each | one of them |
| `multikey_2` | needles alone | as many keys as fit | one of them |
| `multikey_3` | needles alone | UUIDs under UUIDs | one of them |
| `multivalue` | essays | four numbers under one key | all four |
| `multiquery` | essays | four keys with a number each | all four |
| `tracking` | noise | a chain of five variable assignments | the names of all five |
| `common_words` | a numbered list | ten words that occur often | those ten |
| `frequent_words` | coded words | zeta-distributed frequencies | the three most frequent |
| `pairs` | a list of pairs | many names with a code each | the code of one; then of another, on the same cache |

An example is a context, which a method may compress before it knows the question, and one or more questions. All
examples of a task and a length have contexts of one length and questions of one length, so batches need no padding.
Differences from RULER: an instruction-tuned model's chat template around it; essays start at a random place; keys are
drawn until their question has the usual number of tokens; `common_words` has no worked example, and its frequencies
shrink with the length.
"""

from __future__ import annotations

import random
import statistics
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from dynamask.errors import InvalidInputError
from dynamask.evaluation.retrieval.haystack import NOISE
from dynamask.evaluation.retrieval.words import draw_keys

NEEDLES = 4
HOPS = 4
GENERATED = {
    "single_1": 24,
    "single_2": 24,
    "single_3": 48,
    "multikey_1": 24,
    "multikey_2": 24,
    "multikey_3": 48,
    "multivalue": 64,
    "multiquery": 64,
    "tracking": 40,
    "common_words": 80,
    "frequent_words": 40,
    "pairs": 16,
}
"""Tokens that the model may generate, by task."""
TASKS = tuple(GENERATED)
NEEDLE_TASKS = TASKS[:8]
HAYSTACKS = ("essays", "documents")


@dataclass(frozen=True)
class Example:
    """One context and its questions.

    Attributes:
        task: its name in `TASKS`.
        context: token ids, the chat template's beginning included.
        questions: token ids of each question, the end of the turn and the beginning of the answer included.
        answers: for each question, the strings that the generated text is searched for.
        depth: share of the context before the first needed line; None where the task has none.
    """

    task: str
    context: list[int]
    questions: list[list[int]]
    answers: list[tuple[str, ...]]
    depth: float | None


@dataclass(frozen=True)
class _Plan:
    """A task's text before it is fitted into a length."""

    head: str
    questions: list[tuple[str, str]]  # the question, and how the answer begins
    answers: list[tuple[str, ...]]
    needles: list[str]
    haystack: str
    joiner: str = " "


def score(generated: str, answers: Sequence[str]) -> float:
    """RULER's string_match_all: the share of the answers that occur in the generated text, in any case."""
    return sum(answer.lower() in generated.lower() for answer in answers) / len(answers)


class Tasks:
    """Makes the examples, the same for the same tokenizer, texts and arguments.

    Args:
        tokenizer: a transformers tokenizer.
        essays: one long text.
        documents: token ids of held-out documents end to end, a second haystack.
        chat: put the tokenizer's chat template around context and question.
    """

    def __init__(self, tokenizer: Any, essays: str, documents: Sequence[int], *, chat: bool = True) -> None:
        self.tokenizer = tokenizer
        self.before, self.after = self._template() if chat else (self._begin(), "\n")
        noise = self._encode("\n".join([NOISE] * 64) + "\n")
        self._haystacks = {"noise": noise, "essays": self._encode(essays), "documents": [int(i) for i in documents]}
        self._essays = essays
        self._question_length: dict[str, int] = {}
        ends = {i for token, i in tokenizer.get_vocab().items() if token.endswith((".", "?", "!", "Ċ", "\n"))}
        self._sentence_ends = ends

    def make(self, task: str, length: int, index: int, haystack: str = "essays") -> Example:
        """Make one example.

        Args:
            task: a name in `TASKS`.
            length: tokens of context, question and answer together.
            index: of the example; another index gives another one.
            haystack: "essays" or "documents", for the tasks that hide needles in text.

        Raises:
            InvalidInputError: an unknown task or haystack, or a length that the task does not fit in.
        """
        if task not in TASKS or haystack not in HAYSTACKS:
            raise InvalidInputError(
                f"no task {task!r} in {haystack!r}: tasks are {', '.join(TASKS)}, haystacks {HAYSTACKS}"
            )
        rng = random.Random(f"{task} {length} {index} {haystack}")
        target = self._usual_question_length(task)
        for _ in range(10_000):
            plan = _PLANS[task](rng, haystack)
            questions = [self._encode(f"{ask}{self.after}{begin}") for ask, begin in plan.questions]
            if all(len(question) == target for question in questions):
                break
        else:
            raise InvalidInputError(f"no question of {task} has {target} tokens")
        room = length - target - GENERATED[task]
        depth: float | None
        example = _tracking_example() if task == "tracking" else ""  # not part of the text to search
        head = self._encode(self.before + example + plan.head)
        if plan.haystack == "lines":
            body, depth = self._lines(task, plan, room - len(head), rng)
        elif plan.haystack in ("words", "codes"):
            maker = self._word_list if plan.haystack == "words" else self._coded_text
            body, answers = maker(room - len(head), rng)
            plan, depth = _Plan(plan.head, plan.questions, [answers], [], plan.haystack), None
        else:
            body, depth = self._hide(plan, room - len(head), rng)
        return Example(task, head + body, questions, plan.answers, depth)

    def _begin(self) -> str:
        """What the tokenizer puts before every text."""
        first = self.tokenizer("a")["input_ids"][0]
        return str(self.tokenizer.bos_token) if first == self.tokenizer.bos_token_id else ""

    def _template(self) -> tuple[str, str]:
        mark = "\u241e"
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        before, after = text.split(mark)
        return before, after

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _usual_question_length(self, task: str) -> int:
        if task not in self._question_length:
            rng = random.Random(f"lengths {task}")
            lengths = [
                len(self._encode(f"{ask}{self.after}{begin}"))
                for _ in range(40)
                for ask, begin in _PLANS[task](rng, "essays").questions
            ]
            self._question_length[task] = statistics.mode(sorted(lengths))
        return self._question_length[task]

    def _hide(self, plan: _Plan, room: int, rng: random.Random) -> tuple[list[int], float]:
        """`room` tokens of the haystack with the needles in it, and the first needle's depth."""
        needles = [self._encode(f"{plan.joiner}{needle}{plan.joiner.rstrip(' ')}") for needle in plan.needles]
        size = room - sum(map(len, needles))
        if size < 32:
            raise InvalidInputError(f"the length leaves {size} tokens of text around the needles: give a longer one")
        stack = self._haystacks[plan.haystack]
        first = rng.randrange(len(stack))
        text = (stack * (size // len(stack) + 2))[first : first + size]
        places = [i + 1 for i, token in enumerate(text) if token in self._sentence_ends and i + 1 < size] or [0]
        chosen = sorted(rng.choices(places, k=len(needles)))
        made: list[int] = []
        done = 0
        for place, needle in zip(chosen, needles, strict=True):
            made += text[done:place] + needle
            done = place
        return made + text[done:], chosen[0] / size

    def _filled(self, lines: list[list[int]], room: int) -> list[int]:
        """The lines end to end behind as much noise as fills the room."""
        gap = room - sum(map(len, lines))
        noise = self._haystacks["noise"]
        filler = (noise * (gap // len(noise) + 1))[: gap - 1] + self._encode("\n") if gap else []
        return filler + [token for line in lines for token in line]

    def _lines(self, task: str, plan: _Plan, room: int, rng: random.Random) -> tuple[list[int], float]:
        """As many other lines of the task's kind as fit, with the needed ones among them."""
        needed = [self._encode(f"{needle}\n") for needle in plan.needles]
        others: list[list[int]] = []
        left = room - sum(map(len, needed))
        if left < 0:
            raise InvalidInputError(f"the length is too short for {task} by {-left} tokens")
        used = {key for needle in plan.needles for key in _KEYS[task](needle)}
        keys = iter(_distinct_keys(rng, task, used))
        while True:
            line = self._encode(_LINES[task](next(keys), rng) + "\n")
            if len(line) > left:
                break
            others.append(line)
            left -= len(line)
        places = sorted(rng.choices(range(len(others) + 1), k=len(needed)))
        for place, line in reversed(list(zip(places, needed, strict=True))):
            others.insert(place, line)
        return self._filled(others, room), places[0] / max(1, len(others))

    @cached_property
    def _words(self) -> list[str]:
        words = {word.strip(".,;:!?\"'()").lower() for word in self._essays.split()}
        return sorted(word for word in words if word.isascii() and word.isalpha() and 4 <= len(word) <= 8)

    def _word_list(self, room: int, rng: random.Random) -> tuple[list[int], tuple[str, ...]]:
        sample, _ = self._numbered(random.Random(0), 200, 10)
        entries = room * 200 // len(self._encode(sample))
        while entries >= 40:
            text, common = self._numbered(rng, entries, max(3, min(30, entries // 20)))
            ids = self._encode(text)
            if len(ids) <= room:
                return self._filled([ids], room), common
            entries -= max(1, entries // 40)
        raise InvalidInputError("the length is too short for common_words")

    def _numbered(self, rng: random.Random, entries: int, often: int) -> tuple[str, tuple[str, ...]]:
        rare = max(1, often // 10)
        others = max(0, entries - 10 * often) // rare
        words = rng.sample(self._words, 10 + others)
        listed = [word for word in words[:10] for _ in range(often)] + [w for w in words[10:] for _ in range(rare)]
        rng.shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)) + "\n", tuple(words[:10])

    def _coded_text(self, room: int, rng: random.Random) -> tuple[list[int], tuple[str, ...]]:
        names = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(400)]
        weights = [1 / rank**2 for rank in range(1, len(names) + 1)]
        total = sum(weights)
        for count in range(room * 2 // 3, 0, -max(1, room // 64)):
            made: list[str] = []
            for rank, weight in enumerate(weights):
                made += ["..." if rank == 0 else names[rank]] * int(count * weight / total)
            random.Random(rng.random()).shuffle(made)
            ids = self._encode(" ".join(made) + "\n")
            if len(ids) <= room:
                return self._filled([ids], room), tuple(names[1:4])
        raise InvalidInputError("the length is too short for frequent_words")


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _needle(key: str, value: str, kind: str = "numbers") -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _listed(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])}, and {items[-1]}" if len(items) > 1 else items[0]


def _one(key: str, value: str, needles: list[str], haystack: str, kind: str = "number", joiner: str = " ") -> _Plan:
    return _Plan(
        head=f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the {kind} afterwards.\n",
        questions=[
            (
                f"\nWhat is the special magic {kind} for {key} mentioned in the provided text?",
                f"The special magic {kind} for {key} mentioned in the provided text is",
            )
        ],
        answers=[(value,)],
        needles=needles,
        haystack=haystack,
        joiner=joiner,
    )


def _single_1(rng: random.Random, haystack: str) -> _Plan:
    key, value = draw_keys(rng, 1)[0], _number(rng)
    return _one(key, value, [_needle(key, value)], "noise", joiner="\n")


def _single_2(rng: random.Random, haystack: str) -> _Plan:
    key, value = draw_keys(rng, 1)[0], _number(rng)
    return _one(key, value, [_needle(key, value)], haystack)


def _single_3(rng: random.Random, haystack: str) -> _Plan:
    key, value = draw_keys(rng, 1)[0], _uuid(rng)
    return _one(key, value, [_needle(key, value, "uuids")], haystack, "uuid")


def _multikey_1(rng: random.Random, haystack: str) -> _Plan:
    keys, values = draw_keys(rng, NEEDLES), [_number(rng) for _ in range(NEEDLES)]
    order = rng.sample(range(NEEDLES), NEEDLES)
    return _one(keys[0], values[0], [_needle(keys[i], values[i]) for i in order], haystack)


def _multikey_2(rng: random.Random, haystack: str) -> _Plan:
    key, value = draw_keys(rng, 1)[0], _number(rng)
    return _one(key, value, [_needle(key, value)], "lines")


def _multikey_3(rng: random.Random, haystack: str) -> _Plan:
    key, value = _uuid(rng), _uuid(rng)
    return _one(key, value, [_needle(key, value, "uuids")], "lines", "uuid")


def _many(keys: list[str], values: list[str], haystack: str) -> _Plan:
    asked = _listed(list(dict.fromkeys(keys)))
    return _Plan(
        head="Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz "
        "you about the numbers afterwards.\n",
        questions=[
            (
                f"\nWhat are all the special magic numbers for {asked} mentioned in the provided text?",
                f"The special magic numbers for {asked} mentioned in the provided text are",
            )
        ],
        answers=[tuple(values)],
        needles=[_needle(k, v) for k, v in zip(keys, values, strict=True)],
        haystack=haystack,
    )


def _multivalue(rng: random.Random, haystack: str) -> _Plan:
    return _many(draw_keys(rng, 1) * NEEDLES, [_number(rng) for _ in range(NEEDLES)], haystack)


def _multiquery(rng: random.Random, haystack: str) -> _Plan:
    return _many(draw_keys(rng, NEEDLES), [_number(rng) for _ in range(NEEDLES)], haystack)


_TRACKING_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def _chain(rng: random.Random) -> tuple[list[str], str, list[str]]:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = str(rng.randrange(10**4, 10**5))
    return names, value, [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in pairwise(names)]


def _tracking_question(value: str) -> tuple[str, str]:
    return (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        f"Answer: According to the chain(s) of variable assignment in the text above, {HOPS + 1} variables are "
        f"assigned the value {value}, they are:",
    )


def _tracking_example() -> str:
    """A worked example in a short text, as RULER puts one before the question."""
    names, value, lines = _chain(random.Random("worked example"))
    text = "\n".join(f"{line}\n{sentence}." for line, sentence in zip(lines, NOISE.split("."), strict=False))
    ask, begin = _tracking_question(value)
    return f"{_TRACKING_HEAD}{text}{ask} {begin} {' '.join(names)}\n\n"


def _tracking(rng: random.Random, haystack: str) -> _Plan:
    names, value, lines = _chain(rng)
    return _Plan(_TRACKING_HEAD, [_tracking_question(value)], [tuple(names)], lines, "noise", "\n")


def _common_words(rng: random.Random, haystack: str) -> _Plan:
    return _Plan(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n",
        [
            (
                "\nQuestion: What are the 10 most common words in the above list?",
                "Answer: The top 10 words that appear most often in the list are:",
            )
        ],
        [()],
        [],
        "words",
    )


def _frequent_words(rng: random.Random, haystack: str) -> _Plan:
    return _Plan(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ",
        [
            (
                "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
                "frequently appeared words in the above coded text?",
                "Answer: According to the coded text above, the three most frequently appeared words are:",
            )
        ],
        [()],
        [],
        "codes",
    )


def _pairs(rng: random.Random, haystack: str) -> _Plan:
    keys, values = draw_keys(rng, 2), [str(rng.randrange(10**4, 10**5)) for _ in range(2)]
    lines = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
    order = rng.sample(range(2), 2)
    return _Plan(
        head="Each line of the following list holds a name and its code. Make sure to memorize all of them. I will "
        "quiz you about the codes afterwards.\n",
        questions=[(f"\nWhat is the code of {key} in the list?", f"The code of {key} in the list is") for key in keys],
        answers=[(value,) for value in values],
        needles=[lines[i] for i in order],
        haystack="lines",
    )


def _distinct_keys(rng: random.Random, task: str, used: set[str]) -> Any:
    while True:
        for key in [_uuid(rng) for _ in range(64)] if task == "multikey_3" else draw_keys(rng, 64):
            if key not in used:
                used.add(key)
                yield key


_PLANS: dict[str, Callable[[random.Random, str], _Plan]] = {
    "single_1": _single_1,
    "single_2": _single_2,
    "single_3": _single_3,
    "multikey_1": _multikey_1,
    "multikey_2": _multikey_2,
    "multikey_3": _multikey_3,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "tracking": _tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
    "pairs": _pairs,
}
_LINES: dict[str, Callable[[str, random.Random], str]] = {
    "multikey_2": lambda key, rng: _needle(key, _number(rng)),
    "multikey_3": lambda key, rng: _needle(key, _uuid(rng), "uuids"),
    "pairs": lambda key, rng: f"{key}: {rng.randrange(10**4, 10**5)}",
}
_KEYS: dict[str, Callable[[str], list[str]]] = {
    "multikey_2": lambda line: [line.split(" for ")[1].split(" is: ")[0]],
    "multikey_3": lambda line: [line.split(" for ")[1].split(" is: ")[0]],
    "pairs": lambda line: [line.split(":")[0]],
}
