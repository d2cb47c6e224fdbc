"""Tokens on disk: each split is one stream of documents, cut into memory-mapped shards, with an index.

    corpus/
      index.json            dtype, shard lengths, fingerprint of what it was made from
      train-00000.bin ...   tokens, each document followed by the end-of-text token
      train-documents.npy   where each document starts in the split's stream
      tokenizer/            what the tokens mean

A corpus is built in a folder beside its own and renamed when whole: a killed run leaves no half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.data.sources import Document, documents, source_files
from dynamask.data.tokenizer import encode_text, load_tokenizer, opening_tokens, train_tokenizer
from dynamask.errors import UsageError
from dynamask.lock import locked

SPLITS = ("train", "validation")
_OWN_NAME = re.compile(r"index\.json|tokenizer|(train|validation)-(\d{5}\.bin|documents\.npy)")
SHARD_TOKENS = 1 << 27
TOKENIZER_SAMPLE = 50_000_000
"""Characters a tokenizer is trained on at most: merges settle long before."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus on disk."""

    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Open a prepared folder. Raises UsageError if it is not one, or damaged."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a prepared corpus: there is no such folder")
        damaged = f"the corpus {folder} is damaged ({{}}): delete the folder, and it is prepared again"
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if not isinstance(index, dict) or not {"fingerprint", "splits", "dtype"} <= set(index):
                raise UsageError(f"{folder} is not a prepared corpus: its index.json is not one of dynamask's")
            sizes = {
                folder / f"{split}-{i:05d}.bin": length * np.dtype(index["dtype"]).itemsize
                for split in SPLITS
                for i, length in enumerate(index["splits"][split]["shards"])
            }
            wrong = [file.name for file, size in sizes.items() if file.stat().st_size != size]
            corpus = cls(folder, index)
            for split in SPLITS:
                if len(corpus.document_starts(split)) != index["splits"][split]["documents"]:
                    wrong.append(f"{split}-documents.npy")
        except FileNotFoundError as error:
            if not (folder / "index.json").exists():
                raise UsageError(f"{folder} is not a prepared corpus: it has no index.json") from error
            raise UsageError(damaged.format(f"{Path(error.filename).name} is missing")) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise UsageError(damaged.format(f"{type(error).__name__}: {error}")) from error
        if wrong:
            raise UsageError(damaged.format(f"{wrong[0]} has another size than the index gives it"))
        return corpus

    def tokens(self, split: str) -> list[np.ndarray]:
        """Open the split's shards, memory-mapped, in order."""
        lengths = self.index["splits"][split]["shards"]
        return [
            np.memmap(self.folder / f"{split}-{i:05d}.bin", dtype=self.index["dtype"], mode="r", shape=(length,))
            for i, length in enumerate(lengths)
        ]

    def document_starts(self, split: str) -> np.ndarray:
        """Return where each document starts in the split's stream, (documents,) int64."""
        return np.load(self.folder / f"{split}-documents.npy", mmap_mode="r")

    @property
    def tokenizer(self) -> Any:
        """Load the tokenizer that the corpus was made with."""
        return load_tokenizer(self.folder / "tokenizer")


def prepare(
    sources: list[str],
    folder: str | Path,
    *,
    vocab_size: int,
    tokenizer: str | None = None,
    validation: float = 0.02,
    block: int = 1,
    errors: str = "fail",
    progress: Callable[[Iterable[Document], str], Iterable[Document]] | None = None,
) -> Corpus:
    """Tokenise sources into a corpus, or reopen the one that was made from the same sources and settings.

    Args:
        sources: see `documents`.
        folder: where the corpus is to be.
        vocab_size: tokens of the tokenizer trained on the spot, and the most a given one may have.
        tokenizer: folder or hub name of a given tokenizer; None trains one on the documents.
        validation: share of the documents held out, chosen by a hash of their names; 0: all of them are "train".
        block: tokens that the held-out documents must have in all, where there are that many: where the hash holds out
            fewer, the first documents join them.
        errors: "fail" or "skip", for files, lines and rows that cannot be read.
        progress: wraps the documents as they are read, given a description.

    Raises:
        UsageError: no text at all, a tokenizer larger than vocab_size, a full disk, whatever `documents` raises.
    """
    if not 0 <= validation < 1:
        raise UsageError(f"validation is a share of the documents, between 0 and 1; got {validation}")
    folder = Path(folder)
    fingerprint = _fingerprint(sources, tokenizer, vocab_size, validation, errors)

    def finished() -> Corpus | None:
        existing = _existing_corpus(folder)
        if existing is None or existing.index["fingerprint"] != fingerprint:
            return None
        return existing if not validation or _holds_block(existing, block) else None

    if (existing := finished()) is not None:
        return existing
    # Runs that share a corpus wait for the one that prepares it.
    with locked(folder.with_name(f".{folder.name}.lock"), f"the preparation of {folder}", wait=True):
        return finished() or _prepare(
            sources, folder, fingerprint, vocab_size, tokenizer, validation, block, errors, progress
        )


