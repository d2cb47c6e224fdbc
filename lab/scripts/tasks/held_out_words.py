"""The data of the tasks `near_word` and `far_word`: which word comes next, that stands further up in the text?

LAMBADA's question (arXiv 1606.06031) over documents that a corpus holds out from training: the last word of a passage
of `WORDS` words is asked for, a word that the passage has used before. Last used within `NEAR` words, any window still
holds it; last used more than `FAR` words ago, a sliding window of 512 tokens does not, and only what looks further, or
a state carried from layer to layer, can tell it. Both ask for rare words alone: at most `OFTEN` times in the passage,
and in at most one held-out document in `RARE`.

The questions are the same for the same build of the corpus, and a model must not have been trained on its held-out
documents.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections import Counter
from typing import Any

import datasets

from dynamask_lab.language.data import held_out_documents

CORPUS = "text"
WORDS = 1000
NEAR = (4, 64)  # words since it was last used, at least and at most
FAR = (400, 950)
OFTEN = 3
RARE = 100
PER_DOCUMENT = 8
QUESTIONS = 100

_WORD = re.compile(r"\S+")
_PLAIN = re.compile(r"[A-Za-z]{5,}")


def near(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The only split, "test", of `near_word`: context, word, and `since`, how many words ago it was used last.

    Raises:
        UsageError: a corpus that is not there.
    """
    return _split(NEAR)


def far(**metadata: Any) -> dict[str, datasets.Dataset]:
    """As `near`, of `far_word`."""
    return _split(FAR)


def _split(since: tuple[int, int]) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(questions(held_out_documents(CORPUS), since))}


def questions(texts: list[str], since: tuple[int, int]) -> list[dict[str, Any]]:
    """At most `QUESTIONS` of them, at most `PER_DOCUMENT` a document, drawn the same way whenever it is called.

    Args:
        texts: of the documents.
        since: words since the one asked for was last used, at least and at most.
    """
    found_in = Counter(word for text in texts for word in set(_PLAIN.findall(text)))
    most = max(1, len(texts) // RARE)
    rare = {word for word, documents in found_in.items() if documents <= most}
    asked = [question for number, text in enumerate(texts) for question in _of_document(number, text, since, rare)]
    if len(asked) > QUESTIONS:
        asked = random.Random("held_out_words").sample(asked, QUESTIONS)
    return sorted(asked, key=lambda question: (question["document"], question["place"]))


def _of_document(number: int, text: str, since: tuple[int, int], rare: set[str]) -> list[dict[str, Any]]:
    spans = [match.span() for match in _WORD.finditer(text)]
    words = [text[begin:end] for begin, end in spans]
    # A word is used where it stands in "window," as well, but only its bare form is asked for.
    used: dict[str, list[int]] = {}
    for place, word in enumerate(words):
        for plain in _PLAIN.findall(word):
            used.setdefault(plain, []).append(place)
    places = [
        place
        for place in range(WORDS, len(words))
        if _PLAIN.fullmatch(words[place]) and words[place] in rare and text[spans[place][0] - 1] == " "
    ]
    random.Random(f"held_out_words/{number}").shuffle(places)
    asked: list[dict[str, Any]] = []
    for place in places:
        before = used[words[place]]
        within = before[bisect_left(before, place - WORDS) : bisect_left(before, place)]
        if not within or len(within) > OFTEN or not since[0] <= place - within[-1] <= since[1]:
            continue
        begin, end = spans[place - WORDS][0], spans[place][0] - 1
        asked.append(
            {
                "document": number,
                "place": place,
                "since": place - within[-1],
                "context": text[begin:end],
                "word": words[place],
            }
        )
        if len(asked) == PER_DOCUMENT:
            break
    return asked
