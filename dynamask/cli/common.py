"""What the commands share: consoles, progress, the model argument."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

console = Console()
errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Folder of a finished run, or of a saved causal LM, or a hub name.")]


def progress(stream: Iterable[Any], description: str) -> Iterator[Any]:
    total = len(stream) if hasattr(stream, "__len__") else None  # type: ignore[arg-type]
    yield from track(stream, description=description, total=total, console=errors, transient=True)
