"""A lock on a folder that names the process holding it, and that dies with that process."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dynamask.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(file: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file while the block runs.

    The operating system releases the lock when the process ends, however it ends: a file that a killed process left
    behind locks nothing.

    Args:
        file: lock file; it is created with its folder, and removed afterwards, with folders that are still empty.
        what: what the lock guards, for the message, such as "a training in runs/tiny".
        wait: wait for another holder instead of refusing.

    Raises:
        UsageError: another process holds the lock; the message names it. Or the file cannot be written.
    """
    new_folders = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(file, wait)
        if handle is None:
            raise UsageError(f"{what} is running already ({_holder(file)}): wait for it, or choose another output")
        handle.seek(0)
        handle.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}, handle)
        handle.flush()
    except OSError as error:
        raise UsageError(f"cannot write to {file.parent}: {error.strerror or error}") from error
    with handle:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            for folder in new_folders:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def _acquire(file: Path, wait: bool) -> IO[str] | None:
    while True:
        handle = open(file, "a+", encoding="utf-8")  # noqa: SIM115 -- the lock lives as long as the handle
        if fcntl is None:
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return None
        # The holder before may have removed the file between open and flock: then this locks a file without a name.
        try:
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(file)):
                return handle
        except FileNotFoundError:
            pass
        handle.close()


def _holder(file: Path) -> str:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return f"process {content['pid']} on {content['host']}, since {content['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"see {file}"
