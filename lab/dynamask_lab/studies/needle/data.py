"""The corpora of needle runs: documents with retrieval examples between them, prepared once and found again."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.data import Corpus, Document, documents, load_tokenizer, prepare, train_tokenizer
from dynamask.evaluation.retrieval import mixture
from dynamask_lab.language.data import CORPORA_FOLDER

try:
    import fcntl
except ImportError:  # not a POSIX system: sweeps of several workers then prepare the mixture before they begin
    fcntl = None  # type: ignore[assignment]

STDLIB = "stdlib"
SAME_MIXTURE = {
    "ca18ce2e6c7fdeea": "b6f328a41270e917",
    "ae9d1f15086a03c2": "93784cf386c21789",
    "70e90b60a27d2995": "b57514b491d3948c",
}
"""First digits of a corpus' digest -> those of one of the same texts of which another twentieth is held out: that went
by the folder once. Their questions are the same, and what they find compares; their losses do not."""


@dataclass(frozen=True)
class MixtureSettings:
    """What a corpus of a needle run is made of.

    Attributes:
        source: "stdlib", or prepared corpora joined by "+", see `language_data`; they lend their tokenizer, too.
        tokens: of plain text that are read.
        vocab_size: of the tokenizer trained on "stdlib"; not read for prepared corpora.
        share: of the tokens that are retrieval examples.
        shortest, longest: tokens of an example.
        tasks: their names.
        seed: of the examples.
    """

    source: str
    tokens: int
    vocab_size: int
    share: float
    shortest: int
    longest: int
    tasks: tuple[str, ...]
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the corpus: the same for the same settings."""
        text = json.dumps(vars(self) | {"tasks": list(self.tasks)}, sort_keys=True)
        return f"needle-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def prepare_mixture(settings: MixtureSettings) -> str:
    """Make the corpus, unless it is there, in the folder of corpora.

    Returns:
        Its name, for `LanguageConfig.corpus`.

    Raises:
        UsageError: a source that is not there.
        InvalidInputError: what `mixture` refuses.
    """
    root = Path(os.environ.get(CORPORA_FOLDER, "corpora")).absolute()
    folder = root / settings.name
    if not (folder / "index.json").exists():
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / f".{settings.name}.mixture.lock"):  # `prepare` locks the folder itself
            if not (folder / "index.json").exists():
                _prepare(settings, root, folder)
    return settings.name


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait for other processes that prepare the same: the runs of a sweep share their mixture, and may run together."""
    with open(lock, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def same_mixture(content: str) -> str:
    """What stands for a corpus' digest: the same for corpora of the same texts."""
    return SAME_MIXTURE.get(content[:16], content[:16])


def _prepare(settings: MixtureSettings, root: Path, folder: Path) -> None:
    table = root / f".{settings.name}.jsonl"
    words = root / f".{settings.name}.tokenizer"
    try:
        tokenizer = _tokenizer(settings, root)
        tokenizer.save_pretrained(words)
        mixed = mixture(
            _texts(settings, root, tokenizer),
            tokenizer,
            settings.share,
            settings.seed,
            lengths=(settings.shortest, settings.longest),
            tasks=settings.tasks,
        )
        with open(table, "w", encoding="utf-8") as file:
            for document in mixed:
                file.write(json.dumps({"text": document.text}) + "\n")
        # What is held out goes by the name of the table, which must not hold the folder.
        with _inside(root):
            prepare([table.name], folder, vocab_size=len(tokenizer), tokenizer=str(words), validation=0.05)
    finally:
        table.unlink(missing_ok=True)
        shutil.rmtree(words, ignore_errors=True)


def mixture_tokenizer(name: str) -> Any:
    """The tokenizer of a corpus that `prepare_mixture` made."""
    return Corpus.open(Path(os.environ.get(CORPORA_FOLDER, "corpora")) / name).tokenizer


def _tokenizer(settings: MixtureSettings, root: Path) -> Any:
    if settings.source != STDLIB:
        return load_tokenizer(root / settings.source.split("+")[0] / "tokenizer")
    texts = (document.text for document in _standard_library(settings))
    return train_tokenizer(texts, settings.vocab_size)


def _standard_library(settings: MixtureSettings) -> Iterator[Document]:
    """As many of its documents as hold the tokens, at an estimated four characters each."""
    ends = itertools.accumulate(len(document.text) for document in documents([STDLIB]))
    return (
        document
        for document, end in zip(documents([STDLIB]), ends, strict=False)
        if end - len(document.text) < 4 * settings.tokens
    )


def _texts(settings: MixtureSettings, root: Path, tokenizer: Any) -> Iterator[Document]:
    if settings.source == STDLIB:
        yield from _standard_library(settings)
        return
    left = settings.tokens
    streams = [_documents(Corpus.open(root / name), name) for name in settings.source.split("+")]
    # In turn, so that a part of the tokens is a part of every source.
    for document in itertools.chain.from_iterable(itertools.zip_longest(*streams)):
        if document is None:
            continue
        if left <= 0:
            return
        name, tokens = document
        left -= len(tokens)
        yield Document(name, tokenizer.decode(tokens, skip_special_tokens=True))


def _documents(corpus: Corpus, name: str) -> Iterator[tuple[str, np.ndarray]]:
    starts = np.asarray(corpus.document_starts("train"))
    stream = np.concatenate(corpus.tokens("train"))
    for number, part in enumerate(np.split(stream, starts[1:])):
        if len(part):
            yield f"{name}/{number}", part
