"""Tables of the sources in archives: what they hold, that no text comes twice, and how they fill folders."""

from __future__ import annotations

import importlib
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("archive_tables")
    finally:
        sys.path.remove(str(SCRIPTS))


def _source(name: str) -> str:
    words = [f"{name}{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    return "\n".join(" ".join(words[place : place + 8]) for place in range(0, len(words), 8)) + "\n"


def _archive(file: Path, contents: dict[str, str]) -> Path:
    with tarfile.open(file, "w:xz") as tree:
        for name, text in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tree.addfile(entry, io.BytesIO(text.encode()))
    return file


def test_tables_hold_sources_that_no_earlier_archive_has(script: ModuleType, tmp_path: Path) -> None:
    seen = script.Seen(tmp_path / "seen.bin")
    first = {"a/x.c": _source("x"), "a/y.py": _source("y"), "a/tests/z.c": _source("z"), "a/w.bin": _source("w")}
    second = {"b/x.c": _source("x"), "b/v.c": _source("v"), "b/digits.c": "1234567890 " * 100}
    assert script.make(_archive(tmp_path / "a_1.0.orig.tar.xz", first), tmp_path, seen) > 0
    assert script.make(_archive(tmp_path / "b_2.0-1.orig.tar.xz", second), tmp_path, seen) == len(_source("v"))
    assert script.Seen(tmp_path / "seen.bin").new(_source("v")) is False
    held = list(script.documents_of([tmp_path / "a-0.jsonl.bz2"]))
    assert [(each.name, each.text) for each in held] == [("a/x.c", _source("x")), ("a/y.py", _source("y"))]
    notes = script.notes(tmp_path)
    assert [(note["package"], note["version"], note["documents"]) for note in notes] == [
        ("a", "1.0", 2),
        ("b", "2.0-1", 1),
    ]


def test_tables_are_spread_over_folders_evenly(script: ModuleType) -> None:
    held = script.spread([("a", 5), ("b", 4), ("c", 3), ("d", 2)], 2, 7)
    assert [sorted(each) for each in held] == [["a", "d"], ["b", "c"]]
    with pytest.raises(SystemExit, match="do not fit"):
        script.spread([("a", 5), ("b", 4)], 2, 4)


def test_a_manifest_says_where_every_file_comes_from(script: ModuleType, tmp_path: Path) -> None:
    archive = _archive(tmp_path / "a_1.0.orig.tar.xz", {"a/x.c": _source("x")})
    script.make(archive, tmp_path, script.Seen(tmp_path / "seen.bin"))
    folder = tmp_path / "corpus-q"
    folder.mkdir()
    (folder / "a.orig.tar.xz").write_bytes(archive.read_bytes())
    (folder / "a-0.jsonl.bz2").write_bytes((tmp_path / "a-0.jsonl.bz2").read_bytes())
    (folder / "w").write_text("w")
    rows = script.described([folder], tmp_path, [archive])
    assert [(row["folder"], row["file"], row.get("archive")) for row in rows] == [
        ("q", "a-0.jsonl.bz2", "a_1.0.orig.tar.xz"),
        ("q", "a.orig.tar.xz", "a_1.0.orig.tar.xz"),
        ("q", "w", None),
    ]


def test_the_list_of_the_corpus_of_60M_has_the_digest_of_its_runs() -> None:
    listed = json.loads((SCRIPTS.parent / "data" / "corpus-1200M.json").read_text(encoding="utf-8"))
    assert listed["bytes"] == sum(row["bytes"] for row in listed["files"])
    assert set(listed["left_out"]) < {row["file"] for row in listed["files"]}
    for file in ("scratch-tables-60M", "scratch-choice-10M"):
        for line in (SCRIPTS.parent / "results" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
            result = json.loads(line)["result"]
            assert (result["corpus_content"], result["corpus_tokens"]) == (listed["content"], listed["train_tokens"])
