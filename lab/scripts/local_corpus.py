"""Make a corpus of the sources that a machine has: the standard library, installed packages, C and C++ headers.

    python lab/scripts/local_corpus.py CORPORA        # makes CORPORA/local, for DYNAMASK_CORPORA=CORPORA

It serves machines without a package registry. Tests, and sources that occur twice, are left out; the digest in every
result line tells one build from another. Tables of further documents come first (`--more`, JSON lines in .xz).
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import multiprocessing
import os
import sys
import sysconfig
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from dynamask.data import Corpus, documents, prepare, train_tokenizer
from dynamask.data.sources import Document

VOCAB_SIZE = 4096
SAMPLE = 20_000_000
"""Characters that the tokenizer is trained on."""
SHORTEST, LONGEST = 400, 60_000
"""Characters of a document. What is longer is cut, so that no generated table fills the corpus."""
LONG = (42_000, 170_000)
"""Characters of the documents of the corpus `long`, each the sources of a folder."""
VALIDATION = 0.04
PARTS = 32
HEADERS = ("/usr/local/cuda/include", "/usr/include")
HEADER_SUFFIXES = (".h", ".hpp", ".cuh", ".hh")
_DIGITS = 0.25
"""Share of digits from which the opening of a text is taken for a table."""


def packages() -> list[Path]:
    """The folders of the installed packages."""
    place = Path(sysconfig.get_path("purelib"))
    return sorted(path for path in place.iterdir() if path.is_dir() and "dynamask" not in path.name)


def sources(places: Sequence[Path], more: Sequence[Path] = ()) -> Iterator[Document]:
    """The tables of `more`, the standard library, Python files of the packages that are no tests, and headers."""
    for table in more:
        with lzma.open(table, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield Document(**json.loads(line))
    yield from documents(["stdlib"], errors="skip")
    for place in places:
        yield from _files(place, (".py", ".pyi"))
    for place in [*places, *map(Path, HEADERS)]:
        yield from _files(place, HEADER_SUFFIXES)


def documents_of(tables: Sequence[Path], processes: int = 1) -> Iterator[Document]:
    """The documents of tables, in the order of the tables' names, several tables read at a time."""
    ordered = sorted(tables, key=lambda table: table.name)
    if processes == 1 or len(ordered) < 2:
        yield from itertools.chain.from_iterable(map(_table, ordered))
        return
    with multiprocessing.get_context("spawn").Pool(min(processes, len(ordered))) as pool:
        yield from itertools.chain.from_iterable(pool.imap(_table, ordered))


def _table(table: Path) -> list[Document]:
    with (bz2.open if table.suffix == ".bz2" else lzma.open)(table, "rt", encoding="utf-8", newline="\n") as lines:
        return [Document(**json.loads(line)) for line in lines]


_PACKED: tuple[tuple[bytes, Callable[[Path], Any]], ...] = (
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
    (b"\x5d\0\0", lzma.open),
    (b"\x1f\x8b", gzip.open),
    (b"", partial(open, mode="rb")),
)
"""The first bytes of a packed file, and what reads it. These read several streams in one file, as parallel packers such
as pbzip2 write them; the streams of `tarfile` end with the first."""


def _unpacked(archive: Path) -> IO[bytes]:
    with open(archive, "rb") as stream:
        opening = stream.read(8)
    made: IO[bytes] = next(read for first, read in _PACKED if opening.startswith(first))(archive)
    return made


