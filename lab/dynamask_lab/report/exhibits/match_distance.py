"""Exhibit 4: exact match against the distance from needle to question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.inspect.style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY
from dynamask_lab.report.exhibits.common import Drawn, Sweeps, panels_of, rows_of
from dynamask_lab.report.pictures import save_small
from dynamask_lab.studies import Record
from dynamask_lab.studies.judged import NEEDLE
from dynamask_lab.studies.needle.report import distance
from dynamask_lab.studies.needle.study import NeedleConfig, mean_scores, needle_name
from dynamask_lab.sweeps.section import Exhibit


def match_against_distance(results: Path, sweeps: Sweeps, folder: Path) -> Drawn | None:
    """Exact match against the distance from needle to question, with the window's edge."""
    runs = sweeps.get("needle-long", ())
    if not runs:
        return None
    context = NeedleConfig.of(runs[0].config).context
    plain, best, control = (form.name for form in (NEEDLE[0], NEEDLE[1], NEEDLE[3]))
    shown = {
        "mha": ("dense", BLACK),
        best: ("0.1's ranks, two layers wide", BLUE),
        "dma, from dense, ranked by attention^4": ("0.1's ranks, even windows", GREEN),
        "dma, upcycled, ranked by attention^4": ("0.1's ranks, upcycled", PINK),
        control: ("newest keys, two layers wide", ORANGE),
        plain: ("paper", SKY),
    }
    cells: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score in mean_scores(runs):
        if score.depth < 1 and score.model in shown:
            cells[score.model][distance(score)].append(score.exact)
    figure, (axes, right) = panels_of(13, 4, 2)
    seeds_text, seeds_keys = _distance_over_seeds(sweeps.get("needle-seeds", ()), right)
    for name, (label, colour) in shown.items():
        points = sorted((place, 100 * float(np.mean(found))) for place, found in cells[name].items())
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=4)
    edges = {512: "even window", 1280: "widest layer", context // 2: "longest example trained on"}
    for edge, label in edges.items():
        axes.axvline(edge, color=GREY, linestyle=":")
        _name_edge(axes, edge, label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens from the needle to the question", ylabel="exact match, %", ylim=(-3, 103))
    axes.set_title("12.9M parameters, trained at 4,096 tokens, one seed", fontsize=9)
    axes.legend(fontsize=7.5)

    def beyond(name: str) -> float:
        values = [v for place, found in cells[name].items() if 1280 < place <= context for v in found]
        return float(np.mean(values))

    furthest = max(
        float(np.mean([value for place, values in cells[name].items() if place > context for value in values]))
        for name in shown
    )
    text = (
        f"Between the widest layer's window of 1,280 and the training length of {context:,} tokens dense attention "
        f"finds {beyond('mha'):.0%}, chosen keys {beyond(best):.0%}, newest keys in the same windows "
        f"{beyond(control):.0%} (one training seed){seeds_text}. Beyond the training length the best form of all "
        f"finds {furthest:.0%}."
    )
    picture = save_small(figure, folder / "match-distance.svg")
    alt = "exact match against distance from needle to question, one line per form, window edges drawn"
    keys = [run.key for run in runs] + seeds_keys
    exhibit = Exhibit("match-distance", "Exact match against distance", keys, text, picture=picture, alt=alt)
    command = "dynamask experiment needle --size long; dynamask experiment needle --size seeds"
    return exhibit, rows_of(sweeps, "needle-long", "needle-seeds"), command


def _name_edge(axes: Any, edge: int, label: str) -> None:
    """Write what a vertical line stands for beside it, legible over the curves."""
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5}
    place = {"rotation": 90, "va": "bottom", "ha": "right", "bbox": behind, "zorder": 1}
    axes.annotate(f"{label} {edge}", (edge, 4), textcoords="offset points", xytext=(-2, 0), fontsize=7, **place)


def _distance_over_seeds(runs: Sequence[Record], axes: Any) -> tuple[str, list[str]]:
    """Draw exact match against distance of forms with several training seeds; a clause, and the keys of the runs."""
    if not runs:
        axes.set_axis_off()
        return "", []
    settings = NeedleConfig.of(runs[0].config)
    window = min(run.config["window"] for run in runs if run.config["window"])
    shown = {
        "mha": ("dense", BLACK),
        "dma, learned, head windows": ("learned ranks, windows per head", BLUE),
        "swa, sinks": ("sliding, even windows", RED),
    }
    cells: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score in mean_scores(runs):
        if score.depth < 1 and score.model in shown:
            cells[score.model][distance(score)].append(score.exact)
    for name, (label, colour) in shown.items():
        points = sorted((place, 100 * float(np.mean(found))) for place, found in cells[name].items())
        count = sum(needle_name(run.config) == name for run in runs)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=f"{label}, {count} seeds", markersize=4)
    for edge, label in ((window, "window"), (settings.context // 2, "longest example"), (settings.context, "context")):
        axes.axvline(edge, color=GREY, linestyle=":")
        _name_edge(axes, edge, label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens from the needle to the question", ylabel="exact match, %", ylim=(-3, 103))
    axes.set_title(f"12.9M parameters, trained at {settings.context:,} tokens, w/N 1/16", fontsize=9)
    axes.legend(fontsize=7.5)

    counts = [sum(needle_name(run.config) == name for run in runs) for name in shown]
    least, most = min(counts), max(counts)

    def within(name: str) -> float:
        longest = settings.context // 2
        values = [v for place, found in cells[name].items() if window < place <= longest for v in found]
        return float(np.mean(values))

    text = (
        f"; with a window of a sixteenth in every layer, beyond it and within the longest example, dense attention "
        f"finds {within('mha'):.0%}, learned ranks {within('dma, learned, head windows'):.0%} and newest keys "
        f"{within('swa, sinks'):.0%} ({least} to {most} training seeds)"
    )
    return text, [run.key for run in runs]
