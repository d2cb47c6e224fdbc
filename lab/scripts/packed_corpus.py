"""Make a corpus of tables of documents, pack it as compressed tokens, and unpack it on another machine in seconds.

    python lab/scripts/packed_corpus.py make CORPORA/tables-400M TABLES/*.jsonl.xz    # tokens, minutes
    python lab/scripts/packed_corpus.py pack CORPORA/tables-400M PACKED               # shards as .xz
    python lab/scripts/packed_corpus.py unpack PACKED CORPORA/tables-400M             # the same bytes, as one shard

`local_corpus.py` carries text and tokenises it where it is used. This script tokenises ahead, so that a machine that is
lent for minutes only decompresses. Documents of a table stay side by side, which compresses best. Which documents are
held out is decided by their text; their order is that of a hash, so validation and test split are drawn alike. The
packed files are under the licences of the packages: make them where they are used, and do not pass them on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from local_corpus import LONGEST, SAMPLE, SHORTEST, VOCAB_SIZE, documents_of, looks_like_table
from scratch_tables import text_digest

from dynamask.data import Corpus, train_tokenizer
from dynamask.data.tokenizer import load_tokenizer

HELD_OUT = 0.01
_BATCH = 500
_COMPRESSION = "--lzma2=preset=6,dict=64MiB,lp=1,pb=1,lc=3"
"""Of 16-bit numbers."""


def held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the validation and test splits."""
    return int(text_digest(text)[:8], 16) < share * 2**32


def make(
    tables: Sequence[Path],
    folder: Path,
    share: float = HELD_OUT,
    processes: int = 1,
    without: frozenset[str] = frozenset(),
) -> int:
    """Tokenise tables into a corpus, a shard per table.

    Args:
        tables: of documents, .jsonl.xz.
        folder: of the corpus; it is made.
        share: of the documents that are held out.
        processes: that tokenise, a table each.
        without: digests of documents that are left out.

    Returns:
        Tokens to train on.
    """
    folder.mkdir(parents=True)
    ordered = sorted(tables, key=lambda table: table.name)
    tokenizer = train_tokenizer(_sample(ordered), VOCAB_SIZE)
    tokenizer.save_pretrained(folder / "tokenizer")
    work = partial(_tokenised, folder=folder, share=share, without=without)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        made = list(pool.imap(work, enumerate(ordered), chunksize=1))
    held = sorted((pair for _, _, pairs in made for pair in pairs), key=lambda pair: pair[0])
    lengths = [length for length, _, _ in made]
    validation = np.concatenate([tokens for _, tokens in held])
    validation.tofile(folder / "validation-00000.bin")
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for part in [*(part for _, part, _ in made), validation.tobytes()]:
        digest.update(hashlib.sha256(part).digest())
    _write_index(folder, lengths, [len(validation)], int(tokenizer.eos_token_id), digest.hexdigest())
    return sum(lengths)


