"""Exhibit 3: loss against step, with the gap to dense attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.inspect.style import BLACK, BLUE, GREEN, ORANGE
from dynamask_lab.report.exhibits.common import (
    BEST,
    COLOURS,
    CONTROL,
    FRESH,
    NAMES,
    Drawn,
    Sweeps,
    any_depth,
    fresh_runs,
    larger_sweeps,
    millions,
    rows_of,
    widest_layer,
    without_window,
)
from dynamask_lab.report.pictures import save_small
from dynamask_lab.studies import Record
from dynamask_lab.studies.judged import pairs_of
from dynamask_lab.studies.scaling.report import loss_by_step
from dynamask_lab.sweeps.section import Exhibit


def loss_against_step(results: Path, sweeps: Sweeps, folder: Path) -> Drawn | None:
    """The lead over dense attention by step and by position, at the largest size."""
    runs = sweeps.get("scaling-small", ())
    width = max((run.config["width"] for run in runs), default=0)
    by_name: dict[str, list[Record]] = defaultdict(list)
    for run in runs:
        if run.config["width"] == width:
            by_name[any_depth(run)].append(run)
    if "mha" not in by_name or BEST not in by_name:
        return None
    dense = loss_by_step(by_name["mha"])
    from matplotlib.figure import Figure

    larger = larger_sweeps(sweeps)
    lines = 2 + len(larger)
    figure = Figure(figsize=(12, 3.5 * lines), layout="constrained")
    panels_by_line = figure.subplots(lines, 3)
    below, (left, middle, right) = panels_by_line[0], panels_by_line[-1]
    keys = [run.key for run in by_name["mha"]]
    left.plot(list(dense), list(dense.values()), "s--", color=BLACK, label="dense", markersize=4)
    gaps: dict[str, dict[int, float]] = {}
    positions = _by_position(by_name["mha"])
    for name in (BEST, CONTROL, "swa", "mla"):
        own = loss_by_step(by_name.get(name, [])) if by_name.get(name) else {}
        gaps[name] = {step: dense[step] - own[step] for step in own if step in dense}
        if own:
            keys += [run.key for run in by_name[name]]
            style = {"color": COLOURS[name], "label": NAMES[name], "markersize": 4}
            left.plot(list(own), list(own.values()), "o-", **style)
            middle.plot(list(gaps[name]), list(gaps[name].values()), "o-", **style)
            places = _by_position(by_name[name])
            right.plot(list(places), [positions[place] - loss for place, loss in places.items()], "o-", **style)
    keys += _fresh_by_step(sweeps, below)
    leads = []
    for name, panels in zip(larger, panels_by_line[1:], strict=False):
        keys += [run.key for run in sweeps[name]]
        leads += _draw_larger(sweeps[name], panels)
    for panels in panels_by_line:
        for axes in panels[1:]:
            axes.axhline(0, color=BLACK, linestyle="--", linewidth=1)
            axes.set_ylabel("nats below dense attention")
        panels[0].set(xlabel="step", ylabel="validation loss", xscale="log")
        panels[1].set(xlabel="step", xscale="log")
        panels[2].set(xlabel="position in the sequence, at the end")
        panels[2].set_xscale("log", base=2)
        panels[0].legend(fontsize=7)
    lead = gaps[BEST]
    most, last = max(lead, key=lambda step: lead[step]), max(lead)
    size = by_name["mha"][0].result["parameters"]["non_embedding"] / 1e6
    left.set_title(f"{size:.1f}M parameters, tokens read repeatedly,\none seed, wide layers see 97%", fontsize=9)
    leads.append(_Lead(by_name[BEST], f"{size:.1f}M", most, lead[most], lead[last]))
    left_over = max(lead.last / lead.most for lead in leads)
    end = "keep less than a tenth of that lead" if left_over < 0.1 else "keep a part of that lead"
    text = (
        f"Sparse forms with scores on the logits lead dense attention early in training, and at the end they {end}. "
        "That is faster learning, not a better model."
    )
    table = [
        {
            "parameters": lead.size,
            "greatest lead, nats": f"{lead.most:+.2f}",
            "after steps": f"{lead.step:,}",
            "lead at the end, nats": f"{lead.last:+.3f}",
            "pairs": pairs_of([*lead.runs]),
            "widest layer": widest_layer(lead.runs),
            "seeds": str(len({run.seed for run in lead.runs})),
        }
        for lead in leads
    ]
    caption = (
        "Lead: how far the validation loss of the form with scores lies below dense attention's, mean over seeds. "
        "Pairs: share of dense attention's; widest layer: the share of its pairs."
    )
    alt = "validation loss by step, and the gap to dense attention by step and by position"
    picture = save_small(figure, folder / "loss-step.svg")
    exhibit = Exhibit("loss-step", "Loss against step", keys, text, table, picture, alt, caption)
    sizes = " | ".join(("4M", *(f"{name.rpartition('-')[2]}-tables" for name in larger)))
    command = f"dynamask experiment scratch --size {sizes}; dynamask experiment scaling --size small"
    return exhibit, rows_of(sweeps, "scratch", "scaling-small", *larger), command


def _fresh_by_step(sweeps: Sweeps, panels: Any) -> list[str]:
    """Draw loss and gap to dense attention of study `scratch`; the keys of the runs."""
    fresh = fresh_runs(sweeps)
    if ("dense", 1.0) not in fresh:
        return []
    dense, positions = loss_by_step(fresh["dense", 1.0]), _by_position(fresh["dense", 1.0])
    gaps: dict[tuple[str, float], dict[int, float]] = {}
    for (name, share), runs in fresh.items():
        own, places = loss_by_step(runs), _by_position(runs)
        label, colour = FRESH[name]
        style = {"color": colour, "label": f"{label}, w/N 1/{1 / share:.0f}" if share < 1 else label, "markersize": 4}
        panels[0].plot(list(own), list(own.values()), "s--" if name == "dense" else "o-", **style)
        if name == "dense" or (name == "paper" and share < 1):
            continue  # far below the others, so that their gaps would not be seen
        gaps[name, share] = {step: dense[step] - own[step] for step in own if step in dense}
        panels[1].plot(list(gaps[name, share]), list(gaps[name, share].values()), "o-", **style)
        panels[2].plot(list(places), [positions[place] - loss for place, loss in places.items()], "o-", **style)
    panels[0].set_title("4.4M parameters, fresh tokens, three seeds", fontsize=9)
    return [run.key for runs in fresh.values() for run in runs]


@dataclass(frozen=True)
class _Lead:
    """A form's lead over dense attention in nats: the greatest, after how many steps, and the last; in which runs."""

    runs: Sequence[Record]
    size: str
    step: int
    most: float
    last: float


