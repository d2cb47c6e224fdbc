"""Make tables of documents of the sources in archives of source packages, compressed so that they travel well.

    python lab/scripts/archive_tables.py TABLES webkit2gtk_2.50.6.orig.tar.xz ... --known OTHER/*.jsonl.xz
    python lab/scripts/archive_tables.py TABLES --spread FOLDER-a FOLDER-b ... --most 37.5e6
    python lab/scripts/archive_tables.py TABLES ARCHIVES... --manifest corpus-1200M.json --folders FOLDER-a FOLDER-b ...

Archives are those of `apt-get source --download-only`. A table holds up to 64 million characters: the sources of an
archive in the order of their suffix and path, without tests, tables of digits and texts that an earlier archive or a
table in `--known` has. They are packed by bzip2, which a core does several times as fast as xz of the same size. Every
table has a note beside it. The manifest says of every file in the folders that travel where it comes from. Near
duplicates are left out where the corpus is made (`parallel_corpus.py`). The tables are under the licences of the
packages: make them where they are used, and do not pass them on.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from corpora import reads_like_language
from local_corpus import LONGEST, SHORTEST, documents_of, looks_like_table, texts_of
from scratch_tables import _LEFT_OUT, TABLE

from dynamask.data.sources import Document

SUFFIXES = (
    *(".c", ".h", ".cc", ".hh", ".cpp", ".cxx", ".hpp", ".hxx", ".txx", ".idl", ".inl", ".m", ".mm", ".cu", ".cl"),
    *(".py", ".pyx", ".rst", ".texi", ".md", ".java", ".scala", ".kt", ".go", ".rs", ".hs", ".ml", ".mli", ".el"),
    *(".lisp", ".scm", ".erl", ".ex", ".js", ".ts", ".php", ".f", ".f90", ".F90", ".pl", ".pm", ".rb", ".cs", ".vb"),
    *(".lua", ".swift", ".adb", ".ads", ".d", ".td", ".qml", ".vala", ".tcl", ".sh", ".cmake", ".S", ".dts", ".dtsi"),
    *(".sql", ".proto", ".jl", ".R", ".pas", ".glsl"),
)
"""Files that are taken of an archive."""
_LEFT_OUT_TOO = re.compile(r"(^|/)(locale|i18n|l10n)/|\.min\.js$", re.IGNORECASE)
_OPENING = 4000
"""Characters by which a file is judged."""


def read_archive(archive: Path) -> Iterator[Document]:
    """The sources in an archive that are no tests and read like a language, cut where they are too long."""

    def wanted(name: str) -> bool:
        return name.endswith(SUFFIXES) and not _LEFT_OUT.search(name) and not _LEFT_OUT_TOO.search(name)

    for name, whole in texts_of(archive, wanted):
        text = whole[:LONGEST]
        if len(text) >= SHORTEST and not looks_like_table(text) and reads_like_language(text[:_OPENING]):
            yield Document(name, text)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[:16]


class Seen:
    """Digests of the texts that tables hold, kept in a file beside the tables."""

    def __init__(self, file: Path) -> None:
        self._file = file
        content = file.read_bytes() if file.exists() else b""
        self._digests = {content[place : place + 16] for place in range(0, len(content), 16)}

    def new(self, text: str) -> bool:
        """Whether no earlier text was the same; if so it is remembered."""
        digest = _digest(text)
        if digest in self._digests:
            return False
        self._digests.add(digest)
        return True

    def save(self) -> None:
        """Write the digests to the file."""
        self._file.write_bytes(b"".join(sorted(self._digests)))


def make(archive: Path, tables: Path, seen: Seen) -> int:
    """Write the tables of an archive, and a note for each; returns the characters."""
    package, _, version = archive.name.partition("_")
    version = re.split(r"\.orig", version)[0]
    found = [document for document in read_archive(archive) if seen.new(document.text)]
    found.sort(key=lambda document: (Path(document.name).suffix[:2], document.name))
    source = {"package": package, "version": version, "archive": archive.name, "archive_sha256": _file_digest(archive)}
    total, held, size, number = 0, [], 0, 0

    def write() -> None:
        lines = (json.dumps({"name": each.name, "text": each.text}, ensure_ascii=False) + "\n" for each in held)
        content = "".join(lines).encode("utf-8", "replace")
        file = tables / f"{package}-{number}.jsonl.bz2"
        file.write_bytes(bz2.compress(content, 9))
        note = source | {"table": file.name, "documents": len(held), "characters": size}
        note |= {"bytes": file.stat().st_size, "sha256": _file_digest(file)}
        (tables / f"{package}-{number}.json").write_text(json.dumps(note) + "\n", encoding="utf-8")

    for document in found:
        held.append(document)
        size += len(document.text)
        if size >= TABLE:
            write()
            total, held, size, number = total + size, [], 0, number + 1
    if held:
        write()
    seen.save()
    return total + size


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def notes(tables: Path) -> list[dict]:
    """The notes of all tables, by name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(tables.glob("*-*.json"))]