def _prepare(
    sources: list[str],
    folder: Path,
    fingerprint: str,
    vocab_size: int,
    tokenizer: str | None,
    validation: float,
    block: int,
    errors: str,
    progress: Callable[[Iterable[Document], str], Iterable[Document]] | None,
) -> Corpus:
    follow = progress or (lambda stream, _: stream)
    skipped: list[str] = []
    if tokenizer is None:
        sample = follow(documents(sources, errors=errors), "training the tokenizer")
        trained = train_tokenizer(_limited(sample), vocab_size)
    else:
        trained = load_tokenizer(tokenizer)
    if len(trained) > vocab_size:
        raise UsageError(
            f"the tokenizer has {len(trained)} tokens and the model {vocab_size}: set model.vocab_size={len(trained)}"
        )
    stream = follow(documents(sources, errors=errors, skipped=skipped), "tokenising")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        splits, content = _write(stream, trained, partial, validation, block, sources)
        trained.save_pretrained(partial / "tokenizer")
        index = {
            "dtype": _dtype(trained).name,
            "splits": splits,
            "block": block,
            "fingerprint": fingerprint,
            "content": content,
            "skipped": skipped,
        }
        (partial / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UsageError(f"the disk is full: no room for the corpus in {folder.parent}; free some space") from error
        raise UsageError(f"cannot write the corpus to {folder.parent}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Corpus.open(folder)


def _holds_block(corpus: Corpus, block: int) -> bool:
    """Return whether the held-out split has `block` tokens, or was prepared for as many and could not have them."""
    return corpus.index["splits"]["validation"]["tokens"] >= block or corpus.index.get("block", 1) >= block


def _existing_corpus(folder: Path) -> Corpus | None:
    """Open the corpus in the folder; None where there is no folder, or an empty one.

    Raises:
        UsageError: anything else is there. Preparing anew deletes the folder, so all in it must be a corpus's own.
    """
    if folder.is_symlink():
        found = "it is a link"
    elif not folder.exists():
        return None
    elif not folder.is_dir():
        found = "it is a file"
    else:
        entries = sorted(path.name for path in folder.iterdir())
        strange = [name for name in entries if not _OWN_NAME.fullmatch(name)]
        if not entries:
            return None
        if not strange and "index.json" in entries:
            return Corpus.open(folder)
        found = f"it holds {', '.join((strange or entries)[:3])}"
    raise UsageError(
        f"{folder} exists and is not a prepared corpus and nothing else ({found}): name a new folder (corpus=FOLDER); "
        "this one would have to be deleted"
    )


class _SplitWriter:
    """Appends documents to a split's shards."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.starts: list[int] = []
        self.shards: list[int] = []
        self.total = 0
        self.digest = hashlib.sha256()

    def append(self, tokens: np.ndarray) -> None:
        self.starts.append(self.total)
        self.total += len(tokens)
        self.digest.update(tokens.astype("<i8").tobytes())
        while len(tokens):
            if not self.shards or self.shards[-1] == SHARD_TOKENS:
                self.shards.append(0)
            part = tokens[: SHARD_TOKENS - self.shards[-1]]
            with open(self.folder / f"{self.split}-{len(self.shards) - 1:05d}.bin", "ab") as file:
                file.write(part.astype(self.dtype).tobytes())
            self.shards[-1] += len(part)
            tokens = tokens[len(part) :]

    def finish(self) -> dict[str, Any]:
        np.save(self.folder / f"{self.split}-documents.npy", np.asarray(self.starts, dtype=np.int64))
        return {"shards": self.shards, "tokens": self.total, "documents": len(self.starts)}


def _write(
    stream: Iterable[Document], tokenizer: Any, folder: Path, validation: float, block: int, sources: list[str]
) -> tuple[dict[str, Any], str]:
    """Write the shards. Returns the index of each split, and a digest of the vocabulary and of every token."""
    dtype = _dtype(tokenizer)
    writers = {split: _SplitWriter(folder, split, dtype) for split in SPLITS}
    train, held = writers["train"], writers["validation"]
    # The first documents wait for the end: some join the held-out ones where the hash of the names chose too few.
    waiting: list[tuple[bool, np.ndarray]] = []
    waiting_tokens = 0
    begin = opening_tokens(tokenizer)
    for document in stream:
        tokens = np.asarray([*begin, *encode_text(tokenizer, document.text), tokenizer.eos_token_id], dtype=np.int64)
        name = document.name.encode("utf-8", "surrogateescape")  # file names need not be UTF-8
        held_out = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") / 2**32 < validation
        if validation and waiting_tokens < block:
            waiting.append((held_out, tokens))
            waiting_tokens += len(tokens)
        else:
            (held if held_out else train).append(tokens)
    if not (waiting or train.total or held.total):
        raise UsageError(f"no text in {', '.join(sources)}: give files that hold some")
    waiting.sort(key=lambda entry: not entry[0])
    for number, (held_out, tokens) in enumerate(waiting):
        needed = block - held.total
        remaining = train.total + sum(len(later) for _, later in waiting[number + 1 :])
        if needed <= 0:
            (held if held_out else train).append(tokens)
        elif remaining >= block:
            held.append(tokens)
        else:  # training needs this document, too: its end is held out
            cut = max(1, len(tokens) - max(needed, int(len(tokens) * max(validation, 0.05))))
            train.append(tokens[:cut])
            held.append(tokens[cut:] if cut < len(tokens) else tokens)
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for writer in writers.values():
        digest.update(writer.digest.digest())
    return {split: writer.finish() for split, writer in writers.items()}, digest.hexdigest()


def _dtype(tokenizer: Any) -> np.dtype:
    return np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)


def _limited(stream: Iterable[Document]) -> Iterable[str]:
    taken = 0
    for document in stream:
        yield document.text
        taken += len(document.text)
        if taken >= TOKENIZER_SAMPLE:
            return


def _fingerprint(sources: list[str], tokenizer: str | None, vocab_size: int, validation: float, errors: str) -> str:
    """List what the corpus depends on; files by name, size and time of change."""
    facts: list[Any] = ["dynamask-corpus-3", tokenizer, vocab_size, validation, errors]
    for source in sources:
        stats = [(str(file), file.stat() if file.exists() else file.lstat()) for file in source_files(source)]
        facts.append([source, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
