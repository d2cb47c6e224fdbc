"""The ceiling study as a table and a picture: what each rule loses against dense attention, by window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamask_lab.studies.ceiling.study import STUDY
from dynamask_lab.sweeps.provenance import short_commit
from dynamask_lab.sweeps.section import Exhibit, Row, Section
from dynamask_lab.sweeps.verdicts import Interval, mean_interval

PATTERN = "ceiling*.jsonl"
_RULES = {
    "newest": "newest keys",
    "learned": "learned ranks",
    "static": "static keys by true future attention",
    "query": "best keys of each query",
}
_WINDOWS = {"even": "one window", "heads": "a window per head"}
Rows = Sequence[Mapping[str, Any]]


def gain_over_dense(rows: Rows, row: Mapping[str, Any]) -> Interval | None:
    """Nats that a rule loses against dense attention on the same blocks, paired by block; None without such a line."""
    alike = [
        each
        for each in rows
        if each["rule"] == "dense" and all(each[name] == row[name] for name in ("measure", "of", "count", "length"))
    ]
    if not alike or row["measure"] != "loss":
        return None
    ours, dense = (
        np.nanmean(np.array(each["result"]["losses"]).reshape(row["count"], -1), 1) for each in (row, alike[0])
    )
    return mean_interval([float(each) for each in ours - dense])


def ceiling_table(rows: Rows) -> list[Row]:
    """One row per rule, windows and mean window: losses, what they lie above dense attention's, needles found."""
    groups: dict[tuple[str, Any, str], dict[str, str]] = {}
    order = ["dense", *_RULES]
    for row in sorted(rows, key=lambda row: (row["budget"] or 0, order.index(row["rule"]), row["windows"])):
        name = "dense attention" if row["rule"] == "dense" else _RULES[row["rule"]]
        cells = groups.setdefault((row["rule"], row["budget"], row["windows"]), {"rule": name})
        cells |= {"keys per head": str(row["budget"] or "all"), "windows": _WINDOWS.get(row["windows"], "")}
        if row["measure"] == "loss":
            cells[f"{row['of']} loss"] = f"{np.nanmean(np.array(row['result']['losses'])):.3f}"
            gap = gain_over_dense(rows, row)
            if row["rule"] != "dense" and gap is not None:
                cells[f"{row['of']}, above dense"] = str(gap)
        else:
            cells[f"{row['of']}, %"] = f"{100 * np.mean(row['result']['found']):.0f}"
    return list(groups.values())


def ceiling_section(lines: Sequence[Any], folder: Path) -> tuple[Section, dict[str, Any], str]:
    """One file of the study. See `dynamask_lab.report.benchmarks.Benchmark.section`."""
    own = [line for line in lines if line.get("study") == STUDY]
    keyed = {line["key"]: line for line in own}
    text = (
        "Loss in nats per token, and the difference to dense attention on the same blocks with its 95% interval; "
        "needles found, per cent. Windows per head are the same for every rule."
    )
    exhibits = []
    if any(row["measure"] == "loss" for row in own):
        exhibits.append(_curves(own, folder))
    if own:
        exhibits.append(Exhibit("rules", "Rules that choose keys", list(keyed), text, ceiling_table(own)))
    devices = ", ".join(dict.fromkeys(str(line["device"]) for line in own))
    commits = ", ".join(dict.fromkeys(short_commit(line["commit"]) for line in own))
    return Section("", exhibits), keyed, f"{devices}; commit {commits}"


