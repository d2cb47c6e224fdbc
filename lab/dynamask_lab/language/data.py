"""The token streams that language runs read, by name.

A corpus is a folder made by `dynamask.data.prepare` (`lab/scripts/corpora.py` makes "code" and "text") inside the
folder that the environment variable DYNAMASK_CORPORA names, by default `corpora`. "code+text" is both, end to end,
and "bytes" the sources of Python's standard library as bytes, which every machine has.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from dynamask.data import Corpus, documents
from dynamask.errors import InvalidInputError, UsageError

CORPORA_FOLDER = "DYNAMASK_CORPORA"
BYTES = "bytes"
_BYTES_READ = 4_000_000
_END = 256


@dataclass(frozen=True)
class TokenStreams:
    """The tokens of a corpus.

    Attributes:
        train, validation, test: (tokens,) unsigned integers, documents end to end, each closed by the end-of-text
            token. Without a share for the test, it is empty.
        vocab_size: tokens there are.
        content: digest of vocabulary and tokens.
    """

    train: np.ndarray
    validation: np.ndarray
    vocab_size: int
    content: str
    test: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint16))


def token_streams(corpus: str, test_share: float = 0.0) -> TokenStreams:
    """The streams of a corpus, memory-mapped where they are one file.

    Args:
        corpus: "bytes", a prepared corpus's name, or several joined by "+", which must share their tokenizer.
        test_share: share of the held-out documents of each corpus, the last ones, that no form is chosen on: they are
            the test split instead of the validation split. From 0 to below 1.

    Raises:
        UsageError: no such corpus, or corpora of different tokenizers.
        InvalidInputError: a share outside its range.
    """
    if not 0 <= test_share < 1:
        raise InvalidInputError(f"test_share is a share of the held-out documents, from 0 to below 1; got {test_share}")
    streams = _streams(corpus, _corpora())
    if not test_share:
        return streams
    kept, tested = [], []
    for tokens, starts in _held_out(corpus):
        cut = int(starts[-round(test_share * len(starts))]) if round(test_share * len(starts)) else len(tokens)
        kept.append(tokens[:cut])
        tested.append(tokens[cut:])
    return replace(streams, validation=_joined(kept), test=_joined(tested))


def _held_out(corpus: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each part of a corpus the held-out tokens, and where its documents start."""
    if corpus == BYTES:
        tokens = _streams(corpus, _corpora()).validation
        return [(tokens, np.append(0, np.flatnonzero(tokens[:-1] == _END) + 1))]
    parts = _parts(corpus, _corpora())
    return [(_joined(part.tokens("validation")), np.asarray(part.document_starts("validation"))) for part in parts]


@lru_cache(maxsize=4)
def _streams(corpus: str, folder: Path) -> TokenStreams:
    """Kept by name and folder: the same name is another corpus elsewhere."""
    if corpus == BYTES:
        return _bytes()
    parts = _parts(corpus, folder)
    if len({(part.folder / "tokenizer" / "tokenizer.json").read_bytes() for part in parts}) > 1:
        raise UsageError(f"the corpora {corpus} were made with different tokenizers: build them together")
    streams = {
        split: _joined([shard for part in parts for shard in part.tokens(split)]) for split in ("train", "validation")
    }
    content = "+".join(part.index["content"] for part in parts)
    return TokenStreams(streams["train"], streams["validation"], len(parts[0].tokenizer), content)


def tokenizer_folder(corpus: str) -> Path | None:
    """Where the tokenizer of a corpus lies; None of "bytes", which has none."""
    return None if corpus == BYTES else _parts(corpus, _corpora())[0].folder / "tokenizer"


def held_out_documents(corpus: str) -> list[str]:
    """The texts of a corpus's validation split, one per document.

    Args:
        corpus: a prepared corpus's name, or several joined by "+".

    Raises:
        UsageError: no such corpus.
    """
    texts = []
    for part in _parts(corpus, _corpora()):
        tokens, tokenizer = _joined(part.tokens("validation")), part.tokenizer
        # Each document ends in a token that is not text.
        for document in np.split(tokens, part.document_starts("validation")[1:]):
            texts.append(tokenizer.decode(document, skip_special_tokens=True))
    return texts


def _corpora() -> Path:
    return Path(os.environ.get(CORPORA_FOLDER, "corpora"))


def _parts(corpus: str, folder: Path) -> list[Corpus]:
    return [_open(folder / name) for name in corpus.split("+")]


def _open(folder: Path) -> Corpus:
    if not (folder / "index.json").exists():
        raise UsageError(
            f"there is no corpus {folder}: make it with `python lab/scripts/corpora.py {folder.parent}`, or name the "
            f"folder that holds it in the environment variable {CORPORA_FOLDER}"
        )
    return Corpus.open(folder)


def _joined(shards: list[np.ndarray]) -> np.ndarray:
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def _bytes() -> TokenStreams:
    """The first few megabytes of the standard library; every 20th document is held out."""
    splits: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    read = 0
    for number, document in enumerate(documents(["stdlib"])):
        data = np.frombuffer(document.text.encode(), dtype=np.uint8).astype(np.uint16)
        splits["validation" if number % 20 == 0 else "train"].append(np.append(data, np.uint16(_END)))
        read += len(data)
        if read > _BYTES_READ:
            break
    train, validation = (np.concatenate(splits[split]) for split in ("train", "validation"))
    content = hashlib.sha256(train.tobytes() + validation.tobytes()).hexdigest()
    return TokenStreams(train, validation, _END + 1, content)
