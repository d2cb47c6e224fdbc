"""Exhibit 1: loss against window over context, with the leak."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.inspect.style import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from dynamask_lab.report.exhibits.common import (
    BEST,
    COLOURS,
    CONTROL,
    FRESH,
    NAMES,
    PLAIN,
    Drawn,
    Sweeps,
    any_depth,
    best_losses,
    fresh_runs,
    larger_sweeps,
    millions,
    panels_of,
    rows_of,
    test_gap,
)
from dynamask_lab.report.pictures import save_small
from dynamask_lab.studies import Record
from dynamask_lab.studies.ablation.study import LEAKY, ablation_name, language_settings
from dynamask_lab.studies.scratch.study import scratch_name
from dynamask_lab.sweeps.section import Exhibit, Row
from dynamask_lab.sweeps.verdicts import Interval, mean_interval, paired_difference


def loss_against_window(results: Path, sweeps: Sweeps, folder: Path) -> Drawn | None:
    """Loss above dense attention against window over context; and what the leak of one top-k for all queries gives."""
    panels = _windows_of_sweeps(sweeps)
    leaks = "ablation-leak" if len({run.seed for run in sweeps.get("ablation-leak", ())}) > 1 else "ablation-probe"
    ablation = sweeps.get(leaks, ())
    fresh = fresh_runs(sweeps)
    if not panels or not ablation or ("dense", 1.0) not in fresh:
        return None
    tables = sweeps.get("scratch-tables", ())
    figure, (first, *second, left, right) = panels_of(18 if tables else 14, 3.9, 4 if tables else 3)
    keys = [run.key for runs in fresh.values() for run in runs]
    gap_of = {form: test_gap(fresh, form) for form in fresh}
    for (name, share), gap in gap_of.items():
        label, colour = FRESH[name]
        margins = [[gap.mean - gap.low], [gap.high - gap.mean]]
        first.errorbar(share, gap.mean, yerr=margins, fmt="o", color=colour, capsize=3, label=label)
    first.set(title="4.4M parameters, fresh tokens, three seeds")
    handles, labels = first.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    first.legend(once.values(), once.keys(), fontsize=7)
    for (label, share), runs in panels.items():
        losses = best_losses(runs, any_depth)
        dense = float(np.mean(losses["mha"]))
        for name in (PLAIN, BEST, CONTROL, "swa"):
            if name in losses:
                place = share, float(np.mean(losses[name])) - dense
                left.plot(*place, "o", color=COLOURS[name], markersize=7)
                left.annotate(label, place, textcoords="offset points", xytext=(7, -3), fontsize=6.5)
        keys += [run.key for run in runs if any_depth(run) in (PLAIN, BEST, CONTROL, "swa", "mha")]
    for name in (PLAIN, BEST, CONTROL, "swa"):
        left.plot([], [], "o", color=COLOURS[name], label=NAMES[name])
    left.set(title="4.4M parameters, tokens read repeatedly")
    left.legend(fontsize=7)
    larger = larger_sweeps(sweeps) if tables else []
    if tables:
        _draw_half_rate(tables, second[0])
        shown = ["4.4M (dots)"]
        for name, (marker, title) in zip(larger, _MARKERS, strict=False):
            _draw_half_rate(sweeps[name], second[0], marker)
            shown.append(f"{millions(sweeps[name]):.1f}M ({title})")
        second[0].set(title=f"one rate: {', '.join(shown)}")
    used = [*tables, *(run for name in larger for run in sweeps[name]), *sweeps.get("scratch-rates", ())]
    keys += [run.key for run in used]
    for axes in (first, *second, left):
        axes.axhline(0, color=BLACK, linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="window / context", ylabel="nats above dense attention", xlim=(1 / 24, 1.5))
        axes.set_yscale("symlog", linthresh=0.5 if axes is left else 0.2)
        axes.set_ylim(top=4)
    leak, leak_rows = _leak(ablation, right)
    keys += [run.key for run in ablation]
    narrow = min(share for _, share in fresh)
    between, whole = _between(tables), _at_half_the_rate(sweeps)
    text = (
        "The paper's form has a higher loss than dense attention where its mask drops keys"
        f"{_told_of(whole) if whole else ''}. {leak}"
    )
    size = f"{millions(fresh['dense', 1.0]):.1f}M"
    at_one_rate = ({"1": whole} if whole else {}) | between
    table = [_row("paper above dense attention, one rate", share, gap, size) for share, gap in at_one_rate.items()]
    least = _Gap(gap_of["paper", narrow], len({run.seed for run in fresh["paper", narrow]}))
    table += [_row("paper above dense attention", f"1/{1 / narrow:.0f}", least, size), *leak_rows]
    caption = (
        "Differences of losses with 95% intervals over seeds. One rate: both have the paper's form's, which is half of "
        "dense attention's otherwise."
    )
    alt = "loss above dense attention against window over context; loss of a small model by window, exact and leaky"
    picture = save_small(figure, folder / "loss-window.svg")
    exhibit = Exhibit("loss-window", "Loss against window over context", keys, text, table, picture, alt, caption)
    command = "dynamask experiment scratch --size 4M; dynamask experiment scaling --size small"
    names = (
        "scratch",
        "scratch-rates",
        "scratch-tables",
        *larger,
        "scaling-small",
        "locality-chinchilla",
        leaks,
    )
    size = leaks.removeprefix("ablation-")
    more = f"dynamask experiment locality --size chinchilla; dynamask experiment ablation --size {size}"
    return exhibit, rows_of(sweeps, *names), f"{command}; {more}"


def _test_losses(runs: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Form -> seed -> test loss."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.result.get("test") is not None:
            losses[scratch_name(run.config)][run.seed] = run.result["test"]
    return losses


@dataclass(frozen=True)
class _Gap:
    """A difference of losses, and over how many seeds."""

    found: Interval
    seeds: int

    @classmethod
    def of(cls, dense: Mapping[int, float], ours: Mapping[int, float]) -> _Gap:
        return cls(paired_difference(dense, ours), len(dense.keys() & ours.keys()))


def _at_half_the_rate(sweeps: Sweeps) -> _Gap | None:
    """What is left of the gap at w = N where dense attention has the rate of the paper's form."""
    for name in ("scratch-tables", "scratch-rates"):
        losses = _test_losses(sweeps.get(name, ()))
        gap = _Gap.of(losses.get("dense, half rate", {}), losses.get("paper, w = N", {}))
        if not math.isnan(gap.found.low):
            return gap
    return None


