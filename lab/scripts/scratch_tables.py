"""Make tables of documents, JSON lines in .xz, that a machine without a registry reads as its corpus.

    python lab/scripts/scratch_tables.py PACKAGES TABLES --group linux --known .scratch/linux.jsonl.xz
    python lab/scripts/scratch_tables.py PACKAGES TABLES --group others
    python lab/scripts/scratch_tables.py SOURCES TABLES --group trees --like TABLES/*.jsonl.xz --level 1

PACKAGES holds Debian packages (`apt-get download`), SOURCES archives of source packages (`apt-get source
--download-only`). Every package gives at most its quota of characters: the files that come first by the hash of their
name, in the order of their path, which compresses best. Tests, tables of digits, near duplicates (of each other and of
the documents of `--like`, whose duplicates GROUP-duplicates.txt lists) and documents of `--known` are left out.
`local_corpus.py --more TABLES/*.jsonl.xz --only-more` or `packed_corpus.py` makes the corpus. The tables are under the
licences of the packages: make them where they are used, and do not pass them on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import multiprocessing
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from corpora import Package, files, texts
from local_corpus import LONGEST, SHORTEST, documents_of, looks_like_table

from dynamask.data import Document
from dynamask_lab.language.deduplicate import Deduplicator

TABLE = 64_000_000
"""Characters of a table."""
_LEFT_OUT = re.compile(r"test|/amd/include/|asic_reg|translations/|/po/|/ChangeLog", re.IGNORECASE)
_HTML = (".html",)
GROUPS: dict[str, dict[str, tuple[float, tuple[str, ...]]]] = {
    "linux": {"linux-source-6.1": (230e6, (".c", ".h", ".rst", ".txt"))},
    "others": {
        "openjdk-17-source": (65e6, (".java",)),
        "golang-1.19-src": (30e6, (".go",)),
        "rust-src": (35e6, (".rs", ".md")),
        "gcc-12-source": (60e6, (".c", ".h", ".cc", ".adb", ".ads", ".d", ".texi")),
        "gdb-source": (22e6, (".c", ".h", ".py", ".texinfo")),
        "glibc-source": (10e6, (".c", ".h", ".texi")),
        "libboost1.74-dev": (20e6, (".hpp",)),
        "dict-gcide": (12e6, (".dz",)),
        "anarchism": (5e6, _HTML),
        "postgresql-doc-15": (6e6, _HTML),
        "perl-doc": (6e6, (".pod",)),
        "python3.11-doc": (8e6, (".rst.txt",)),
        "rust-doc": (6e6, _HTML),
        "sqlite3-doc": (6e6, _HTML),
        "erlang-doc": (6e6, _HTML),
        "octave-doc": (4e6, _HTML),
        "libreoffice-help-en-us": (4e6, _HTML),
    },
    "trees": {
        "webkit2gtk": (65e6, (".cpp", ".h", ".js", ".idl")),
        "llvm-toolchain-15": (80e6, (".cpp", ".h", ".td", ".rst", ".c")),
        "wine": (60e6, (".c", ".h", ".idl")),
        "qemu": (40e6, (".c", ".h", ".rst", ".py")),
        "vtk9": (45e6, (".cxx", ".h", ".txx", ".py")),
        "samba": (45e6, (".c", ".h", ".idl", ".py")),
        "ffmpeg": (35e6, (".c", ".h", ".texi")),
        "mesa": (40e6, (".c", ".h", ".cpp", ".py")),
        "blender": (40e6, (".cc", ".c", ".h", ".hh", ".cpp", ".py")),
        "qtbase-opensource-src": (40e6, (".cpp", ".h", ".qdoc")),
        "postgresql-15": (25e6, (".c", ".h")),
        "emacs": (30e6, (".el", ".c", ".h", ".texi")),
        "php8.2": (18e6, (".c", ".h", ".php")),
        "gtk4": (15e6, (".c", ".h", ".md")),
        "ghc": (15e6, (".hs", ".rst")),
    },
}
"""Package -> characters at most, and the files taken."""


def kept(archive: Path, name: str, suffixes: tuple[str, ...], known: set[str], quota: float) -> Iterator[Document]:
    """The documents of a package, up to its quota, by path."""
    package = Package("apt", (name,), 1.0, suffixes)
    stream = ((path, content) for path, content in _members(archive) if not _LEFT_OUT.search(path))
    # "linux-source-6.1/linux-source-6.1/kernel/acct.c#0" is "linux/kernel/acct.c" in earlier tables.
    found = [
        document
        for document in texts(package, name, stream, LONGEST)
        if len(document.text) >= SHORTEST and not looks_like_table(document.text) and _short(document.name) not in known
    ]
    found.sort(key=lambda document: hashlib.sha256(document.name.encode()).digest())
    taken, chosen = 0, []
    for document in found:
        if taken >= quota:
            break
        taken += len(document.text)
        chosen.append(document)
    yield from sorted(chosen, key=lambda document: (Path(document.name).suffix[:2], document.name))


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file of a package, or of the archive of a source package."""
    if archive.suffix == ".deb":
        yield from files(archive)
        return
    with tarfile.open(archive, "r|*") as tree:
        for member in tree:
            stream = tree.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream.read()