def spread(sizes: Sequence[tuple[str, int]], folders: int, most: float) -> list[list[str]]:
    """Tables into folders of at most `most` bytes each, the largest first, each into the emptiest folder.

    Raises:
        SystemExit: they do not fit.
    """
    held: list[list[str]] = [[] for _ in range(folders)]
    filled = [0] * folders
    for name, size in sorted(sizes, key=lambda pair: -pair[1]):
        place = filled.index(min(filled))
        filled[place] += size
        held[place].append(name)
    if max(filled) > most:
        raise SystemExit(f"{sum(filled):,} bytes do not fit into {folders} folders of {most:,.0f}: {filled}")
    return held


def described(folders: Sequence[Path], tables: Path, archives: Sequence[Path]) -> list[dict]:
    """Every file in folders with its size and digest, and what is known of it: the note of a table, or its archive."""
    origin = {note["sha256"]: note for note in notes(tables)}
    for archive in archives:
        package, _, version = archive.name.partition("_")
        source = {"package": package, "version": re.split(r"\.orig", version)[0], "archive": archive.name}
        origin[_file_digest(archive)] = source
    rows = []
    for folder in folders:
        for file in sorted(each for each in folder.rglob("*") if each.is_file()):
            row = {"folder": folder.name.rpartition("-")[2], "file": file.name, "bytes": file.stat().st_size}
            row["sha256"] = _file_digest(file)
            rows.append({**row, **origin.get(row["sha256"], {})})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, help="folder of the tables")
    parser.add_argument("archives", type=Path, nargs="*", help="of source packages")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="tables whose texts are left out")
    parser.add_argument("--spread", type=Path, nargs="*", default=[], help="copy the tables into these folders")
    parser.add_argument("--most", type=float, default=37.5e6, help="bytes of such a folder")
    parser.add_argument("--manifest", type=Path, help="describe the files in `--folders` here")
    parser.add_argument("--folders", type=Path, nargs="*", default=[], help="folders that travel")
    arguments = parser.parse_args()
    arguments.tables.mkdir(parents=True, exist_ok=True)
    seen = Seen(arguments.tables / "seen.bin")
    for table in arguments.known:
        for document in documents_of([table]):
            seen.new(document.text[:LONGEST])
    if arguments.known:
        seen.save()
    for archive in [] if arguments.manifest else arguments.archives:
        package = archive.name.partition("_")[0]
        if not list(arguments.tables.glob(f"{package}-[0-9]*.json")):
            print(f"{archive.name}: {make(archive, arguments.tables, seen) / 1e6:.1f}M characters", flush=True)
    if arguments.spread:
        sizes = [(note["table"], note["bytes"]) for note in notes(arguments.tables)]
        held = spread(sizes, len(arguments.spread), arguments.most)
        for folder, names in zip(arguments.spread, held, strict=True):
            folder.mkdir(exist_ok=True)
            for name in names:
                shutil.copy(arguments.tables / name, folder)
    if arguments.manifest:
        rows = described(arguments.folders, arguments.tables, arguments.archives)
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        total = sum(row["bytes"] for row in rows)
        arguments.manifest.write_text(f'{{"bytes": {total}, "files": [\n  {lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