_LARGER = {
    "dense, half rate": ("dense", BLACK),
    "scored, half rate, one wide layer": ("scored, one layer wide (0.1)", GREEN),
    "sliding + sinks, half rate, one wide layer": ("sliding", ORANGE),
    "learned, half rate, slopes, one wide layer": ("recall, slopes", BLUE),
}
"""Forms of the largest models on fresh tokens -> name and colour."""


def _draw_larger(runs: Sequence[Record], panels: Any) -> list[_Lead]:
    """Draw loss and gap to dense attention of larger models on fresh tokens; the lead of scores on the logits."""
    forms: dict[str, list[Record]] = defaultdict(list)
    shared = {run.seed for run in runs if without_window(run) == "dense, half rate"}
    for run in runs:
        if run.seed in shared:  # means of other seeds do not compare
            forms[without_window(run)].append(run)
    dense, positions = loss_by_step(forms["dense, half rate"]), _by_position(forms["dense, half rate"])
    leads = []
    for name, (label, colour) in _LARGER.items():
        if name not in forms:
            continue
        own, places = loss_by_step(forms[name]), _by_position(forms[name])
        style = {"color": colour, "label": label, "markersize": 4}
        panels[0].plot(list(own), list(own.values()), "s--" if label == "dense" else "o-", **style)
        if label == "dense":
            continue
        gaps = {step: dense[step] - own[step] for step in own if step in dense}
        panels[1].plot(list(gaps), list(gaps.values()), "o-", **style)
        panels[2].plot(list(places), [positions[place] - loss for place, loss in places.items()], "o-", **style)
        most, last = max(gaps, key=lambda step: gaps[step]), max(gaps)
        if name.startswith("scored"):
            leads.append(_Lead(forms[name], f"{millions(runs):.1f}M", most, gaps[most], gaps[last]))
    size = millions(runs)
    seeds = max(len(own) for own in forms.values())
    counted = "one seed" if seeds == 1 else f"{seeds} seeds"
    panels[0].set_title(f"{size:.1f}M parameters, 20 fresh tokens a parameter, {counted}", fontsize=9)
    return leads


def _by_position(runs: Sequence[Record]) -> dict[float, float]:
    found: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        for bucket in run.result["positions"]:
            found[(bucket["from"] + bucket["to"]) / 2].append(bucket["loss"])
    return {place: float(np.mean(losses)) for place, losses in sorted(found.items())}