def _curves(rows: Rows, folder: Path) -> Exhibit:
    """Loss above dense attention by window, one line per rule, and needles found."""
    from matplotlib.figure import Figure

    from dynamask.inspect.style import BLACK, BLUE, GREEN, ORANGE, SKY
    from dynamask_lab.report.pictures import save_small

    corpora = sorted({row["of"] for row in rows if row["measure"] == "loss"})
    tasks = sorted({row["of"] for row in rows if row["measure"] == "needle"})
    colours = {"newest": ORANGE, "learned": SKY, "static": BLUE, "query": GREEN}
    figure = Figure(figsize=(4 + 3.6 * (len(corpora) + bool(tasks)), 3.8), layout="constrained")
    panels = figure.subplots(1, len(corpora) + bool(tasks), squeeze=False)[0]
    gaps: dict[tuple[str, str, int, str], float] = {}
    for axes, corpus in zip(panels, corpora, strict=False):
        for rule, colour in colours.items():
            for windows, dash in (("even", "--"), ("heads", "-")):
                points = []
                for row in rows:
                    if (row["rule"], row["windows"], row["of"], row["measure"]) == (rule, windows, corpus, "loss"):
                        gap = gain_over_dense(rows, row)
                        if gap is not None:
                            points.append((row["budget"], gap))
                            gaps[rule, windows, row["budget"], corpus] = gap.mean
                points.sort(key=lambda point: point[0])
                if points:
                    x, y = [budget for budget, _ in points], [gap.mean for _, gap in points]
                    error = [[g.mean - g.low for _, g in points], [g.high - g.mean for _, g in points]]
                    label = f"{_RULES[rule]}, {_WINDOWS[windows]}"
                    axes.errorbar(x, y, yerr=error, fmt=f"o{dash}", color=colour, capsize=2, markersize=4, label=label)
        axes.axhline(0, color=BLACK, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set(title=corpus, xlabel="mean keys per head", ylabel="nats above dense attention")
        axes.grid(alpha=0.3)
    if tasks:
        _draw_needles(panels[-1], rows, colours, BLACK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7)
    picture = save_small(figure, folder / "ceiling.svg")
    budget = max(row["budget"] for row in rows if row["budget"])
    least = min(row["budget"] for row in rows if row["budget"])

    corpus = corpora[-1]

    def told(rule: str, at: int) -> str:
        found = [gap for windows in _WINDOWS if (gap := gaps.get((rule, windows, at, corpus))) is not None]
        return f"{min(found):+.3f}" if found else "not measured"

    first = rows[0]
    text = (
        f"{first['model']} with its attention replaced by a choice of {budget} keys per head on average lies above "
        f"dense attention, on {corpus}, by {told('newest', budget)} nats with the newest keys, "
        f"{told('learned', budget)} with learned ranks, {told('static', budget)} with the static keys of largest "
        f"true future attention, and {told('query', budget)} with the best keys of each query; with {least} keys by "
        f"{told('newest', least)}, {told('learned', least)}, {told('static', least)} and {told('query', least)} (the "
        "better of one window and a window per head). True future attention is what learned ranks predict, so the "
        "gap between these two is what better predictors can win; it is not the static choice of least loss, which "
        "the largest weights do not decide. What remains below it needs a choice that follows the query."
    )
    alt = "loss above dense attention against keys per head, one line per rule, and needles found"
    keys = [row["key"] for row in rows]
    return Exhibit("ceiling", "What each rule loses", keys, text, picture=picture, alt=alt)


def _draw_needles(axes: Any, rows: Rows, colours: Mapping[str, str], black: str) -> None:
    """Needles found by window, mean of the tasks; dense attention as a line."""
    needles = [row for row in rows if row["measure"] == "needle"]
    dense = [row["result"]["found"] for row in needles if row["rule"] == "dense"]
    if dense:
        axes.axhline(100 * float(np.mean(dense)), color=black, linewidth=1)
    for rule, colour in colours.items():
        for windows, dash in (("even", "--"), ("heads", "-")):
            found: dict[int, list[float]] = {}
            for row in needles:
                if (row["rule"], row["windows"]) == (rule, windows):
                    found.setdefault(row["budget"], []).append(100 * float(np.mean(row["result"]["found"])))
            points = sorted((budget, float(np.mean(shares))) for budget, shares in found.items())
            if points:
                axes.plot(*zip(*points, strict=True), f"o{dash}", color=colour, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set(title="needles (line: dense attention)", xlabel="mean keys per head", ylabel="found, %", ylim=(-3, 103))
    axes.grid(alpha=0.3)
