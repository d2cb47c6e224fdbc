"""Make a large corpus in a minute on a machine of many cores: parts as their files arrive, then one corpus of them.

    python lab/scripts/parallel_corpus.py part CHUNKS b --tables b/*.jsonl.xz --tokenizer TOKENIZER
    python lab/scripts/parallel_corpus.py part CHUNKS e --archives e/*.orig.tar.xz --tokenizer TOKENIZER
    python lab/scripts/parallel_corpus.py part CHUNKS local --installed --tokenizer TOKENIZER
    python lab/scripts/parallel_corpus.py join CHUNKS CORPORA/tables-400M b e local --tokenizer TOKENIZER

`part` reads tables of documents (`scratch_tables.py`), archives of source packages (`apt-get source --download-only`)
or the sources that a machine has (`local_corpus.py`), and computes tokens and signatures, chunk by chunk. `join` leaves
out near duplicates, in the order of the names given, and writes train and held-out documents. Which documents are held
out is decided by their text, and their order is that of a hash: validation and test split are drawn alike. Corpora are
under the licences of their packages: make them where they are used, and do not pass them on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from corpora import reads_like_language
from local_corpus import (
    HEADER_SUFFIXES,
    HEADERS,
    LONGEST,
    SHORTEST,
    _files,
    documents_of,
    looks_like_table,
    packages,
    texts_of,
)
from scratch_tables import _LEFT_OUT
from tokenizers import Tokenizer

from dynamask.data import documents
from dynamask.data.sources import Document
from dynamask_lab.language.deduplicate import Deduplicator

HELD_OUT = 0.01
CHUNK = 4_000_000
"""Characters that a process tokenises at a time."""
SUFFIXES = (".c", ".h", ".cc", ".hh", ".cpp", ".cxx", ".hxx", ".txx", ".idl", ".py", ".rst", ".texi")
"""Files that are taken of an archive."""
_OPENING = 4000
"""Characters by which a file of an archive is judged."""


def read_archive(archive: Path) -> Iterator[Document]:
    """The sources in an archive of a source package, without tests, that read like a language."""

    def wanted(name: str) -> bool:
        return name.endswith(SUFFIXES) and not _LEFT_OUT.search(name)

    for name, text in texts_of(archive, wanted):
        if reads_like_language(text[:_OPENING]):
            yield Document(f"{archive.name}/{name}", text)


def _read(unit: tuple[str, str], scratch: Path) -> list[str]:
    """Read one source, and write its documents in chunks; returns their files."""
    kind, place = unit
    path = Path(place)
    found: Iterable[Document]
    if kind == "table":
        found = documents_of([path])
    elif kind == "archive":
        found = read_archive(path)
    elif kind == "stdlib":
        found = documents(["stdlib"], errors="skip")
    else:
        found = _files(path, (".py", ".pyi") if kind == "python" else HEADER_SUFFIXES)
    files: list[str] = []
    held: list[str] = []
    size = 0

    def write() -> None:
        name = hashlib.sha256(f"{unit}{len(files)}".encode()).hexdigest()[:24]
        (scratch / f"{name}.json").write_text(json.dumps(held), encoding="utf-8")
        files.append(name)

    for document in found:
        text = document.text[:LONGEST]
        if len(text) < SHORTEST or looks_like_table(text):
            continue
        held.append(text)
        size += len(text)
        if size >= CHUNK:
            write()
            held, size = [], 0
    if held:
        write()
    return files


_tokenizers: dict[str, Tokenizer] = {}


def encoder(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, that takes special tokens that are spelled out for text; loaded once a process."""
    if str(folder) not in _tokenizers:
        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        made.encode_special_tokens = True
        _tokenizers[str(folder)] = made
    return _tokenizers[str(folder)]


def end_of(folder: Path) -> int:
    """The token that ends a document."""
    return int(encoder(folder).token_to_id(json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]))


