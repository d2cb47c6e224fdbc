"""Pictures of the report: small enough for a page, the same bytes for the same figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from dynamask.inspect.style import save_figure

LARGEST = 100_000
"""Bytes of a picture, at most."""
_COLOURS = 64
_SHRINK = 0.8
_drawing: ContextVar[bool] = ContextVar("drawing", default=True)


@contextmanager
def pictures(drawn: bool) -> Iterator[None]:
    """Within it, pictures are written only where `drawn` is True: they take most of a report's time."""
    token = _drawing.set(drawn)
    try:
        yield
    finally:
        _drawing.reset(token)


def save_small(figure: Any, picture: Path) -> Path:
    """Write a figure, as PNG instead of SVG where the SVG would take more than `LARGEST` bytes.

    Args:
        figure: of matplotlib.
        picture: file; only .svg is replaced.

    Returns:
        The file written.
    """
    if not _drawing.get():
        return picture
    path = save_figure(figure, picture)
    if picture.suffix != ".svg" or path.stat().st_size <= LARGEST:
        return path
    path.unlink()
    return shrink(save_figure(figure, picture.with_suffix(".png")))


def draw_small(draw: Callable[[Path], Path], picture: Path) -> Path:
    """Have a PNG drawn by a function that writes it itself, and `shrink` it."""
    return shrink(draw(picture)) if _drawing.get() else picture


def shrink(picture: Path) -> Path:
    """Write a PNG anew with few colours, and smaller until it takes at most `LARGEST` bytes."""
    from PIL import Image

    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    scale = 1.0
    while True:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image if scale == 1.0 else image.resize(size, Image.Resampling.LANCZOS)
        small.quantize(_COLOURS, dither=Image.Dither.NONE).save(picture, compress_level=9)
        if picture.stat().st_size <= LARGEST or min(size) == 1:
            return picture
        scale *= _SHRINK