def _archive(folder: Path, name: str) -> Path:
    """The file of a package, or of a source package."""
    return next(file for file in sorted(folder.glob(f"{name}_*")) if file.name.endswith((".deb", ".gz", ".xz", ".bz2")))


def text_digest(text: str) -> str:
    """What a document is known by in lists of duplicates."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _short(name: str) -> str:
    """A name without the folders of its package and the number of its part."""
    return "/".join(["linux", *name.partition("#")[0].split("/")[2:]])


def _kept(
    entry: tuple[str, tuple[float, tuple[str, ...]]], folder: Path, known: set[str], scale: float
) -> list[Document]:
    name, (quota, suffixes) = entry
    return list(kept(_archive(folder, name), name, suffixes, known, quota * scale))


def write(documents: Iterator[Document], folder: Path, group: str, level: int = 8) -> int:
    """Write the documents as tables of `TABLE` characters; returns the characters."""
    total, table = 0, -1
    with ExitStack() as stack:
        for document in documents:
            if total // TABLE != table:
                stack.close()
                table = total // TABLE
                file = stack.enter_context(open(folder / f"{group}-{table}.jsonl.xz", "wb"))
                pipe = stack.enter_context(
                    subprocess.Popen(["xz", f"-{level}", "-T1"], stdin=subprocess.PIPE, stdout=file, bufsize=1 << 20)
                )
                assert pipe.stdin is not None
            line = json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False)
            pipe.stdin.write(line.encode("utf-8", "replace") + b"\n")
            total += len(document.text)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the packages")
    parser.add_argument("tables", type=Path, help="folder of the tables")
    parser.add_argument("--group", choices=list(GROUPS), required=True)
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="tables whose documents are left out")
    parser.add_argument("--like", type=Path, nargs="*", default=[], help="tables whose near duplicates are left out")
    parser.add_argument("--level", type=int, default=8, help="of compression")
    parser.add_argument("--jobs", type=int, default=1, help="packages read at a time")
    parser.add_argument("--scale", type=float, default=1.0, help="of the quotas")
    arguments = parser.parse_args()
    known = set()
    for table in arguments.known:
        with lzma.open(table, "rt", encoding="utf-8") as lines:
            known |= {json.loads(line)["name"] for line in lines}
    arguments.tables.mkdir(parents=True, exist_ok=True)
    seen = Deduplicator()

    packages = GROUPS[arguments.group]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        each = partial(_kept, folder=arguments.packages, known=known, scale=arguments.scale)
        found = pool.imap(each, packages.items())
        twice = [text_digest(each.text) for each in documents_of(arguments.like) if not seen.is_new(each.text)]
        if arguments.like:
            (arguments.tables / f"{arguments.group}-duplicates.txt").write_text("\n".join(twice), encoding="utf-8")

        def every() -> Iterator[Document]:
            for name, documents in zip(packages, found, strict=True):
                count, before = 0, seen.near + seen.exact
                for document in documents:
                    if seen.is_new(document.text):
                        count += len(document.text)
                        yield document
                print(
                    f"{name}: {count / 1e6:.1f}M characters, {seen.near + seen.exact - before} duplicates", flush=True
                )

        characters = write(every(), arguments.tables, arguments.group, arguments.level)
    print(f"{characters:,} characters", file=sys.stderr)


if __name__ == "__main__":
    main()
