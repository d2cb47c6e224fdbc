"""Tests of tokenizers that are rebuilt from a GGUF file's pieces."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from dynamask.data.gguf_tokenizer import BYTE, CONTROL, NORMAL, USER_DEFINED, sentencepiece_bpe
from dynamask.errors import InvalidInputError

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
RUNS = ["\n", "\n\n", "  ", "   "]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
MERGED = ["\u2581t", "he", "in", "\u2581the", "er", "th", "the", "\u2581a", "ing", "there", "an"]
CHARACTERS = ["\u2581", *"aeghinrt"]
TOKENS = SPECIAL + RUNS + BYTES + MERGED + CHARACTERS
KINDS = [CONTROL] * 4 + [USER_DEFINED] * 4 + [BYTE] * 256 + [NORMAL] * (len(MERGED) + len(CHARACTERS))
SCORES = [-1000.0] * 8 + [0.0] * 256 + [-float(n) for n in range(len(MERGED) + len(CHARACTERS))]


def _sentencepiece(text: str) -> list[str]:
    """Merge the neighbours whose union has the highest score, the leftmost first: the definition."""
    pieces = list(text.replace(" ", "\u2581"))
    while True:
        found = [(i, a + b) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in MERGED]
        unions = [(SCORES[TOKENS.index(union)], -i) for i, union in found]
        if not unions:
            return pieces
        place = -max(unions)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def test_it_splits_as_sentencepiece_does_on_random_texts() -> None:
    tokenizer = sentencepiece_bpe(TOKENS, SCORES, KINDS, unknown=3)
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("aeghinrt") if rng.random() < 0.85 else " " for _ in range(rng.randint(1, 30)))
        while "  " in text:
            text = text.replace("  ", " ")
        made = tokenizer.encode(text)
        assert made.tokens == _sentencepiece(text), text
        assert tokenizer.decode(made.ids) == text


def test_runs_come_first_and_what_no_piece_covers_becomes_bytes() -> None:
    tokenizer = sentencepiece_bpe(TOKENS, SCORES, KINDS, unknown=3)
    assert tokenizer.encode("the\n\n   the").tokens == ["the", "\n\n", "   ", "the"]
    made = tokenizer.encode("\u00e9a")
    assert made.tokens == ["<0xC3>", "<0xA9>", "a"]
    assert tokenizer.decode(made.ids) == "\u00e9a"
    assert tokenizer.encode("<bos>a").tokens == ["<bos>", "a"]


def test_lists_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="pieces"):
        sentencepiece_bpe(TOKENS, SCORES[1:], KINDS, unknown=3)
    with pytest.raises(InvalidInputError, match="occur twice"):
        sentencepiece_bpe([*TOKENS[:-1], "a"], SCORES, KINDS, unknown=3)
