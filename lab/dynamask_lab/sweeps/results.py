"""A results file: one JSON line per finished run, which reads whatever moment the writer was killed at."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from dynamask.errors import InvalidInputError, UsageError

try:
    import fcntl
except ImportError:  # not a POSIX system: two sweeps on one file are then the user's to avoid
    fcntl = None  # type: ignore[assignment]

_OPENING = b'{"experiment": '
"""How every line begins, by which a torn one is told from a stranger's text."""


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        experiment: its name.
        key: `run_key` of experiment and config.
        config: the settings, plain JSON.
        seed: config["seed"].
        result: what the run returned; numbers that are not finite stand as None.
        seconds: wall time of the run.
        device: name of the processor it ran on, and how many runs at a time, if several.
        versions: package -> version.
        commit: git commit of the code, with "-dirty" where files differed from it; None where unknown.
    """

    experiment: str
    key: str
    config: dict[str, Any]
    seed: int
    result: dict[str, Any]
    seconds: float
    device: str
    versions: dict[str, str]
    commit: str | None

    @property
    def corpus(self) -> tuple[str, str]:
        """Name of what it read, and the digest of the tokens, which another build of that corpus changes; "None" where
        a run reads none."""
        name = self.config.get("corpus") or self.result.get("corpus")
        return str(name), str(self.result.get("corpus_content"))


def corpora_of_several_builds(records: Iterable[Record]) -> list[str]:
    """Names of corpora that the runs read in several versions: their losses do not compare."""
    builds: dict[str, set[str]] = defaultdict(set)
    for name, content in {record.corpus for record in records}:
        builds[name].add(content)
    return sorted(name for name, contents in builds.items() if len(contents) > 1)


def run_key(experiment: str, config: dict[str, Any]) -> str:
    """16 hexadecimal digits that stand for the run, whatever order its settings are written in.

    Raises:
        InvalidInputError: the config is not plain JSON (tuples, numpy numbers, keys that are not strings, NaN), or
            has no integer "seed".
    """
    try:
        text = json.dumps({"experiment": experiment, "config": config}, sort_keys=True, allow_nan=False)
        plain = json.loads(text)["config"] == config
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"a run's config must be plain JSON: {error}; got {config!r}") from error
    if not plain:
        raise InvalidInputError(f"a run's config must be plain JSON, lists and string keys only; got {config!r}")
    if type(config.get("seed")) is not int:
        raise InvalidInputError(f'a run\'s config needs an integer "seed"; got {config.get("seed")!r}')
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ResultsFile:
    """The results file, open for a sweep: locked, mended, ready to be appended to.

    Use as a context manager. A file that it created and that is still empty at the end is removed. A last line that a
    kill or a power cut left unfinished is cut off on opening.

    Args:
        path: created where it does not exist; its folder must.

    Attributes:
        records: the finished runs, in order; `append` extends them.
        dropped: bytes of an unfinished last line that were cut off.

    Raises:
        UsageError: no such folder, a file that is not a results file (left untouched), or one that another sweep
            has open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        existed = path.exists()
        try:
            # O_APPEND: every write goes to the end, even if something else moved it.
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UsageError(f"cannot write results to {path}: {error.strerror}") from error
        try:
            self._lock()
            content = path.read_bytes()
            self.records, whole = _parse(content, path)
            self.dropped = len(content) - whole
            if self.dropped:
                os.ftruncate(self._descriptor, whole)
                os.fsync(self._descriptor)
            _flush_folder(path)  # or a power cut could forget the file that the first record went to
            self._created = not existed
        except BaseException:
            os.close(self._descriptor)
            raise

    def _lock(self) -> None:
        """The system frees the lock when the process ends, however it does."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another sweep is writing to {self.path}: wait for it, or give another file") from error

    def append(self, record: Record) -> None:
        """Write the record as one line, and return when it is on the disk.

        Raises:
            UsageError: the disk is full or failing; the file is as it was before.
        """
        line = json.dumps(_finite(asdict(record)), allow_nan=False).encode() + b"\n"
        before = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, before)
            raise UsageError(f"cannot write to {self.path}: {error.strerror}. The runs before are kept") from error
        self.records.append(Record(**json.loads(line)))

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._created and os.fstat(self._descriptor).st_size == 0:
            self.path.unlink(missing_ok=True)  # nothing came of the sweep that made it
        os.close(self._descriptor)


def read_results(path: Path) -> list[Record]:
    """The finished runs in a file, which stays as it is; none where there is no file.

    Raises:
        UsageError: not a results file.
    """
    try:
        return _parse(path.read_bytes(), path)[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"cannot read results from {path}: {error.strerror}") from error


def _parse(content: bytes, path: Path) -> tuple[list[Record], int]:
    """The records, and how many bytes of the content they take: less than all where the last line is torn."""
    records: list[Record] = []
    place = 0
    names = {field.name for field in fields(Record)}
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            values = json.loads(line)
            if not line.endswith(b"\n") or not isinstance(values, dict) or set(values) != names:
                raise ValueError("not a whole record")
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            # A kill leaves a line without its end; a power cut may leave zeros for blocks that never reached the disk.
            torn = not line.endswith(b"\n") or b"\0" in line
            ours = _OPENING.startswith(line.partition(b"\0")[0][: len(_OPENING)])
            if place + len(line) == len(content) and torn and ours:
                return records, place
            raise UsageError(
                f"line {number} of {path} is not a run's record, so it is no results file, or was edited: give another "
                "file, or delete the line"
            ) from error
        records.append(Record(**values))
        place += len(line)
    return records, place


def _finite(value: Any) -> Any:
    """None for every number that JSON cannot hold: a run that diverged is a finding, not a reason to lose it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flush_folder(path: Path) -> None:
    """Force the folder's entry for the file to the disk."""
    descriptor = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
