"""Forms that claims are held against: named once, not chosen by their results in the sweep that judges them.

Every sweep of the lines in `lab/results` was judged on the split that its forms were compared on, before these names
were fixed. Runs with `test_share` keep a third split, which no form is chosen on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamask_lab.sweeps.results import Record


@dataclass(frozen=True)
class Judged:
    """A form under judgement.

    Attributes:
        role: "plain": the paper's own form; "best": dynamask 0.1's form for the task; "control": the same windows
            without a choice of keys that is learned.
        name: in the tables of its study.
    """

    role: str
    name: str


SCALING = (
    Judged("plain", "dma, paper"),
    Judged("best", "dma, gentle, ranked by attention, narrow windows 32"),
    Judged("control", "swa, narrow windows 32"),
)
LOCALITY = (
    Judged("plain", "dma, paper"),
    Judged("best", "dma, gentle, ranked by attention, windows 32/608"),
    Judged("control", "swa, windows 32/608"),
)
"""A sixteenth of the context on average over the layers."""
LOCALITY_EVEN = (
    Judged("plain", "dma, paper"),
    Judged("best", "dma, gentle, ranked by attention"),
    Judged("control", "dma, no choice, gentle"),
)
"""A sixteenth of the context in every layer."""
MQAR = (
    Judged("plain", "dma, paper"),
    Judged("best", "dma, uneven windows, from dense, ranked by attention^4"),
    Judged("control", "swa, uneven windows"),
)
MQAR_PUBLISHED = (
    Judged("best", "dma, learned, slopes, head windows"),
    Judged("best", "dma, learned, head windows"),
    Judged("best", "dma, learned, head windows, from dense"),
    Judged("best", "dma, learned, slopes, head windows, from dense"),
    Judged("control", "swa, sinks"),
)
"""Of the sizes "published" and "decide", named before they ran; their plain form is that of the others."""
NEEDLE = (
    Judged("plain", "dma, paper"),
    Judged("best", "dma, windows 128/1280, from dense, ranked by attention^4"),
    Judged("best", "dma, windows 32/320, from dense, ranked by attention^4"),
    Judged("control", "swa, windows 128/1280"),
    Judged("control", "swa, windows 32/320"),
)
"""Each sweep has one of the two best forms, and its control."""
NEEDLE_FAR = (
    Judged("best", "dma, learned, slopes, windows 16/352"),
    Judged("best", "dma, learned, slopes, head windows"),
    Judged("best", "dma, learned, windows 16/352"),
    Judged("best", "dma, learned, windows 16/352, from wide"),
    Judged("control", "swa, sinks, windows 16/352"),
)
"""Of the sizes "far" and "levers", see their study for when they were named."""


def share(window: int, length: int) -> str:
    """Window over context: "1/8", or in decimals where it is no unit fraction."""
    if window >= length:
        return "1"
    return f"1/{length // window}" if length % window == 0 else f"{window / length:.2f}"


def layer_windows(config: Mapping[str, Any]) -> list[int]:
    """Keys that a query of each layer sees at most, in a run's settings; of each head where they are given so."""
    length, layers = config.get("length") or config["context"], config["layers"]
    windows = config.get("layer_windows") or [config.get("window")] * layers
    mixers = config.get("layer_attention") or [config["attention"]] * layers
    return [
        length if mixer in ("mha", "mla") or own is None else min(own, length)
        for window, mixer in zip(windows, mixers, strict=True)
        for own in (window if isinstance(window, list) else [window])
    ]


def share_of_pairs(config: Mapping[str, Any]) -> float:
    """Compute the query-key pairs that a run's attention sees, as a share of causal dense attention's."""
    length = config.get("length") or config["context"]
    dense = length * (length + 1) / 2
    windows = layer_windows(config)
    return sum((kept * (kept + 1) / 2 + (length - kept) * kept) / dense for kept in windows) / len(windows)


def found_windows(record: Record) -> dict[str, Any]:
    """A run's settings with the windows per head that its training found, where it did."""
    found = record.result.get("head_windows")
    return {**record.config, "layer_windows": found} if found else record.config


def window_share(config: Mapping[str, Any]) -> str:
    """Window over context of a run, with the widest layer's or head's keys where they differ, and their pairs."""
    length = config.get("length") or config["context"]
    windows = layer_windows(config)
    mean = round(sum(windows) / len(windows))
    if len(set(windows)) == 1:
        return share(windows[0], length)
    stated = config.get("window") or mean
    widest = max(windows)
    dense = (widest * (widest + 1) / 2 + (length - widest) * widest) / (length * (length + 1) / 2)
    per_head = any(isinstance(window, list) and len(set(window)) > 1 for window in config.get("layer_windows") or [])
    what = "head" if per_head else "layer"
    return f"{share(stated, length)} (widest {what} {widest} of {length} keys: {dense:.0%} of dense pairs)"


def widest_of(records: Sequence[Record], **settings: Any) -> dict[str, Any]:
    """The settings, windows as found, of the run whose widest head sees most: which run comes first says nothing."""
    return max(
        ({**found_windows(record), **settings} for record in records), key=lambda config: max(layer_windows(config))
    )


def pairs_of(records: list[Record]) -> str:
    """The share of dense attention's pairs in runs, as per cent: "12%", or the range; "" for nsa, which pools keys."""
    records = [r for r in records if "nsa" not in (r.config.get("layer_attention") or [r.config["attention"]])]
    shares = sorted(share_of_pairs(found_windows(record)) for record in records)
    cells = list(dict.fromkeys(f"{100 * each:.0f}%" for each in shares))
    return "" if not cells else cells[0] if len(cells) == 1 else f"{cells[0]} to {cells[-1]}"