def texts_of(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Read files of an archive of sources, packed by gzip, bzip2 or xz in one stream or several, from front to back.

    Where a damaged archive cannot be read further, its rest is left out, and a line on stderr names it: a part of a
    corpus is made of many archives, on a machine that is lent for minutes.

    Args:
        archive: a tar file, packed or not.
        wanted: whether the file of that name is read.

    Yields:
        Name and text of each wanted file that is UTF-8.
    """
    count = 0
    try:
        with _unpacked(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tree:
            for member in tree:
                if not member.isfile() or not wanted(member.name):
                    continue
                content = tree.extractfile(member)
                if content is None:
                    continue
                try:
                    text = content.read().decode("utf-8")
                except UnicodeDecodeError:
                    continue
                count += 1
                yield member.name, text
    except (EOFError, OSError, lzma.LZMAError, tarfile.TarError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the machine, not of the content
        print(f"{archive.name}: left out behind {count} files: {error}", file=sys.stderr, flush=True)


def _files(place: Path, suffixes: tuple[str, ...]) -> Iterator[Document]:
    for folder, below, names in os.walk(place):
        below.sort()
        for name in sorted(names):
            path = Path(folder) / name
            inside = path.relative_to(place).parts
            if name.endswith(suffixes) and not any("test" in part for part in inside):
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                yield Document(f"{place.name}/{'/'.join(inside)}", text)


def selected(found: Iterable[Document], characters: float = float("inf")) -> Iterator[Document]:
    """Documents long enough, cut where they are too long, each text once, until there are so many characters."""
    seen: set[bytes] = set()
    taken = 0
    for document in found:
        text = document.text[:LONGEST]
        digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if len(text) < SHORTEST or digest in seen or looks_like_table(text):
            continue
        seen.add(digest)
        taken += len(text)
        yield Document(document.name, text)
        if taken >= characters:
            return


def looks_like_table(text: str) -> bool:
    """Whether digits fill the opening of a text."""
    opening = text[:1000]
    return sum(c.isdigit() for c in opening) > _DIGITS * len(opening)


def directories(found: Iterable[Document]) -> Iterator[Document]:
    """The documents of one folder after another as one long document, 16 thousand to 64 thousand tokens or so."""
    name, size = "", 0
    parts: list[str] = []
    for document in found:
        folder = os.path.dirname(document.name)
        if parts and (folder != name or size > LONG[1]):
            if size >= LONG[0]:
                yield Document(f"{name}/{len(parts)}", "\n".join(parts)[: LONG[1]])
            parts, size = [], 0
        name = folder
        parts.append(f"// {document.name}\n{document.text}")
        size += len(document.text)
    if size >= LONG[0]:
        yield Document(name, "\n".join(parts)[: LONG[1]])


def build(
    output: Path,
    places: Sequence[Path] | None = None,
    *,
    more: Sequence[Path] = (),
    characters: float = float("inf"),
    sample: int = SAMPLE,
    processes: int | None = None,
    parts: int = PARTS,
    validation: float = VALIDATION,
    name: str = "local",
) -> int:
    """Make a corpus, `output / local` for one.

    Args:
        output: the folder of the corpora.
        places: folders of packages; None: all installed ones.
        more: tables of documents (name, text), JSON lines in .xz, that come first.
        characters: of the corpus, at most.
        sample: characters that the tokenizer is trained on, spread over the documents.
        processes: that tokenise; None: one per core, up to `parts`.
        parts: shards of each split; which documents are held out depends on them.
        validation: share of the documents that are held out.
        name: "local"; "long": documents are then whole folders of sources; "tables": the documents of `more` alone,
            which makes the same corpus on every machine.

    Returns:
        Tokens to train on.
    """
    output.mkdir(parents=True, exist_ok=True)
    processes = processes or min(parts, len(os.sched_getaffinity(0)))
    if name == "tables":
        found: Iterable[Document] = documents_of(more, processes)
    else:
        found = sources(packages() if places is None else places, more)
    texts = list(selected(found, characters))
    if name == "long":
        texts = list(directories(texts))
    every = max(1, sum(len(document.text) for document in texts) // sample)
    with tempfile.TemporaryDirectory() as scratch:
        tables = []
        for part in range(parts):
            table = Path(scratch) / f"{part}.jsonl"
            lines = (json.dumps({"text": document.text}) + "\n" for document in texts[part::parts])
            table.write_text("".join(lines), encoding="utf-8")
            tables.append(table)
        tokenizer = output / f"{name}-tokenizer"
        train_tokenizer([document.text for document in texts[::every]], VOCAB_SIZE).save_pretrained(tokenizer)
        tokenised = partial(_tokenised, tokenizer=tokenizer.absolute(), validation=validation)
        if processes > 1:
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                made = pool.map(tokenised, tables, chunksize=1)
        else:
            made = [tokenised(table) for table in tables]
        _merge([Corpus.open(folder) for folder in made], output / name)
    return sum(len(shard) for shard in Corpus.open(output / name).tokens("train"))


def _tokenised(table: Path, tokenizer: Path, validation: float) -> Path:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder, before = table.with_suffix(""), Path.cwd()
    os.chdir(table.parent)  # what is held out is chosen by the name, which must be the same everywhere
    try:
        return _prepared(table, folder, tokenizer, validation)
    finally:
        os.chdir(before)


def _prepared(table: Path, folder: Path, tokenizer: Path, validation: float) -> Path:
    prepare([table.name], folder, vocab_size=VOCAB_SIZE, tokenizer=str(tokenizer), validation=validation)
    return folder


def _merge(parts: Sequence[Corpus], folder: Path) -> None:
    """Join corpora of one tokenizer: their shards stand one after another."""
    folder.mkdir()
    splits = {}
    for split in ("train", "validation"):
        lengths: list[int] = []
        starts: list[np.ndarray] = []
        for part in parts:
            tokens = np.concatenate(part.tokens(split)) if part.index["splits"][split]["tokens"] else None
            if tokens is None:
                continue
            tokens.tofile(folder / f"{split}-{len(lengths):05d}.bin")
            starts.append(np.asarray(part.document_starts(split)) + sum(lengths))
            lengths.append(len(tokens))
        np.save(folder / f"{split}-documents.npy", np.concatenate(starts))
        splits[split] = {"shards": lengths, "tokens": sum(lengths), "documents": sum(map(len, starts))}
    parts[0].tokenizer.save_pretrained(folder / "tokenizer")
    content = hashlib.sha256("".join(part.index["content"] for part in parts).encode()).hexdigest()
    index = {**parts[0].index, "splits": splits, "content": content, "skipped": []}
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the corpora")
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="tables of documents, .jsonl.xz")
    parser.add_argument(
        "--name", choices=("local", "long", "tables"), default="local", help="long: whole folders as documents"
    )
    parser.add_argument("--characters", type=float, default=float("inf"), help="of the corpus, at most")
    arguments = parser.parse_args()
    made = build(arguments.output, more=arguments.more, characters=arguments.characters, name=arguments.name)
    print(f"{made:,} tokens to train on")
