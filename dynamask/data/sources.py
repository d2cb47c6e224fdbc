"""Where text comes from: files, folders, .jsonl and .parquet tables, the standard library, or a hub data set."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dynamask.errors import UsageError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
ERROR_POLICIES = ("fail", "skip")


class Document(NamedTuple):
    """One text, and a name that says where it came from."""

    name: str
    text: str


def documents(sources: Iterable[str], *, errors: str = "fail", skipped: list[str] | None = None) -> Iterator[Document]:
    """All documents of all sources, in a fixed order.

    Args:
        sources: each a text file, a `.jsonl` or `.parquet` table with a `text` column, a folder of such files
            (searched deeply, in alphabetical order), "stdlib" (the sources of Python's standard library, real
            text that every machine has), or the name of a data set on the hub.
        errors: "fail" to stop at a file that cannot be read or decoded, "skip" to leave it out.
        skipped: where "skip" lists what it left out, and why.

    Yields:
        Documents that hold more than white space.

    Raises:
        UsageError: a source that does not exist, cannot be read or is not UTF-8 (naming file and byte), a table
            without text, an interrupted download.
    """
    if errors not in ERROR_POLICIES:
        raise UsageError(f"errors must be one of {', '.join(ERROR_POLICIES)}; got {errors!r}")
    for source in sources:
        if not isinstance(source, str) or not source.strip():
            raise UsageError(f"a source is a file, a folder, 'stdlib' or the name of a data set; got {source!r}")
        for path_or_name in _expand(source):
            try:
                for document in _read(path_or_name):
                    if document.text.strip():
                        yield document
            except UsageError as error:
                if errors == "fail":
                    raise
                if skipped is not None:
                    skipped.append(str(error))


def source_files(source: str) -> list[Path]:
    """The files a local source stands for; none for a data set on the hub."""
    return [item for item in _expand(source) if isinstance(item, Path)]


def _expand(source: str) -> list[Path | str]:
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        # Its tests hold files that are broken on purpose, and site-packages is not the standard library.
        left_out = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"}
        return sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES + TABLE_SUFFIXES and p.is_file())
        if not found:
            known = " ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)
            raise UsageError(f"the folder {source} holds no text: looked for {known} in it and below")
        return list(found)
    if path.exists():
        return [path]
    if path.suffix in TEXT_SUFFIXES + TABLE_SUFFIXES or source.startswith((".", "/", "~")):
        raise UsageError(f"no such file or folder: {source}")
    return [source]


def _read(source: Path | str) -> Iterator[Document]:
    if isinstance(source, str):
        yield from _read_hub(source)
    elif source.suffix == ".jsonl":
        yield from _read_jsonl(source)
    elif source.suffix == ".parquet":
        yield from _read_parquet(source)
    else:
        yield Document(str(source), _decode(source))


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 (byte {error.start}: 0x{error.object[error.start]:02x}). Convert it "
            "(iconv -t UTF-8), or leave such files out with errors=skip"
        ) from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}. Mend it, or leave it out with errors=skip") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    # Not splitlines(): JSON strings may hold U+2028 and U+0085 as they are, which it takes for line ends.
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(
                f'{path}, line {number}: expected a JSON object with a "text" field ({type(error).__name__}: {error})'
            ) from error
        _check_text(text, f"{path}, line {number}")
        yield Document(f"{path}:{number}", text)


def _check_text(text: object, place: str) -> None:
    if not isinstance(text, str):
        raise UsageError(f'{place}: "text" must be a string; got {type(text).__name__}')


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise UsageError(f"{path} has no column 'text'; it has {', '.join(table.schema_arrow.names)}")
            number = 0
            for batch in table.iter_batches(columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is not None:
                        _check_text(text, f"{path}, row {number}")
                        yield Document(f"{path}:{number}", text)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UsageError(f"cannot read {path} as parquet: {error}") from error


def _read_hub(name: str) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's client raises a dozen kinds, all of which mean: not to be had now
        raise UsageError(
            f"{name!r} is neither a file, nor a folder, nor a data set that could be loaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}). Check the "
            "spelling and the connection, then run the same command again: finished downloads are kept"
        ) from error
    column = "text" if "text" in rows.column_names else None
    if column is None:
        raise UsageError(f"the data set {name!r} has no column 'text'; it has {', '.join(rows.column_names)}")
    for number, row in enumerate(rows):
        if row[column] is not None:
            _check_text(row[column], f"{name}, row {number}")
            yield Document(f"{name}:{number}", row[column])