def _tokenise(name: str, scratch: Path, tokenizer: Path) -> str:
    """Tokens, digests and signatures of a chunk's documents."""
    file = scratch / f"{name}.json"
    texts = json.loads(file.read_text(encoding="utf-8"))
    look = Deduplicator().look
    seen = [look(text) for text in texts]
    end = end_of(tokenizer)
    encoded = [np.asarray([*each.ids, end], dtype=np.uint16) for each in _encoded(encoder(tokenizer), texts)]
    np.savez(
        scratch / f"{name}.partial.npz",
        tokens=np.concatenate(encoded),
        lengths=np.asarray([len(each) for each in encoded]),
        digests=np.frombuffer(b"".join(digest for digest, _ in seen), dtype=np.uint8).reshape(-1, 16),
        signatures=np.stack([signature for _, signature in seen]),
        texts=np.frombuffer(b"".join(_digest(text) for text in texts), dtype=np.uint8).reshape(-1, 32),
    )
    os.replace(scratch / f"{name}.partial.npz", scratch / f"{name}.npz")
    file.unlink()
    return name


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list:
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    return encode(texts, add_special_tokens=False)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def part(scratch: Path, name: str, units: Sequence[tuple[str, str]], tokenizer: Path, processes: int) -> int:
    """Read and tokenise sources, several at a time; returns the number of chunks.

    Args:
        scratch: folder of the chunks.
        name: of the list of chunks, in the order of the sources.
        units: ("table", file), ("archive", file), ("python" or "headers", folder) or ("stdlib", "").
        tokenizer: folder of the tokenizer.
        processes: that read and tokenise.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenise = partial(_tokenise, scratch=scratch, tokenizer=tokenizer)
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        read = [pool.apply_async(_read, (unit, scratch)) for unit in units]
        made: list[list] = [[] for _ in units]
        waiting = set(range(len(units)))
        while waiting:
            for place in [place for place in waiting if read[place].ready()]:
                made[place] = [pool.apply_async(tokenise, (chunk,)) for chunk in read[place].get()]
                waiting.remove(place)
            time.sleep(0.02)
        names = [chunk.get() for chunks in made for chunk in chunks]
    partial_file = scratch / f"{name}.partial"
    partial_file.write_text("\n".join(names), encoding="utf-8")
    partial_file.rename(scratch / f"{name}.part")
    return len(names)


def join(
    scratch: Path, folder: Path, names: Sequence[str], tokenizer: Path, share: float = HELD_OUT, most: float = 1e12
) -> int:
    """Make one corpus of parts, without near duplicates; waits for the parts.

    Args:
        scratch: folder of the chunks.
        folder: of the corpus.
        names: of the parts. Of documents that are nearly alike the first one stays.
        tokenizer: folder of the tokenizer.
        share: of the documents that are held out.
        most: tokens to train on; what comes after them is left out.

    Returns:
        Tokens to train on.
    """
    partial_folder = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial_folder.mkdir(parents=True)
    seen, held, total = Deduplicator(), [], 0
    starts: list[np.ndarray] = []
    digest = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes())
    with open(partial_folder / "train-00000.bin", "wb") as file:
        for chunk in _chunks(scratch, names):
            lengths, tokens = chunk["lengths"], chunk["tokens"]
            looks = zip(chunk["digests"], chunk["signatures"], strict=True)
            new = np.fromiter((seen.admits(bytes(own), signature) for own, signature in looks), dtype=bool)
            texts = chunk["texts"]
            out = texts[:, :4].copy().view(">u4")[:, 0] < share * 2**32
            begins = np.cumsum(lengths) - lengths
            for place in np.flatnonzero(new & out):
                held.append((bytes(texts[place]), tokens[begins[place] : begins[place] + lengths[place]]))
            kept = new & ~out
            taken = tokens[np.repeat(kept, lengths)]
            file.write(taken.tobytes())
            digest.update(taken.tobytes())
            starts.append(total + np.cumsum(lengths[kept]) - lengths[kept])
            total += len(taken)
            if total >= most:
                break
    held.sort(key=lambda pair: pair[0])
    validation = np.concatenate([tokens for _, tokens in held])
    validation.tofile(partial_folder / "validation-00000.bin")
    digest.update(validation.tobytes())
    sizes = np.asarray([len(tokens) for _, tokens in held])
    np.save(partial_folder / "train-documents.npy", np.concatenate(starts))
    np.save(partial_folder / "validation-documents.npy", np.cumsum(sizes) - sizes)
    shutil.copytree(tokenizer, partial_folder / "tokenizer")
    splits = {
        "train": {"shards": [total], "tokens": total, "documents": sum(map(len, starts))},
        "validation": {"shards": [len(validation)], "tokens": len(validation), "documents": len(held)},
    }
    index = {
        "dtype": "uint16",
        "splits": splits,
        "block": 1,
        "fingerprint": "parallel",
        "content": digest.hexdigest(),
        "skipped": [],
    }
    (partial_folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    partial_folder.rename(folder)
    print(f"{seen.exact} duplicates, {seen.near} near duplicates left out; {json.dumps(splits)}", flush=True)
    return total


def _chunks(scratch: Path, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The chunks of parts, in order, each part as soon as it is there."""
    for name in names:
        file = scratch / f"{name}.part"
        while not file.exists():
            time.sleep(0.05)
        for chunk in file.read_text(encoding="utf-8").split():
            with np.load(scratch / f"{chunk}.npz") as arrays:
                yield {key: arrays[key] for key in arrays.files}


def installed_units() -> list[tuple[str, str]]:
    """The sources that a machine has, the largest folders first in the order of their names."""
    places = packages()
    units = [("python", str(place)) for place in places]
    units += [("headers", str(place)) for place in [*places, *map(Path, HEADERS)]]
    return [("stdlib", ""), *units]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    each = commands.add_parser("part", help="read and tokenise")
    each.add_argument("chunks", type=Path)
    each.add_argument("name")
    each.add_argument("--tables", type=Path, nargs="*", default=[])
    each.add_argument("--archives", type=Path, nargs="*", default=[])
    each.add_argument("--installed", action="store_true", help="the sources that this machine has")
    each.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    joining = commands.add_parser("join", help="make a corpus of parts")
    joining.add_argument("chunks", type=Path)
    joining.add_argument("corpus", type=Path)
    joining.add_argument("names", nargs="+")
    joining.add_argument("--held-out", type=float, default=HELD_OUT)
    joining.add_argument("--most", type=float, default=1e12, help="tokens to train on")
    for command in (each, joining):
        command.add_argument("--tokenizer", type=Path, required=True)
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.command == "part":
        units = [("archive", str(file)) for file in sorted(arguments.archives)]
        units += [("table", str(file)) for file in sorted(arguments.tables)]
        units += installed_units() if arguments.installed else []
        count = part(arguments.chunks, arguments.name, units, arguments.tokenizer, arguments.processes)
        print(f"{arguments.name}: {count} chunks, {time.monotonic() - began:.1f} s", flush=True)
    else:
        total = join(
            arguments.chunks,
            arguments.corpus,
            arguments.names,
            arguments.tokenizer,
            arguments.held_out,
            arguments.most,
        )
        print(f"{total:,} tokens to train on, {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
