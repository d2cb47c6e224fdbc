"""Tables of what bounds a conversion, and of what the whole cache of a partly converted model holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dynamask_lab.studies.conversion.report import interval
from dynamask_lab.sweeps.section import Row

PATTERN = "bound-*.jsonl"
_RULES = {
    "learned": "learned ranks",
    "learned, one layer": "learned ranks in layer {layer} alone, the others dense",
    "oracle, max": "an oracle's ranks by the largest later attention",
    "oracle, mass": "an oracle's ranks by the sum of later attention",
    "oracle, loss": "an oracle's ranks by their effect on the loss",
    "best keys of each query": "the best keys of each query, which no cache of that size has",
}
PRODUCTS = "product's"
_CHOSEN = {
    PRODUCTS: "windows and slopes of learned ranks",
    "none": "no slopes",
    "its own": "windows and slopes its own",
}


def read_bound(results: Path, study: str) -> list[dict[str, Any]]:
    """The lines of one study of `bound-*.jsonl`; of lines for one thing the last counts."""
    found: dict[str, dict[str, Any]] = {}
    for line in _lines(results):
        if line.get("study") == study:
            key = {name: value for name, value in line.items() if name not in ("losses", "bytes", "global")}
            found[json.dumps(key, sort_keys=True)] = line
    return list(found.values())


def _lines(results: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(results.glob(PATTERN)):
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if isinstance(line, dict):
                yield line


def bound_rows(lines: list[dict[str, Any]], ranked: tuple[int, ...] = (5, 11, 17)) -> list[Row]:
    """One row per rule and budget: the loss above dense over the same blocks, with its interval.

    Args:
        lines: of `bound`, one model.
        ranked: its layers that rank, for the names of rows.
    """
    base = {line["corpus"]: np.array(line["losses"]) for line in lines if line["rule"] == "dense"}
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for line in lines:
        if line["rule"] == "dense" or line["corpus"] not in base:
            continue
        name = _name(line, ranked)
        above = (np.array(line["losses"]) - base[line["corpus"]]).mean(1)
        low, high = interval(above)
        row = rows.setdefault(
            (line["budget"], name), {"frozen, and chosen by": name, "keys per head": f"{line['budget']:,}"}
        )
        row[f"{line['corpus']} loss above dense"] = f"{above.mean():+.3f} ({low:+.3f} to {high:+.3f})"
    columns = [f"{corpus} loss above dense" for corpus in base]
    ordered = sorted(rows.items(), key=lambda item: item[0][0])
    return [row | {column: row.get(column, "") for column in columns} for _, row in ordered]


_SEARCHED = {
    "estimated": "as the estimate chose them",
    "no slopes": "the same windows, no slopes",
    "slopes <= 4/8192": "the same windows, no slope above 4/8192",
    "found": "searched by the loss on validation blocks",
}


def search_rows(lines: list[dict[str, Any]]) -> list[Row]:
    """One row per set of windows and slopes on test blocks: the loss above dense, with its interval.

    Args:
        lines: of `search`, one model. Of an oracle's tries, the one with the lowest loss counts.
    """
    tested = [line for line in lines if line["part"] == "test"]
    base = np.array(next(line["losses"] for line in tested if line["rule"] == "dense")).mean(1)
    rows: list[Row] = []
    for budget in sorted({line["budget"] for line in tested if line.get("budget")}):
        own = [line for line in tested if line.get("budget") == budget]
        shown = [line for line in own if line["rule"] in _SEARCHED]
        for rule in sorted({line["rule"] for line in own if line["rule"].startswith("oracle")}):
            tries = [line for line in own if line["rule"] == rule]
            shown.append(min(tries, key=lambda line: float(np.mean(line["losses"]))))
        for line in shown:
            above = np.array(line["losses"]).mean(1) - base
            low, high = interval(above)
            steps = (f"{slope * 8192:g}" for slope in line["slopes"])
            oracle = line["rule"].removesuffix(", tried")
            rows.append(
                {
                    "frozen; windows and slopes": _SEARCHED.get(
                        line["rule"], f"{_RULES.get(oracle, oracle)}, searched by the loss on these blocks"
                    ),
                    "keys per head": f"{budget:,}",
                    "newest keys": str(line.get("local", 128)),
                    "windows": ", ".join(map(str, line["windows"])),
                    "slopes, 1/8192": ", ".join(steps),
                    "text loss above dense": f"{above.mean():+.3f} ({low:+.3f} to {high:+.3f})",
                }
            )
    return rows


def _name(line: Mapping[str, Any], ranked: tuple[int, ...]) -> str:
    rule = line["rule"]
    if rule not in _RULES and rule.startswith("oracle"):
        rule, _, chosen = rule.partition(", windows and slopes: ")
        return f"{_RULES[rule]}, {_CHOSEN[chosen]}"
    if rule.startswith("oracle"):
        return f"{_RULES[rule]}, {_CHOSEN[PRODUCTS if line['slopes'] else 'none']}"
    if rule == "learned, one layer":
        return _RULES[rule].format(layer=ranked[int(np.argmin(line["windows"]))])
    return _RULES.get(rule, rule)


def cache_rows(lines: list[dict[str, Any]]) -> list[Row]:
    """One row per budget: MiB of the whole cache and of the layers that rank, and their share of the dense model's."""
    dense = {line["length"]: line["bytes"] for line in lines if line["budget"] is None}
    rows: list[Row] = []
    for budget in sorted({line["budget"] for line in lines if line["budget"]}):
        held = {line["length"]: line for line in lines if line["budget"] == budget}
        row: dict[str, str] = {"keys per global head": f"{budget:,}"}
        for length, line in sorted(held.items()):
            name = f"{length // 1024}K"
            row["cache, MiB"] = f"{line['bytes'] / 2**20:.1f}"
            row["of it global heads"] = f"{line['global'] / 2**20:.1f}"
            row[f"dense at {name}, MiB"] = f"{dense[length] / 2**20:.1f}"
            row[f"share at {name}"] = f"{line['bytes'] / dense[length]:.1%}"
        rows.append(row)
    return rows