def _sample(tables: Sequence[Path], characters: int = SAMPLE) -> Iterable[str]:
    """Documents of every table, as many characters in all as the tokenizer is trained on, all alike far apart."""
    size = sum(table.stat().st_size for table in tables)
    # About as many characters as an .xz table has bytes, times eight.
    every = max(1, 8 * size // characters)
    return [document.text for place, document in enumerate(documents_of(tables)) if place % every == 0]


def _tokenised(
    entry: tuple[int, Path], folder: Path, share: float, without: frozenset[str]
) -> tuple[int, bytes, list[tuple[str, np.ndarray]]]:
    """Write the shard of a table; returns its length, its digest, and the documents that are held out."""
    number, table = entry
    tokenizer = load_tokenizer(folder / "tokenizer")
    end = tokenizer.eos_token_id
    texts = [each.text[:LONGEST] for each in documents_of([table]) if text_digest(each.text) not in without]
    texts = [text for text in texts if len(text) >= SHORTEST and not looks_like_table(text)]
    digest, length = hashlib.sha256(), 0
    held: list[tuple[str, np.ndarray]] = []
    with open(folder / f"train-{number:05d}.bin", "wb") as file:
        for start in range(0, len(texts), _BATCH):
            part = texts[start : start + _BATCH]
            encoded = tokenizer(part, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            for text, ids in zip(part, encoded, strict=True):
                tokens = np.asarray([*ids, end], dtype=np.uint16)
                if held_out(text, share):
                    held.append((text_digest(text), tokens))
                else:
                    file.write(tokens.tobytes())
                    digest.update(tokens.tobytes())
                    length += len(tokens)
    return length, digest.digest(), held


def _write_index(folder: Path, train: list[int], validation: list[int], end: int, content: str) -> None:
    splits = {}
    for split, lengths in (("train", train), ("validation", validation)):
        files = [folder / f"{split}-{number:05d}.bin" for number in range(len(lengths))]
        tokens = np.concatenate([np.fromfile(file, dtype=np.uint16) for file in files])
        ends = np.flatnonzero(tokens == end)
        np.save(folder / f"{split}-documents.npy", np.append(0, ends[:-1] + 1))
        splits[split] = {"shards": lengths, "tokens": len(tokens), "documents": len(ends)}
    index = {"dtype": "uint16", "splits": splits, "block": 1, "fingerprint": "packed", "content": content, "end": end}
    (folder / "index.json").write_text(json.dumps(index | {"skipped": []}, indent=1), encoding="utf-8")


def pack(corpus: Path, folder: Path, processes: int = 1) -> int:
    """Compress the shards of a corpus of 16-bit tokens; returns the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    Corpus.open(corpus)
    shutil.copytree(corpus / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    for name in ("index.json", "validation-documents.npy"):
        shutil.copy(corpus / name, folder / name)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(partial(_compressed, folder=folder), sorted(corpus.glob("*.bin")), chunksize=1)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _compressed(shard: Path, folder: Path) -> None:
    target = folder / f"{shard.name}.xz"
    if not target.exists():
        partial_file = target.with_suffix(".partial")
        with open(partial_file, "wb") as file:
            subprocess.run(["xz", "-T1", _COMPRESSION, "-c", str(shard)], stdout=file, check=True)
        partial_file.rename(target)


def unpack(folders: Sequence[Path], corpus: Path, processes: int | None = None) -> int:
    """Decompress a packed corpus that may be spread over folders; returns the tokens to train on.

    Raises:
        FileNotFoundError: a shard is in none of the folders.
    """
    first = next(folder for folder in folders if (folder / "index.json").exists())
    index = json.loads((first / "index.json").read_text(encoding="utf-8"))
    partial_folder = corpus.with_name(f".{corpus.name}.partial-{os.getpid()}")
    partial_folder.mkdir(parents=True)
    shutil.copytree(first / "tokenizer", partial_folder / "tokenizer")
    shutil.copy(first / "validation-documents.npy", partial_folder)
    jobs = []
    for split in ("train", "validation"):
        target, place = partial_folder / f"{split}-00000.bin", 0
        lengths = index["splits"][split]["shards"]
        with open(target, "wb") as file:
            file.truncate(2 * sum(lengths))
        for number, length in enumerate(lengths):
            name = f"{split}-{number:05d}.bin.xz"
            found = [folder / name for folder in folders if (folder / name).exists()]
            if not found:
                raise FileNotFoundError(f"no folder holds {name}")
            jobs.append((found[0], target, 2 * place, 2 * length))
            place += length
        index["splits"][split]["shards"] = [place]
    with multiprocessing.get_context("spawn").Pool(processes or min(len(jobs), os.cpu_count() or 1)) as pool:
        starts = pool.map(partial(_decompressed, end=index.get("end")), jobs, chunksize=1)
    train = [found for found, job in zip(starts, jobs, strict=True) if job[1].name.startswith("train")]
    np.save(partial_folder / "train-documents.npy", _starts(train))
    (partial_folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    partial_folder.rename(corpus)
    return int(index["splits"]["train"]["tokens"])


def _starts(ends: Sequence[np.ndarray]) -> np.ndarray:
    """Where documents start, by where documents end."""
    return np.append(0, np.concatenate(ends)[:-1] + 1)


def _decompressed(job: tuple[Path, Path, int, int], end: int | None) -> np.ndarray:
    packed, target, place, size = job
    content = subprocess.run(["xz", "-dc", str(packed)], capture_output=True, check=True).stdout
    if len(content) != size:
        raise ValueError(f"{packed} holds {len(content)} bytes instead of {size}")
    with open(target, "r+b") as file:
        file.seek(place)
        file.write(content)
    return place // 2 + np.flatnonzero(np.frombuffer(content, dtype=np.uint16) == end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("corpus", type=Path)
    making.add_argument("tables", type=Path, nargs="+")
    making.add_argument("--held-out", type=float, default=HELD_OUT)
    making.add_argument("--without", type=Path, nargs="*", default=[], help="lists of digests of documents, .txt")
    packing = commands.add_parser("pack")
    packing.add_argument("corpus", type=Path)
    packing.add_argument("packed", type=Path)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("packed", type=Path, nargs="+")
    unpacking.add_argument("corpus", type=Path)
    for each in (making, packing, unpacking):
        each.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    if arguments.command == "make":
        without = frozenset(line for file in arguments.without for line in file.read_text(encoding="utf-8").split())
        made = make(arguments.tables, arguments.corpus, arguments.held_out, arguments.processes or 1, without)
        print(f"{made:,} tokens to train on")
    elif arguments.command == "pack":
        print(f"{pack(arguments.corpus, arguments.packed, arguments.processes or 1):,} bytes")
    else:
        print(f"{unpack(arguments.packed, arguments.corpus, arguments.processes):,} tokens to train on", flush=True)


if __name__ == "__main__":
    main()
