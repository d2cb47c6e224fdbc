"""Forms of the studies under the names of their recipes, as the report's tables show them."""

from __future__ import annotations

import re

_RATE = r"(, (?:half|quarter) rate)?"
_SLOPES = r"(, (?:steep )?slopes)?"
_NAMES = (
    (r"(\bone wide layer), w = N/16\b", r"\1, 12% of the pairs"),
    (rf"\bsliding \+ sinks{_RATE}, one wide layer", r"sliding\1"),
    (rf"\bsliding \+ sinks{_RATE}(?!, wide start)", r"sliding, even windows\1"),
    (rf"\blearned{_RATE}{_SLOPES}, one wide layer", r"recall\1\2"),
    (rf"\blearned{_RATE}{_SLOPES}, even\b", r"even\1\2"),
    (r"\bdma, learned(, slopes)?, windows 16/352\b", r"recall\1"),
    (r"\bdma, learned\b", "learned"),
    (r"\bswa, sinks, windows 16/352\b", "sliding"),
    (r"\bswa, sinks\b(?!, windows)", "sliding, even windows"),
    (r"\bdma, gentle, ranked by attention\b(?!\^)", "scored"),
    (r"\bdma, no choice, gentle\b", "scored, no choice"),
    (r"\bdma, paper\b", "paper"),
    (r"\bmha\b", "dense"),
)
"""Pattern of a form's name in a study -> the same by its recipe; what differs from the recipe stays behind it.

With one wide layer, no layer has the window that all pairs together are as many as, so the name gives the pairs.
"""
NOTE = (
    "Forms have the names of their recipes (`dynamask.recipes`) where there is one, with what differs from it behind "
    "the name; `default` is `sliding`. `scored`: dynamask 0.1's form, with slopes and scores on the logits and ranks "
    "from attention; no recipe has it."
)


def by_recipe(text: str) -> str:
    """Replace the names of forms in a table's cell by those of their recipes; code is left as it is.

    Args:
        text: such as "sliding + sinks, half rate, one wide layer, w = N/16".

    Returns:
        Such as "sliding, half rate, 12% of the pairs".
    """
    if "`" in text:
        return text
    for pattern, name in _NAMES:
        text = re.sub(pattern, name, text)
    return text
