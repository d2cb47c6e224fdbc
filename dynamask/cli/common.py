"""What the commands share: consoles, progress, the model argument, checks of what they are to write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from dynamask.errors import UsageError

console = Console()
errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Folder of a finished run, or of a saved causal LM, or a hub name.")]


def progress(stream: Iterable[Any], description: str) -> Iterator[Any]:
    """Iterate with a progress bar on standard error."""
    total = len(stream) if hasattr(stream, "__len__") else None  # type: ignore[arg-type]
    yield from track(stream, description=description, total=total, console=errors, transient=True)


def check_output_file(file: Path | None) -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Raises:
        UsageError: no such folder, a folder in the file's place, or no permission.
    """
    if file is None:
        return
    if not file.parent.is_dir():
        raise UsageError(f"there is no folder {file.parent} to write {file.name} to: create it first")
    if file.is_dir():
        raise UsageError(f"cannot write to {file}: it is a folder; name a file in it")
    existed = file.exists()
    try:
        with open(file, "ab"):
            pass
        if not existed:
            file.unlink()
    except OSError as error:
        raise UsageError(f"cannot write to {file}: {error.strerror or error}") from error


def check_output_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written to; it need not exist yet.

    Raises:
        UsageError: a file in its place or above it, or no permission.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"cannot write to {folder}: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to {folder}: no permission to write in {place}")


def check_text(text: str, what: str) -> str:
    """Return a text of the command line.

    Raises:
        UsageError: bytes that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} is not UTF-8 (character {error.start + 1}): convert it, or set a UTF-8 locale"
        ) from error
    return text


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise `UsageError` unless the options of sampling are such that a token can be drawn."""
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise UsageError(f"temperature must be >= 0 and top-p in (0, 1]; got {temperature} and {top_p}")


def quiet_libraries() -> None:
    """Keep the progress bars and notices of transformers and its hub client off the terminal; warnings stay."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    disable_progress_bars()