def _told_of(gap: _Gap) -> str:
    """The gap at w = N in words."""
    apart = "not told apart" if gap.found.low <= 0 <= gap.found.high else "told apart"
    return f", and the two are {apart} where the window is as long as the context, as the paper mostly trains"


def _row(loss: str, share: str, gap: _Gap, parameters: str) -> Row:
    row = {"loss": loss, "window / context": share, "nats": str(gap.found)}
    return row | {"parameters": parameters, "seeds": str(gap.seeds)}


def _between(runs: Sequence[Record]) -> dict[str, _Gap]:
    """Window over context -> how far the paper's form ends above dense attention, at one rate for both."""
    losses = _test_losses(runs)
    found = {}
    for share in (2, 4):
        gap = _Gap.of(losses.get("dense, half rate", {}), losses.get(f"paper, w = N/{share}", {}))
        if not math.isnan(gap.found.low):
            found[f"1/{share}"] = gap
    return found


_HALVED = {
    "paper": ("paper", SKY),
    "sliding + sinks, half rate": ("sliding, even windows", RED),
    "learned, half rate, slopes, even": ("even, slopes", PINK),
    "sliding + sinks, half rate, one wide layer": ("sliding", ORANGE),
    "scored, half rate, one wide layer": ("scored, one layer wide (0.1)", GREEN),
    "learned, half rate, slopes, one wide layer": ("recall, slopes", BLUE),
}
"""Forms of size `4M-tables` that exhibits show -> name and colour."""


_MARKERS = (("s", "squares"), ("^", "triangles"), ("D", "diamonds"), ("v", "inverted triangles"))
"""Of the larger models in the panel of one rate, by size."""


