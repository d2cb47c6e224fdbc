"""The text a needle is hidden in, as tokens that can be cut to an exact length."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import repeat
from typing import Any

from dynamask.data.tokenizer import encode_text
from dynamask.errors import InvalidInputError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's noise haystack; also the filler of the passkey test (arXiv 2305.16300)."""


class Haystack:
    """Documents end to end, tokenised, with the places where words begin.

    Args:
        tokenizer: a transformers tokenizer.
        documents: texts; None stands for RULER's noise sentence, repeated.
        max_tokens: no more text is tokenised than this; a longer filler repeats it, as RULER repeats its essays.

    Attributes:
        tokens: the token ids.
        starts: indices into `tokens` where a word begins, ascending, the first of them 0.

    Raises:
        InvalidInputError: the documents hold no tokens.
    """

    def __init__(self, tokenizer: Any, documents: Iterable[str] | None = None, *, max_tokens: int = 1 << 20) -> None:
        self.tokens: list[int] = []
        self.starts: list[int] = []
        # The noise is repeated before it is tokenised: the seam between two of them is then the tokenizer's own.
        texts = ["\n".join(repeat(NOISE, 64))] if documents is None else documents
        for text in texts:
            ids, words = _words(tokenizer, text + "\n")
            self.starts += [len(self.tokens) + place for place in words]
            self.tokens += ids
            if len(self.tokens) >= max_tokens:
                break
        if not self.starts:
            raise InvalidInputError("the haystack is empty: give documents that hold text, or None for the noise text")

    def cut(self, length: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """Cut a filler of exactly `length` tokens, beginning with a word drawn at random.

        Returns:
            Its tokens (length,), and the places in it where a word begins, ascending, with 0 and `length`.
        """
        total = len(self.tokens)
        first = self.starts[rng.randrange(len(self.starts))]
        rounds = (first + length) // total + 1
        tokens = (self.tokens * rounds)[first : first + length]
        places = (start + turn * total - first for turn in range(rounds) for start in self.starts)
        return tokens, sorted({0, length, *(place for place in places if 0 < place < length)})


def _words(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Tokenise a text, and find the tokens that begin a word."""
    if not getattr(tokenizer, "is_fast", False):  # no offsets: a needle may then stand between any two tokens
        ids = encode_text(tokenizer, text)
        return ids, list(range(len(ids)))
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    words = [
        index
        for index, begin in enumerate(begins)
        # The bytes of one character share its offset, and only the first of them begins it.
        if index == 0 or (begin != begins[index - 1] and (text[begin].isspace() or text[begin - 1].isspace()))
    ]
    return list(encoded["input_ids"]), words if begins else []
