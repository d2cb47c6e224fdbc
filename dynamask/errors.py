"""The two kinds of mistake dynamask reports: bad input to the operators, and bad input to the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InvalidInputError(ValueError):
    """An argument has the wrong shape, dtype, device or value.

    The message names what was given, what was expected and how to mend it. It is a `ValueError`,
    so code that catches `ValueError` keeps working.
    """


class UsageError(Exception):
    """A mistake on the command line or in a configuration file; the CLI prints it and exits with code 2."""


class Interrupted(Exception):
    """A signal ended the work at a point from which it can be continued; the message says how.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class CacheRollbackError(RuntimeError):
    """A bounded cache cannot return to a length whose keys it has already evicted."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Suggest the nearest known name, as " (did you mean 'window'?)"; nothing where none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
