"""What the exhibits share: their types, forms with names and colours, and gaps between forms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dynamask.inspect.style import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from dynamask_lab.language.engine import LanguageConfig
from dynamask_lab.studies import Record
from dynamask_lab.studies.judged import SCALING, widest_of, window_share
from dynamask_lab.studies.locality.study import variant_name
from dynamask_lab.studies.scratch.study import scratch_name
from dynamask_lab.sweeps.section import Exhibit
from dynamask_lab.sweeps.verdicts import Interval, paired_difference

Sweeps = Mapping[str, Sequence[Record]]
"""Name of a results file without its suffix -> the runs in it."""
Drawn = tuple[Exhibit, dict[str, tuple[str, Any]], str]
"""An exhibit, its raw rows with their files, and the command of its runs."""

PLAIN, BEST, CONTROL = (form.name for form in SCALING)
COLOURS = {PLAIN: SKY, BEST: BLUE, CONTROL: ORANGE, "mha": BLACK, "swa": RED, "mla": GREEN}
NAMES = {
    PLAIN: "paper",
    BEST: "scored, few layers wide",
    CONTROL: "newest keys, few layers wide",
    "mha": "dense",
    "swa": "newest keys, even",
    "mla": "latent (mla)",
}


def panels_of(width: float, height: float, panels: int, **options: Any) -> tuple[Any, Any]:
    """Make a figure with panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, **options)[0]


def rows_of(sweeps: Sweeps, *names: str) -> dict[str, tuple[str, Any]]:
    """The raw rows of sweeps with their files."""
    return {run.key: (f"lab/results/{name}.jsonl", asdict(run)) for name in names for run in sweeps.get(name, ())}


def best_losses(runs: Sequence[Record], named: Callable[[Record], str]) -> dict[str, list[float]]:
    """Losses by name at the best rate, of runs of one size and corpus."""
    by_rate: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.result["loss"] is not None:
            by_rate[named(run)][run.config["learning_rate"]].append(run.result["loss"])
    return {name: min(rates.values(), key=lambda each: float(np.mean(each))) for name, rates in by_rate.items()}


FRESH = {
    "dense": ("dense", BLACK),
    "paper": ("paper", SKY),
    "sliding + sinks": ("sliding, even windows", RED),
    "learned, even": ("even", BLUE),
    "sliding + sinks, one wide layer": ("sliding", ORANGE),
    "learned, slopes, one wide layer": ("recall, slopes", PINK),
}
"""Forms of study `scratch` that exhibits show -> name and colour."""


def fresh_runs(sweeps: Sweeps, name: str = "scratch") -> dict[tuple[str, float], list[Record]]:
    """Runs of study `scratch` by form and window over context, of forms that exhibits show."""
    found: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for run in sweeps.get(name, ()):
        whole = scratch_name(run.config)
        form, _, at = whole.rpartition(", ")
        share = 1 / int(at.partition("/")[2]) if "/" in at else 1.0
        if (form or whole) in FRESH and run.result.get("test") is not None:
            found[form or whole, share].append(run)
    return dict(found)


def test_gap(found: Mapping[tuple[str, float], Sequence[Record]], form: tuple[str, float]) -> Interval:
    """Test loss above dense attention, seed by seed."""
    ours, dense = ({run.seed: run.result["test"] for run in found[each]} for each in (form, ("dense", 1.0)))
    return paired_difference(dense, ours)


def any_depth(run: Record) -> str:
    """The form of a run of study `scaling`, one name for all numbers of layers."""
    return variant_name(run.config, any_depth=True)


def without_window(run: Record) -> str:
    """The form of a run of study `scratch`, its window left out."""
    name = scratch_name(run.config)
    return name.rpartition(", w = ")[0] or name


def widest_layer(runs: Sequence[Record]) -> str:
    """The share of dense attention's pairs in the widest layer or head of runs: "57%"; "" where all are as wide."""
    widest = window_share(widest_of(runs)).partition(" (")[2]
    return widest.rpartition(": ")[2].partition(" ")[0]


def larger_sweeps(sweeps: Sweeps) -> list[str]:
    """The sweeps of larger models on fresh tokens in which dense attention ran, the largest models last."""
    found = {
        name: millions(runs)
        for name, runs in sweeps.items()
        if name.startswith("scratch-tables-") and any(without_window(run) == "dense, half rate" for run in runs)
    }
    return sorted(found, key=lambda name: found[name])


def millions(runs: Sequence[Record]) -> float:
    """Parameters of the models of a sweep of one size, in millions."""
    return LanguageConfig.of(runs[0].config).parameters / 1e6
