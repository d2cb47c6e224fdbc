"""Checks of the arguments that the operators share."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.ops.looks import looks_allowed

Window = SupportsIndex | Sequence[int] | Tensor
"""Keys each query keeps: an integer, or one per key/value head."""

_LARGEST = 2**31 - 1
"""The largest position that an expiry holds."""


def check_tensor(name: str, value: object, shape: str) -> None:
    """Raise `InvalidInputError` unless `value` is a tensor; `name` and `shape` describe it in the message."""
    if not isinstance(value, Tensor):
        raise InvalidInputError(f"{name} must be a torch.Tensor of shape {shape}; got {type(value).__name__}")


def check_window(window: Window, local: int = 0, sinks: int = 0, *, groups: int | None = None) -> tuple[int, ...]:
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


def check_segment_ids(segment_ids: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """Raise `InvalidInputError` unless segment_ids is None or (B, N) non-decreasing integers on `device`."""
    if segment_ids is None:
        return
    check_tensor("segment_ids", segment_ids, str((batch, length)))
    if segment_ids.shape != (batch, length) or segment_ids.is_floating_point():
        raise InvalidInputError(
            f"segment_ids must be integers of shape {(batch, length)}; "
            f"got {segment_ids.dtype} of shape {tuple(segment_ids.shape)}"
        )
    if segment_ids.device != device:
        raise InvalidInputError(f"segment_ids is on {segment_ids.device}, the scores on {device}: move one of them")
    # On a GPU the look at the data would stall the stream; there the caller's word is taken while compiling
    # or capturing, and checked otherwise.
    if not looks_allowed() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    if length > 1 and bool((segment_ids[:, 1:] < segment_ids[:, :-1]).any()):
        row = int((segment_ids[:, 1:] < segment_ids[:, :-1]).any(-1).nonzero()[0])
        raise InvalidInputError(
            f"segment_ids must not decrease along the sequence (row {row} does): number the packed documents "
            "in the order in which they stand"
        )


def check_key_mask(key_mask: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """Raise `InvalidInputError` unless key_mask is None or a (B, N) bool tensor on `device`."""
    if key_mask is None:
        return
    check_tensor("key_mask", key_mask, str((batch, length)))
    if key_mask.dtype != torch.bool or key_mask.shape != (batch, length):
        raise InvalidInputError(
            f"key_mask must be a bool tensor of shape {(batch, length)}, True for a real token; "
            f"got {key_mask.dtype} of shape {tuple(key_mask.shape)} (an attention_mask becomes one with .bool())"
        )
    if key_mask.device != device:
        raise InvalidInputError(f"key_mask is on {key_mask.device}, the scores on {device}: move one of them")


def check_attention_mask(attention_mask: Tensor) -> None:
    """Refuse a mask of floating type that is additive (0 for visible) rather than 1 for a real token.

    Integer and bool masks pass without a look at their values, and so does every mask while compiling.

    Args:
        attention_mask: (B, N).

    Raises:
        InvalidInputError: floating values other than 0 and 1, or none that is 1.
    """
    if not attention_mask.is_floating_point() or not looks_allowed():
        return
    real = attention_mask == 1
    if not bool((real | (attention_mask == 0)).all()) or not bool(real.any()):
        raise InvalidInputError(
            "attention_mask must hold 1 for a real token and 0 for padding; got floating values other than 0 and 1, or "
            "no 1 at all, as in an additive mask (0 visible, a large negative number hidden): pass "
            "(additive_mask == 0).long()"
        )
