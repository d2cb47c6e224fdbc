"""The data of the task `next_line`: which of four lines of a module of Python's standard library comes next?

HellaSwag's question over text that every machine has. The wrong lines are real lines of the same module, as deep and
about as long as the right one, and every choice stands only once in the module and not in the context, so neither its
length, nor its indentation, nor its being common or repeated tells it: what remains is whether it fits what was read.

The questions are the same on every machine with the same Python; another release of Python words some lines otherwise,
so figures compare at the same version. They say something about a model only if it never read `HELD_OUT`.
"""

from __future__ import annotations

import random
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import datasets

HELD_OUT = (
    "argparse",
    "calendar",
    "configparser",
    "difflib",
    "doctest",
    "fractions",
    "ftplib",
    "imaplib",
    "mailbox",
    "optparse",
    "plistlib",
    "smtplib",
    "statistics",
    "tarfile",
    "uuid",
)
"""The modules asked about, which training must leave out. All are single files in every Python from 3.10 on."""

PER_MODULE = 20
CONTEXT_LINES = 60
CHOICES = 4
SHORTEST, LONGEST = 16, 80  # characters without indentation: "else:" and ")" would be asked about most otherwise
LENGTH_BAND = 6  # characters


def load(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The only split, "test": module, line (number of the right one), context, choices and answer (its index).

    Raises:
        FileNotFoundError: a Python without the sources of its standard library.
    """
    asked = [question for module in HELD_OUT for question in questions(module, source(module))]
    # The right answer is each of the four equally often, so that always choosing one gives exactly chance.
    for number, question in enumerate(asked):
        right = question["choices"].pop(0)
        question["answer"] = number % CHOICES
        question["choices"].insert(question["answer"], right)
    return {"test": datasets.Dataset.from_list(asked)}


def source(module: str) -> str:
    """The text of a module of the standard library."""
    return (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8")


def questions(module: str, text: str) -> list[dict[str, Any]]:
    """`PER_MODULE` questions about a module, or as many as it has, the right choice first, in the order of the text.

    Args:
        module: its name, which seeds the choice of lines.
        text: its source.
    """
    chooser = random.Random(f"next_line/{module}")
    lines = text.split("\n")
    often = Counter(line.strip() for line in lines)
    # ASCII, because the harness's acc_norm divides by characters: they are then bytes as well.
    usable = [
        number
        for number, line in enumerate(lines)
        if SHORTEST <= len(line.strip()) <= LONGEST and line.isascii() and often[line.strip()] == 1
    ]
    places = [number for number in usable if number >= CONTEXT_LINES]
    chooser.shuffle(places)
    asked: list[dict[str, Any]] = []
    for place in places:
        begin = place - CONTEXT_LINES
        rivals = [n for n in usable if not begin <= n <= place and _alike(lines[n], lines[place])]
        if len(rivals) < CHOICES - 1:
            continue
        choices = [place, *chooser.sample(rivals, CHOICES - 1)]
        # Blank lines before the answer are context, and so is the end of the last line.
        context = "\n".join(lines[begin:place]) + "\n"
        asked.append(
            {"module": module, "line": place + 1, "context": context, "choices": [lines[n] for n in choices]},
        )
        if len(asked) == PER_MODULE:
            break
    return sorted(asked, key=lambda question: question["line"])


def _alike(line: str, other: str) -> bool:
    """Whether two lines are indented alike and of one band of lengths.

    Bands, and not a distance from the right line: with that, the right one would seldom be the shortest or longest.
    """
    (depth, length), (other_depth, other_length) = (
        (len(each) - len(each.lstrip()), len(each.strip())) for each in (line, other)
    )
    return depth == other_depth and length // LENGTH_BAND == other_length // LENGTH_BAND
