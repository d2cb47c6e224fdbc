"""A line at the bottom of a terminal that stays while text scrolls above it."""

from __future__ import annotations

import os
import shutil
from types import TracebackType
from typing import TextIO


class StatusLine:
    """Reserves the last row of a terminal by its scrolling region.

    Outside of a terminal, in a dumb one, or in one of fewer than five rows it does nothing, see `active`.

    Args:
        stream: what the terminal shows.
        active: False: do nothing.
    """

    def __init__(self, stream: TextIO, *, active: bool = True) -> None:
        self._stream = stream
        self._size = (0, 0)
        self.active = active and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.active = self.active and shutil.get_terminal_size().lines >= 5

    def __enter__(self) -> StatusLine:
        self._reserve()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            # The cursor is saved and restored, because setting the region moves it.
            self._write(f"\x1b7\x1b[{self._size[1]};1H\x1b[2K\x1b[r\x1b8")

    def show(self, text: str) -> None:
        """Replace the line's text, cut to the width of the terminal."""
        if not self.active:
            return
        self._reserve()
        columns, rows = self._size
        self._write(f"\x1b7\x1b[{rows};1H\x1b[7m{text[:columns].ljust(columns)}\x1b[0m\x1b8")

    def _reserve(self) -> None:
        size = tuple(shutil.get_terminal_size())
        if not self.active or size == self._size:
            return
        self._size = (size[0], size[1])
        # A new line makes room where the cursor stands in the last row.
        self._write(f"\n\x1b[A\x1b7\x1b[1;{size[1] - 1}r\x1b8")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
