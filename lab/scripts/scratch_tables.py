"""Make tables of documents, JSON lines in .xz, that a machine without a registry reads as its corpus.

    python lab/scripts/scratch_tables.py PACKAGES TABLES --group linux --known .scratch/linux.jsonl.xz
    python lab/scripts/scratch_tables.py PACKAGES TABLES --group others

PACKAGES holds Debian packages (`apt-get download`). Every package gives at most its quota of characters: the files that
come first by the hash of their name, in the order of their path, which compresses best. Tests, tables of digits, near
duplicates and documents of `--known` are left out. `local_corpus.py --more TABLES/*.jsonl.xz --only-more` makes the
corpus. The tables are under the licences of the packages: make them where they are used, and do not pass them on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from corpora import Package, files, texts
from local_corpus import LONGEST, SHORTEST, looks_like_table

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
}
"""Package -> characters at most, and the files taken."""


def kept(archive: Path, name: str, suffixes: tuple[str, ...], known: set[str], quota: float) -> Iterator[Document]:
    """The documents of a package, up to its quota, by path."""
    package = Package("apt", (name,), 1.0, suffixes)
    stream = ((path, content) for path, content in files(archive) if not _LEFT_OUT.search(path))
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


def _short(name: str) -> str:
    """A name without the folders of its package and the number of its part."""
    return "/".join(["linux", *name.partition("#")[0].split("/")[2:]])


def write(documents: Iterator[Document], folder: Path, group: str) -> int:
    """Write the documents as tables of `TABLE` characters; returns the characters."""
    total, table = 0, -1
    with ExitStack() as stack:
        for document in documents:
            if total // TABLE != table:
                stack.close()
                table = total // TABLE
                file = stack.enter_context(open(folder / f"{group}-{table}.jsonl.xz", "wb"))
                pipe = stack.enter_context(
                    subprocess.Popen(["xz", "-8"], stdin=subprocess.PIPE, stdout=file, bufsize=1 << 20)
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
    parser.add_argument("--scale", type=float, default=1.0, help="of the quotas")
    arguments = parser.parse_args()
    known = set()
    for table in arguments.known:
        with lzma.open(table, "rt", encoding="utf-8") as lines:
            known |= {json.loads(line)["name"] for line in lines}
    arguments.tables.mkdir(parents=True, exist_ok=True)
    seen = Deduplicator()

    def every() -> Iterator[Document]:
        for name, (quota, suffixes) in GROUPS[arguments.group].items():
            archive = next(arguments.packages.glob(f"{name}_*.deb"))
            count, before = 0, seen.near + seen.exact
            for document in kept(archive, name, suffixes, known, quota * arguments.scale):
                if seen.is_new(document.text):
                    count += len(document.text)
                    yield document
            print(
                f"{archive.name}: {count / 1e6:.1f}M characters, {seen.near + seen.exact - before} duplicates",
                flush=True,
            )

    print(f"{write(every(), arguments.tables, arguments.group):,} characters", file=sys.stderr)


if __name__ == "__main__":
    main()
