"""Spans of time as people write them: 25m, 1h30m, 90s, 90."""

from __future__ import annotations

import re

from dynamask.errors import UsageError

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
_PART = r"(\d+(?:\.\d+)?)([hms])"


def parse_seconds(text: str) -> float:
    """Seconds of "25m", "1h30m", "90s" or "90". Raises UsageError for anything else, and for nothing at all."""
    plain = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", plain):
        plain += "s"
    seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, plain))
    if not re.fullmatch(f"({_PART})+", plain) or seconds <= 0:
        raise UsageError(f"{text!r} is not a span of time: write 25m, 1h30m or 90s")
    return seconds


def format_seconds(seconds: float) -> str:
    """The span rounded for reading: "1h30m", "2m05s", "7.3s"."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
