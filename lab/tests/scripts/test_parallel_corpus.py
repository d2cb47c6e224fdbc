"""Corpora made in parts: what is kept, what is held out, and that no text is in two splits."""

from __future__ import annotations

import bz2
import gzip
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


def _tar(contents: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tree:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tree.addfile(entry, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.parametrize("name", ["parallel_corpus", "archive_tables"])
def test_an_archive_of_several_streams_is_read_whole(name: str, script: ModuleType, tmp_path: Path) -> None:
    """As pbzip2 packs them: `tarfile` reads a stream and fails where the next begins."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        reader = importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))
    texts = {f"a/{place}.c": prose(place, 2000).encode() for place in range(4)}
    content = _tar(texts)
    archive = tmp_path / "a_1.0.orig.tar.bz2"
    archive.write_bytes(b"".join(bz2.compress(content[place : place + 9000]) for place in range(0, len(content), 9000)))
    with pytest.raises(EOFError), tarfile.open(archive, "r|*") as tree:
        list(tree)
    assert [found.text.encode() for found in reader.read_archive(archive)] == [*texts.values()]


@pytest.mark.parametrize("packing", ["bz2", "gz", "xz"])
def test_the_rest_of_a_damaged_archive_is_left_out_by_name(
    packing: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = {"bz2": bz2.compress, "gz": gzip.compress, "xz": lzma.compress}[packing]
    chooser = random.Random(0)
    texts = [" ".join(f"word{chooser.random()}" for _ in range(40_000)).encode() for _ in range(6)]
    content = pack(_tar({f"a/{place}.c": text for place, text in enumerate(texts)}))
    whole, cut = tmp_path / f"whole.orig.tar.{packing}", tmp_path / f"cut.orig.tar.{packing}"
    whole.write_bytes(content)
    cut.write_bytes(content[: len(content) // 2])
    assert [name for name, _ in script.texts_of(whole, lambda _: True)] == [f"a/{place}.c" for place in range(6)]
    assert capsys.readouterr().err == ""
    found = [text.encode() for _, text in script.texts_of(cut, lambda _: True)]
    assert 1 <= len(found) < 6
    assert found == texts[: len(found)]
    assert capsys.readouterr().err.startswith(f"cut.orig.tar.{packing}: left out behind {len(found)} files: ")
    with pytest.raises(FileNotFoundError):
        list(script.texts_of(tmp_path / "none.orig.tar", lambda _: True))
