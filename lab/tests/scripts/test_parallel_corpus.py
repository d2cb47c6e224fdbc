"""Corpora made in parts: what is kept, what is held out, and that no text is in two splits."""

from __future__ import annotations

import importlib
import io
import json
import lzma
import random
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dynamask.data import Corpus, train_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("parallel_corpus")
    finally:
        sys.path.remove(str(SCRIPTS))


def prose(seed: int, words: int = 200) -> str:
    chooser = random.Random(seed)
    return " ".join("".join(chooser.choice("abcdefghij") for _ in range(5)) for _ in range(words)).replace(" b", "\nb")


def test_a_corpus_of_parts_has_no_near_duplicates_and_separate_splits(script: ModuleType, tmp_path: Path) -> None:
    texts = [prose(seed) for seed in range(40)]
    table = tmp_path / "a.jsonl.xz"
    lines = [json.dumps({"name": str(place), "text": text}) for place, text in enumerate([*texts, texts[3] + " more"])]
    table.write_bytes(lzma.compress("\n".join(lines).encode()))
    archive = tmp_path / "b.orig.tar.xz"
    with tarfile.open(archive, "w:xz") as tree:
        for name, text in {
            "b/x.c": prose(99),
            "b/y.c": texts[5],
            "b/tests/z.c": prose(98),
            "b/w.bin": prose(97),
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tree.addfile(entry, io.BytesIO(text.encode()))
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer(texts, 300).save_pretrained(tokenizer)
    chunks = tmp_path / "chunks"
    script.part(chunks, "one", [("table", str(table))], tokenizer, 1)
    script.part(chunks, "two", [("archive", str(archive))], tokenizer, 1)
    total = script.join(chunks, tmp_path / "corpus", ["one", "two"], tokenizer, share=0.3)

    corpus = Corpus.open(tmp_path / "corpus")
    found: dict[str, list[str]] = {}
    for split in ("train", "validation"):
        tokens = np.concatenate(corpus.tokens(split))
        parts = np.split(tokens, corpus.document_starts(split)[1:])
        assert all(part[-1] == corpus.tokenizer.eos_token_id for part in parts)
        found[split] = [corpus.tokenizer.decode(part[:-1]) for part in parts]
    assert sorted(found["train"] + found["validation"]) == sorted([*texts, prose(99)])
    assert not set(found["train"]) & set(found["validation"])
    assert 4 < len(found["validation"]) < 25
    assert total == corpus.index["splits"]["train"]["tokens"]
