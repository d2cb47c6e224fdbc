"""Read texts from files, folders, .jsonl and .parquet tables, the standard library, or a hub data set."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dynamask.errors import UsageError
from dynamask.hub import check_local_or_hub

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
_OTHER_TABLES = (".json", ".csv", ".tsv", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".arrow", ".feather", ".xlsx")
"""Files whose bytes are no text to learn from. Suffixes are compared without case."""
ERROR_POLICIES = ("fail", "skip")

_Problem = Callable[[str], None]
"""Takes the description of something unreadable; raises UsageError, or records it and returns."""


class Document(NamedTuple):
    """One text, and the name of its source."""

    name: str
    text: str


def documents(sources: Iterable[str], *, errors: str = "fail", skipped: list[str] | None = None) -> Iterator[Document]:
    """Read all documents of all sources, in a fixed order.

    Args:
        sources: each a text file, a `.jsonl` (`.ndjson`) or `.parquet` table with a `text` column, a folder of such
            files (searched deeply, in alphabetical order, hidden ones left out), "stdlib" (the sources of Python's
            standard library, real text that every machine has), or the name of a data set on the hub, `owner/name`.
        errors: "fail" to stop at a file, line or row that cannot be read or decoded, "skip" to leave it out.
        skipped: where "skip" lists what it left out, and why.

    Yields:
        Documents that hold more than white space. A byte-order mark is removed, and a lone surrogate becomes U+FFFD.

    Raises:
        UsageError: a source that does not exist, cannot be read or is not UTF-8 (naming file and byte), a table
            without text, an interrupted download.
    """
    if errors not in ERROR_POLICIES:
        raise UsageError(f"errors must be one of {', '.join(ERROR_POLICIES)}; got {errors!r}")

    def problem(message: str) -> None:
        if errors == "fail":
            raise UsageError(f"{message}. Repair it, or leave it out with errors=skip")
        if skipped is not None:
            skipped.append(message)

    for source in sources:
        _check_name(source)
        for path_or_name in _expand(source):
            for document in _read(path_or_name, problem):
                if document.text.strip():
                    yield document


def check_sources(sources: Iterable[str]) -> None:
    """Refuse local sources that are not there, or hold no text, before anything is read.

    Raises:
        UsageError: see `documents`.
    """
    for source in sources:
        _check_name(source)
        _expand(source)


def _check_name(source: object) -> None:
    if not isinstance(source, str) or not source.strip():
        raise UsageError(f"a source is a file, a folder, 'stdlib' or the name of a data set; got {source!r}")


def source_files(source: str) -> list[Path]:
    """List the files that a local source stands for; none for a data set on the hub."""
    return [item for item in _expand(source) if isinstance(item, Path)]


def _expand(source: str) -> list[Path | str]:
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        # Its tests hold files that are broken on purpose, and site-packages is not the standard library.
        left_out = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"}
        return sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    path = Path(source).expanduser()
    if path.is_dir():
        known = TEXT_SUFFIXES + TABLE_SUFFIXES
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and _is_file(p) and not _hidden(p, path))
        if not found:
            raise UsageError(f"the folder {source} holds no text: looked for {' '.join(known)} in it and below")
        return list(found)
    if path.exists():
        if path.suffix.lower() in _OTHER_TABLES:
            raise UsageError(
                f"{source} would be read as raw text, {path.suffix} and all: make it a .jsonl or .parquet table with a "
                "text column, or plain text"
            )
        return [path]
    if path.suffix.lower() in TEXT_SUFFIXES + TABLE_SUFFIXES or source.startswith((".", "/", "~")):
        raise UsageError(f"no such file or folder: {source}")
    check_local_or_hub(source, "file or folder")
    return [source]


def _is_file(path: Path) -> bool:
    """Return whether a path is a file, or a link to one that is gone, which is an unreadable file."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _hidden(path: Path, folder: Path) -> bool:
    """Return whether a file, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _read(source: Path | str, problem: _Problem) -> Iterator[Document]:
    if isinstance(source, str):
        yield from _read_hub(source, problem)
        return
    try:
        suffix = source.suffix.lower()
        if suffix in (".jsonl", ".ndjson"):
            yield from _read_jsonl(source, problem)
        elif suffix == ".parquet":
            yield from _read_parquet(source, problem)
        else:
            text = _decode(source.read_bytes(), str(source), problem)
            if text is not None:
                yield Document(str(source), text)
    except OSError as error:
        problem(f"cannot read {source}: {error.strerror or error}")


def _decode(data: bytes, place: str, problem: _Problem) -> str | None:
    """Decode UTF-8 with or without a byte-order mark; None after a problem."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        problem(f"{place} is not UTF-8 (byte {error.start}: 0x{data[error.start]:02x}); iconv -t UTF-8 converts files")
        return None


def _read_jsonl(path: Path, problem: _Problem) -> Iterator[Document]:
    with open(path, "rb") as file:
        # Bytes end a line at \n alone: JSON strings may hold U+2028 and U+0085 as they are.
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            content = _decode(line, place, problem)
            if content is None or not content.strip():
                continue
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:  # ValueError: bad JSON, or a number of too many digits
                problem(f'{place}: expected a JSON object with a "text" field ({type(error).__name__}: {error})')
                continue
            if not isinstance(row, dict) or "text" not in row:
                shape = f"fields {', '.join(map(repr, row))}" if isinstance(row, dict) else type(row).__name__
                problem(f'{place}: expected a JSON object with a "text" field; got {shape}')
                continue
            text = _checked(row["text"], place, problem)
            if text is not None:
                yield Document(f"{path}:{number}", text)


def _checked(text: Any, place: str, problem: _Problem) -> str | None:
    """Return the text without lone surrogates; None after a problem."""
    if not isinstance(text, str):
        problem(f'{place}: "text" must be a string; got {type(text).__name__}')
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text


def _read_parquet(path: Path, problem: _Problem) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"reading {path} needs pyarrow ({error}): pip install 'dynamask-attention[train]'") from error

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                problem(f"{path} has no column 'text'; it has {', '.join(table.schema_arrow.names)}")
                return
            number = 0
            for batch in table.iter_batches(columns=["text"]):
                for value in batch.column(0):
                    number += 1
                    place = f"{path}, row {number}"
                    try:
                        content = value.as_py()
                    except UnicodeDecodeError as error:
                        problem(f"{place} is not UTF-8 ({error})")
                        continue
                    text = _checked(content, place, problem)
                    if text is not None:
                        yield Document(f"{path}:{number}", text)
    except pyarrow.ArrowException as error:
        problem(f"cannot read {path} as parquet: {error}")


def _read_hub(name: str, problem: _Problem) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"the data set {name!r} needs the package datasets ({error}): pip install 'dynamask-attention[train]'"
        ) from error

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's client raises a dozen kinds, all of which mean: not to be had now
        raise UsageError(
            f"{name!r} is neither a file, nor a folder, nor a data set that could be loaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). Check the "
            "spelling and the connection, then run the same command again: finished downloads are kept"
        ) from error
    if "text" not in rows.column_names:
        raise UsageError(f"the data set {name!r} has no column 'text'; it has {', '.join(rows.column_names)}")
    for number, row in enumerate(rows):
        text = _checked(row["text"], f"{name}, row {number}", problem)
        if text is not None:
            yield Document(f"{name}:{number}", text)
