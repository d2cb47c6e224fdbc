"""The text of each token of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Decode a sequence token by token, so that the pieces joined are the text.

    Args:
        tokenizer: of transformers.
        ids: token ids.

    Returns:
        One piece per token. A character of several tokens stands in the last of them; the others are empty.
    """
    pieces: list[str] = []
    context, start = 0, 0  # what is decoded before the next piece, which some tokenizers need for its spaces
    for stop in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[context:start])
        after = _decode(tokenizer, ids[context:stop])
        piece = after[len(before) :] if after.startswith(before) else _decode(tokenizer, ids[start:stop])
        if piece.endswith(_INCOMPLETE) and stop < len(ids) and stop - start < 8:
            pieces.append("")
            continue
        pieces.append(piece)
        context, start = start, stop
    return pieces


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