def _draw_half_rate(runs: Sequence[Record], axes: Any, marker: str = "o") -> None:
    """Draw the gap to dense attention against window over context, all at half the rate."""
    losses = _test_losses(runs)
    shown = set(axes.get_legend_handles_labels()[1])
    for whole, ours in sorted(losses.items()):
        form, _, at = whole.rpartition(", w = ")
        gap = paired_difference(losses.get("dense, half rate", {}), ours)
        if form not in _HALVED or math.isnan(gap.mean):
            continue
        label, colour = _HALVED[form]
        share = 1 / int(at.partition("/")[2]) if "/" in at else 1.0
        margins = None if math.isnan(gap.low) else [[gap.mean - gap.low], [gap.high - gap.mean]]
        name = None if label in shown else label
        axes.errorbar(share, gap.mean, yerr=margins, fmt=marker, color=colour, capsize=3, label=name)
        shown.add(label)
    axes.set(title="4.4M parameters, fresh tokens, one rate")
    axes.legend(fontsize=7)


def _windows_of_sweeps(sweeps: Sweeps) -> dict[tuple[str, float], list[Record]]:
    """The runs at 4.4M parameters by corpus and window over context, with the dense runs of each sweep."""
    found: dict[tuple[str, float], list[Record]] = {}
    for name in ("scaling-small", "locality-chinchilla"):
        runs = [run for run in sweeps.get(name, ()) if run.config["width"] == 256]
        for corpus in sorted({run.config["corpus"] for run in runs}):
            own = [run for run in runs if run.config["corpus"] == corpus]
            shares = {run.config["window"] / run.config["length"] for run in own if run.config["window"]}
            if shares and any(run.config["attention"] == "mha" for run in own):
                found[corpus, min(shares)] = own
    return found


def _leak(runs: Sequence[Record], axes: Any) -> tuple[str, list[Row]]:
    """Draw the ablation's losses by window; return what the leak costs the model that is trained with it."""
    seeds: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    both: dict[float, list[tuple[float, float]]] = defaultdict(list)
    gained: dict[float, list[float]] = defaultdict(list)  # within a run, whatever build of the corpus it read
    build = Counter(run.corpus for run in runs).most_common(1)[0][0]
    for run in runs:
        name, share = ablation_name(run.config), run.config["window"] / run.config["length"]
        if run.config["attention"] == LEAKY:
            gained[share].append(run.result["exact_loss"] - run.result["leaky_loss"])
        if run.corpus != build:
            continue
        seeds[name][share].append(run.result["loss"])
        if run.config["attention"] == LEAKY:
            both[share].append((run.result["exact_loss"], run.result["leaky_loss"]))
    for share, losses in both.items():
        exact, leaky = (float(np.mean(side)) for side in zip(*losses, strict=True))
        axes.plot([share, share], [exact, leaky], color=PINK, linewidth=1)
        axes.plot(share, exact, "D", color=PINK, label="paper, trained with the leak: exact")
        axes.plot(share, leaky, "D", color=PINK, markerfacecolor="none", label="the same, read with the leak")
    for name, label, colour in (("dma", "0.1's default", BLUE), ("sliding window", "newest keys", RED)):
        points = sorted((share, float(np.mean(losses))) for share, losses in seeds[name].items())
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    for share, own in seeds["dma, paper's form"].items():
        axes.plot(share, float(np.mean(own)), "D", color=SKY, label="paper")
    millions = language_settings(runs[0].config).parameters / 1e6
    counts = sorted({len(own) for by_share in seeds.values() for own in by_share.values()})
    told = (
        f"{counts[0]} seed{'s' if counts[0] > 1 else ''}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="window / context", ylabel="loss, nats per token", title=f"{millions:.1f}M parameters, {told}")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), fontsize=7)
    lost = {share: _Gap(mean_interval(own), len(own)) for share, own in sorted(gained.items(), reverse=True)}
    always = all(gap.found.mean > 0 for gap in lost.values())
    what = "trained with the leak: exact above leaky selection"
    rows = [_row(what, f"1/{1 / share:.0f}", gap, f"{millions:.1f}M") for share, gap in lost.items()]
    trained = {share: float(np.mean(own)) for share, own in seeds["dma, paper's form"].items()}
    flattered = [
        float(np.mean([leaky for _, leaky in losses])) >= trained[s] for s, losses in both.items() if s in trained
    ]
    end = ", and read with the leak it is no better than one trained exactly" if flattered and all(flattered) else ""
    text = (
        "A model trained with the leak (one choice of keys for all queries, which sees the future) has a "
        f"{'higher' if always else 'mostly higher'} loss under exact selection{end}."
    )
    return text, rows
