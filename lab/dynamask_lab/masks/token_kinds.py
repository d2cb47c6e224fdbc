"""Kinds of token, by which one asks what a mask keeps."""

from __future__ import annotations

import keyword
from collections.abc import Sequence

KINDS = (
    "line break",
    "space",
    "punctuation",
    "number",
    "keyword",
    "word, beginning",
    "word, continued",
    "special or partial",
)
"""Every token is one of these. "keyword": a keyword of Python, whole; "partial": bytes of a longer character."""


def token_kinds(pieces: Sequence[str], special: Sequence[bool] | None = None) -> list[int]:
    """The kind of each token of a text, as an index into `KINDS`.

    A word goes on where a letter, digit or underscore stands directly before the token.

    Args:
        pieces: the text of each token, decoded by itself, in order.
        special: which tokens are no text at all.
    """
    found = []
    for index, piece in enumerate(pieces):
        before = pieces[index - 1] if index else ""
        goes_on = _is_word(piece[:1]) and _is_word(before[-1:]) and not (special and special[index - 1])
        found.append(KINDS.index(_kind(piece, goes_on, bool(special and special[index]))))
    return found


def _kind(piece: str, goes_on: bool, special: bool) -> str:
    bare = piece.strip()
    if special or not piece or "\ufffd" in piece:
        return "special or partial"
    if not bare:
        return "line break" if "\n" in piece else "space"
    if bare.replace("_", "").isdigit():
        return "number"
    if not any(map(_is_word, bare)):
        return "punctuation"
    if goes_on:
        return "word, continued"
    return "keyword" if keyword.iskeyword(bare) else "word, beginning"


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
