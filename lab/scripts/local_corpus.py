"""Make a corpus of the Python sources that a machine has: the standard library and installed packages.

    python lab/scripts/local_corpus.py CORPORA        # makes CORPORA/local, for DYNAMASK_CORPORA=CORPORA

It serves machines without a package registry. Tests, and sources that occur twice, are left out; the digest in every
result line tells one build from another.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dynamask.data import documents, prepare, train_tokenizer
from dynamask.data.sources import Document

PACKAGES = ("torch", "sympy", "numpy", "networkx", "triton", "setuptools", "pip")
VOCAB_SIZE = 4096
SAMPLE = 20_000_000
"""Characters that the tokenizer is trained on."""
SHORTEST, LONGEST = 400, 60_000
"""Characters of a document. What is longer is cut, so that no generated table fills the corpus."""
VALIDATION = 0.04


def sources(packages: Sequence[str]) -> Iterator[Document]:
    """The standard library, and of every installed package the Python files that are no tests."""
    yield from documents(["stdlib"], errors="skip")
    for name in packages:
        found = importlib.util.find_spec(name)
        for place in (found.submodule_search_locations or []) if found else []:
            root = Path(place)
            for file in sorted(root.rglob("*.py")):
                parts = file.relative_to(root).parts
                if not any("test" in part for part in parts):
                    for document in documents([str(file)], errors="skip"):
                        yield Document(f"{name}/{'/'.join(parts)}", document.text)


def selected(found: Iterator[Document]) -> Iterator[Document]:
    """Documents long enough, cut where they are too long, each text once."""
    seen: set[bytes] = set()
    for document in found:
        text = document.text[:LONGEST]
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) >= SHORTEST and digest not in seen:
            seen.add(digest)
            yield Document(document.name, text)


def build(output: Path, packages: Sequence[str] = PACKAGES, *, sample: int = SAMPLE) -> int:
    """Make `output / local`.

    Args:
        output: the folder of the corpora.
        packages: installed packages; those that are missing are left out.
        sample: characters that the tokenizer is trained on, spread over the documents.

    Returns:
        Tokens to train on.
    """
    output.mkdir(parents=True, exist_ok=True)
    texts = list(selected(sources(packages)))
    every = max(1, sum(len(document.text) for document in texts) // sample)
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "local.jsonl"
        table.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in texts), encoding="utf-8")
        tokenizer = output / "local-tokenizer"
        train_tokenizer([document.text for document in texts[::every]], VOCAB_SIZE).save_pretrained(tokenizer)
        made = prepare(
            [str(table)], output / "local", vocab_size=VOCAB_SIZE, tokenizer=str(tokenizer), validation=VALIDATION
        )
    return sum(len(shard) for shard in made.tokens("train"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the corpora")
    print(f"{build(parser.parse_args().output):,} tokens to train on")
