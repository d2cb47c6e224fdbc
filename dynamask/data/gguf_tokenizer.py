"""Rebuild a SentencePiece BPE tokenizer, such as Gemma's, from what a GGUF file holds of it.

A GGUF file lists the pieces with their scores and kinds, not the merges. transformers reads Gemma's list as a unigram
model, which splits text into other tokens than the model was trained on. SentencePiece's BPE merges, at each step, the
two neighbours whose union has the highest score; so every way to split a piece in two is a merge, ranked by the score
of the piece. Pieces that a user defined, runs of spaces and line breaks among them, are found in the text first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamask.errors import InvalidInputError, UsageError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""The kinds of pieces, as `tokenizer.ggml.token_type` numbers them."""
_SPACE = "\u2581"


def sentencepiece_bpe(tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *, unknown: int) -> Any:
    """Build a `tokenizers.Tokenizer` from the pieces of a SentencePiece BPE model without a prefixed space.

    Args:
        tokens: the pieces, in the order of their ids.
        scores: of the pieces; of two unions, the one with the higher score is merged first.
        kinds: of the pieces, see `NORMAL` and the others.
        unknown: id of the piece that stands for what no piece covers.

    Returns:
        The tokenizer. It adds no special tokens.

    Raises:
        InvalidInputError: the lists differ in length, a piece occurs twice, or `unknown` is no id.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    if not len(tokens) == len(scores) == len(kinds) or not 0 <= unknown < len(tokens):
        raise InvalidInputError(
            f"sentencepiece_bpe: expected a score and a kind for each piece and the id of one as unknown; got "
            f"{len(tokens)} pieces, {len(scores)} scores, {len(kinds)} kinds and unknown={unknown}"
        )
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise InvalidInputError(f"sentencepiece_bpe: {len(tokens) - len(ids)} pieces occur twice")
    parts = {token: index for token, index in ids.items() if kinds[index] != CONTROL}
    merged = [index for index, token in enumerate(tokens) if kinds[index] == NORMAL and len(token) > 1]
    merges: list[tuple[str, str]] = []
    for index in sorted(merged, key=lambda index: -scores[index]):
        token = tokens[index]
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = [(left, right) for left, right in pairs if left in parts and right in parts]
        merges += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    made = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", _SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(t, normalized=False, special=special) for t, k in zip(tokens, kinds, strict=True) if k == kind
        ]
        made.add_tokens(added)
    return made


def read_gguf_tokenizer(gguf: str | Path) -> Any | None:
    """Read the tokenizer of a GGUF file that transformers reads wrongly.

    The package `gguf` must be importable.

    Args:
        gguf: the file.

    Returns:
        A `PreTrainedTokenizerFast` that begins texts as the file says, or None where transformers' own reader is right:
        where the file is not of a Gemma, or holds no SentencePiece BPE model.

    Raises:
        UsageError: the file lacks a part of the tokenizer.
    """
    from gguf import GGUFReader

    fields = GGUFReader(str(gguf)).fields

    def value(name: str, default: Any = None) -> Any:
        field = fields.get(name)
        return default if field is None else field.contents()

    if not str(value("general.architecture", "")).startswith("gemma"):
        return None
    if value("tokenizer.ggml.model") != "llama" or value("tokenizer.ggml.add_space_prefix", True):
        return None
    lists = [value(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")]
    if any(each is None for each in lists):
        raise UsageError(f"{gguf} lacks a part of its tokenizer: expected tokens, scores and token_type")
    tokens = lists[0]
    special = {
        f"{name}_token": tokens[number]
        for name, word in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := value(f"tokenizer.ggml.{word}_token_id")) is not None
    }
    unknown = value("tokenizer.ggml.unknown_token_id", tokens.index("<unk>") if "<unk>" in tokens else 0)
    made = sentencepiece_bpe(*lists, unknown=unknown)
    if value("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        from tokenizers.processors import TemplateProcessing

        bos = special["bos_token"]
        made.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)
