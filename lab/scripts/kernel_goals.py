"""Print the goals of issue 16's attention kernels beside the rows that `kernel_times.py` wrote.

PYTHONPATH=.:lab python lab/scripts/kernel_goals.py times.json share.json dense.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def verdict(figure: float, goal: float, *, least: bool = False) -> str:
    """A figure beside the goal that it is to reach, or to stay below."""
    met = figure >= goal if least else figure <= goal
    return f"{figure:.3g} (goal {goal:g}): {'met' if met else 'missed'}"


def both(row: Row, kind: str = "") -> float:
    """Milliseconds of a forward and a backward call."""
    if kind:
        return row.get(f"{kind}, a call", row[kind]) + row[f"{kind} backward"]
    return row["forward, a call"] + row["backward, a call"]


def goals(rows: dict[str, Row]) -> Iterator[str]:
    """One line per goal for which there are rows."""
    rates = {"equal 512": (400, 280), "equal 1024": (480, 320)}
    for name, (forward, backward) in rates.items():
        if name in rows:
            yield f"{name}, forward TFLOP/s, {verdict(rows[name]['forward TFLOP/s'], forward, least=True)}"
            yield f"{name}, backward TFLOP/s, {verdict(rows[name]['backward TFLOP/s'], backward, least=True)}"
    for name, equal in (("heads 136/136/400/3424", "equal 1024"), ("heads 150/200/2722 d64", "equal 1024 d64")):
        if name in rows and equal in rows:
            for part in ("forward", "backward"):
                yield f"{name} over {equal}, {part}, {verdict(rows[name][part] / rows[equal][part], 1.15)}"
    for name, row in rows.items():
        if name.startswith("narrow") and "cudnn backward" in row:
            forward = row["forward, a call"] / row.get("cudnn, a call", row["cudnn"])
            yield f"{name} over cuDNN, forward call, {verdict(forward, 1.1)}"
            yield f"{name} over cuDNN, forward + backward calls, {verdict(both(row) / both(row, 'cudnn'), 1.1)}"
        if name.startswith("mask"):
            yield f"{name}, percent of the forward, {verdict(100 * row['share'], 10)}"
        if "dense cudnn" in row:
            ours = row["expiry"] + row["forward, a call"]
            dense = min(row["dense cudnn"], row.get("dense fa3", float("inf")))
            peer = "cuDNN" if dense == row["dense cudnn"] else "FlashAttention 3"
            yield f"{name}, {peer} over ours, forward, {verdict(dense / ours, 1.0, least=True)}"
            ours += row["backward, a call"]
            dense += row["dense cudnn backward"]
            yield f"{name}, {peer} and cuDNN over ours, forward + backward, {verdict(dense / ours, 1.0, least=True)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    rows: dict[str, Row] = {}
    for file in parser.parse_args().files:
        if file.exists():
            rows |= {row["name"]: row for row in json.loads(file.read_text())["rows"] if "error" not in row}
    print("\n".join(goals(rows)))


if __name__ == "__main__":
    main()
