"""Forms of the studies under the names of their recipes, as the report's tables show them."""

from __future__ import annotations

import re

_RATE = r"(, (?:half|quarter) rate)?"
_SLOPES = r"(, (?:steep )?slopes)?"
_NAMES = (
    (rf"\bsliding \+ sinks{_RATE}, one wide layer", r"sliding\1"),
    (rf"\bsliding \+ sinks{_RATE}(?!, wide start)", r"sliding, even windows\1"),
    (rf"\blearned{_RATE}{_SLOPES}, one wide layer", r"recall\1\2"),
    (rf"\blearned{_RATE}{_SLOPES}, even\b", r"even\1\2"),
    (r"\bdma, learned(, slopes)?, windows 16/352\b", r"recall\1"),
    (r"\bswa, sinks, windows 16/352\b", "sliding"),
    (r"\bswa, sinks\b(?!, windows)", "sliding, even windows"),
    (r"\bdma, paper\b", "paper"),
    (r"\bmha\b", "dense"),
)
"""Pattern of a form's name in a study -> the same by its recipe; what differs from the recipe stays behind it."""
NOTE = (
    "Forms have the names of their recipes (`dynamask.recipes`) where there is one, with what differs from it behind "
    "the name; `default` is `sliding`."
)


def by_recipe(text: str) -> str:
    """Replace the names of forms in a table's cell by those of their recipes; code is left as it is.

    Args:
        text: such as "sliding + sinks, half rate, one wide layer, w = N/16".

    Returns:
        Such as "sliding, half rate, w = N/16".
    """
    if "`" in text:
        return text
    for pattern, name in _NAMES:
        text = re.sub(pattern, name, text)
    return text
