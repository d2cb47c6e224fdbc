"""Checks of windows and other integers. They need no torch, so a mistake on the command line is reported at once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from dynamask.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 2**31 - 1
"""The largest position that an expiry holds."""


def check_window(
    window: SupportsIndex | Sequence[int] | Tensor, local: int = 0, sinks: int = 0, *, groups: int | None = None
) -> tuple[int, ...]:
    """Check a window, or the windows of the key/value heads, and what they must hold.

    Args:
        window: an integer, or one integer per key/value head (a sequence, a 1-D integer array or tensor).
        local: newest keys that are always kept.
        sinks: first keys of a segment that are always kept.
        groups: number of key/value heads, where it is known.

    Returns:
        The windows as Python integers: one per head where `groups` is known, else as many as `window` holds.

    Raises:
        InvalidInputError: a window below 1 or not an integer, a sequence that is empty or not of `groups`
            windows, local or sinks below 0, or local + sinks above the smallest window.
    """
    if not isinstance(window, (int, list, tuple)):
        window = plain_numbers(window)
    if isinstance(window, Sequence) and not isinstance(window, str):
        if not window and groups != 0:
            raise InvalidInputError("window must hold one integer per key/value head; got none")
        if groups is not None and len(window) != groups:
            raise InvalidInputError(
                f"window must be one integer or one per key/value head ({groups}); got {len(window)} windows"
            )
        windows = tuple(
            check_integer(each, f"window[{head}]", 1, "keys kept per query") for head, each in enumerate(window)
        )
    else:
        one = check_integer(window, "window", 1, "keys kept per query, or one such integer per key/value head")
        windows = (one,) if groups is None else (one,) * groups
    local = check_integer(local, "local", 0, "newest keys that are always kept")
    sinks = check_integer(sinks, "sinks", 0, "first keys of a segment that are always kept")
    if windows and local + sinks > min(windows):
        which = f"{'window' if min(windows) == max(windows) else 'the smallest window'} = {min(windows)}"
        raise InvalidInputError(
            f"local + sinks must be at most {which}, because both count towards it; got local = {local}, "
            f"sinks = {sinks}: lower them or raise the window"
        )
    return windows


def plain_numbers(value: Any) -> Any:
    """Return tensors, arrays, ranges and tuples as lists, and numpy's numbers as Python's; anything else as it is."""
    if isinstance(value, (int, float, str, bytes)) and type(value).__module__ == "builtins":
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain_numbers(each) for each in value] if isinstance(value, (list, tuple, range)) else value


def check_integer(value: object, name: str, least: int, what: str) -> int:
    """Return `value` as a Python integer.

    Args:
        value: a Python integer or one of numpy; bools and floats are refused.
        name: of the argument, for the message.
        least: the smallest value.
        what: what the number means, for the message.

    Raises:
        InvalidInputError: another type, or a number below `least`.
    """
    number = value
    if not isinstance(number, int) and isinstance(number, SupportsIndex):
        try:
            number = operator.index(number)
        except TypeError:
            number = None
    if isinstance(value, bool) or not isinstance(number, int) or not least <= number <= _LARGEST:
        most = f" and at most {_LARGEST}" if isinstance(number, int) and number > _LARGEST else ""
        raise InvalidInputError(f"{name} must be an integer of at least {least}{most} ({what}); got {value!r}")
    return number
