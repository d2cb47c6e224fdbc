"""Exhibit 2: the effect of choosing keys, as a forest plot."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.evaluation.retrieval import RetrievalScore
from dynamask.inspect.style import BLACK, BLUE, GREEN, ORANGE
from dynamask_lab.report.conversion import PATTERN, form_name, of_main_model, read_conversion
from dynamask_lab.report.exhibits.common import (
    Drawn,
    Sweeps,
    millions,
    rows_of,
    without_window,
)
from dynamask_lab.report.pictures import save_small
from dynamask_lab.studies import Record
from dynamask_lab.studies.judged import LOCALITY, LOCALITY_EVEN, MQAR, MQAR_PUBLISHED, NEEDLE, NEEDLE_FAR
from dynamask_lab.studies.locality.report import without_choice as scores_without_choice
from dynamask_lab.studies.locality.study import variant_name
from dynamask_lab.studies.mqar.study import mixer_name
from dynamask_lab.studies.needle.report import distance, window_of, without_choice
from dynamask_lab.studies.needle.study import NeedleConfig, mean_scores, needle_name
from dynamask_lab.studies.scratch.study import scratch_name
from dynamask_lab.sweeps.section import Exhibit
from dynamask_lab.sweeps.verdicts import LOSS_INTEREST, Interval, mean_interval, paired_difference

_FRESH_PAIRS = (
    ("scratch", "learned, even", "sliding + sinks", "even against newest keys"),
    ("scratch-added", "learned, slopes, even", "sliding + sinks", "even with slopes"),
    ("scratch-added", "learned, slopes, one wide layer", "sliding + sinks, one wide layer", "recall with slopes"),
    (
        "scratch-judged",
        "learned, steep slopes, one wide layer",
        "sliding + sinks, one wide layer",
        "recall with steep slopes",
    ),
    (
        "scratch-rates",
        "scored, half rate, one wide layer",
        "scored, no choice, half rate, one wide layer",
        "scores on the logits, one layer wide",
    ),
    (
        "scratch-tables",
        "learned, half rate, slopes, one wide layer",
        "sliding + sinks, half rate, one wide layer",
        "recall with slopes, half rate",
    ),
    (
        "scratch-tables",
        "scored, half rate, one wide layer",
        "scored, no choice, half rate, one wide layer",
        "scores on the logits, smaller steps",
    ),
    (
        "scratch-tables",
        "learned, half rate, slopes, one wide layer",
        "random, half rate, slopes, one wide layer",
        "recall with slopes, against random ranks",
    ),
    *(
        (
            "scratch-tables",
            f"learned, half rate, slopes, even, w = N/{share}",
            f"sliding + sinks, half rate, w = N/{share}",
            f"even with slopes, w = N/{share}",
        )
        for share in (16, 8, 4, 2)
    ),
    (
        "scratch-tables",
        "learned, half rate, slopes, late head windows",
        "newest, half rate, late head windows",
        "windows per head, set late",
    ),
    ("scratch-reading", "learned, head windows", "newest, head windows", "windows per head, documents of 16K"),
    (
        "scratch-choice-10M",
        "scored, half rate, one wide layer",
        "scored, no choice, half rate, one wide layer",
        "scores on the logits, 20 tokens a parameter",
    ),
)
"""Sweep of study `scratch`, a form that chooses keys, as many newest keys, and a label."""
_LARGER_PAIRS = (
    (
        "learned, half rate, slopes, one wide layer",
        "sliding + sinks, half rate, one wide layer",
        "recall with slopes, 20 tokens a parameter",
    ),
    (
        "scored, half rate, one wide layer",
        "scored, no choice, half rate, one wide layer",
        "scores on the logits, 20 tokens a parameter",
    ),
    (
        "learned, half rate, slopes, one wide layer",
        "random, half rate, slopes, one wide layer",
        "recall with slopes, against random ranks",
    ),
)
"""The same in every sweep `scratch-tables-SIZE`."""
_GROUPS = {"language modelling": BLUE, "conversion": GREEN, "needles": ORANGE, "recall": BLACK}
"""Kind of comparison -> its colour."""
_WIDEST = 0.5
"""Nats: intervals that reach further are cut off in the picture, their figures stand beside it."""


@dataclass(frozen=True)
class _Gain:
    """One comparison of a form that chooses keys with one that does not: its group, label and gain."""

    group: str
    label: str
    found: Interval


_Rows = dict[str, tuple[str, Any]]


def effect_of_choosing(results: Path, sweeps: Sweeps, folder: Path) -> Drawn | None:
    """A forest plot: what choosing keys gives over as many keys without a choice that is learned."""
    rows: _Rows = {}
    losses = [*_gains_from_scratch(sweeps, rows), *_gains_of_conversion(results, rows)]
    shares = _gains_in_retrieval(sweeps, rows)
    if not losses or not shares:
        return None
    converted = [gain for gain in losses if gain.group == "conversion"]
    trained = [gain for gain in losses if gain.group != "conversion"]
    compared = (("loss, converted models", converted), ("loss, from scratch", trained), ("needles and recall", shares))
    better = {name: sum(gain.found.low > 0 for gain in own) for name, own in compared}
    worse = {name: sum(gain.found.high < 0 for gain in own) for name, own in compared}
    lower, lower_trained, found_more = (_how_many(better[name], len(own)) for name, own in compared)
    saved = saved_below_interest([gain.found for gain in trained])
    by = ", by less than the smallest difference of interest" if saved else ""
    text = (
        f"Beside as many keys without a learned choice, choosing lowers the loss in {lower} of the comparisons of "
        f"converted models, and in {lower_trained} of those of models trained from scratch{by}. It finds more "
        f"needles or recalls more in {found_more} of the comparisons."
    )
    table = [
        {
            "what is compared": name,
            "comparisons": str(len(own)),
            "choosing is better": str(better[name]),
            "not told apart": str(len(own) - better[name] - worse[name]),
            "choosing is worse": str(worse[name]),
        }
        for name, own in compared
    ]
    caption = (
        "Better or worse: the 95% interval excludes zero. Intervals are over documents where converted, over examples "
        f"of needles where no seeds are named, else over seeds.{saved}"
    )
    alt = "forest plot of the gain from choosing keys, in loss and in right answers, each with its interval"
    picture = save_small(_forest(losses, shares), folder / "choosing.svg")
    exhibit = Exhibit("choosing", "Effect of choosing", list(rows), text, table, picture, alt, caption)
    command = "dynamask experiment locality | scaling | scratch | needle | mqar; lab/scripts/conversion_gpu.sh"
    return exhibit, rows, command


def _how_many(some: int, every: int) -> str:
    """A share of comparisons in a word."""
    if some in (0, every):
        return "all" if some else "none"
    if some == 1:
        return "one"
    return "half" if 2 * some == every else "most" if 2 * some > every else "few"


def saved_below_interest(gains: Sequence[Interval]) -> str:
    """Tell what choosing saves where it lowers the loss, if all of it lies within the smallest difference of interest.

    Args:
        gains: nats saved by choosing keys, with their intervals.

    Returns:
        A sentence that begins with a space; "" where a gain may matter, or there is none.
    """
    better = [found for found in gains if found.low > 0]
    if not better or max(found.high for found in better) >= LOSS_INTEREST:
        return ""
    most = max(found.mean for found in better)
    return (
        f" From scratch choosing saves at most {most:.3f} nats where it is better, within the {LOSS_INTEREST} nats of "
        'the smallest difference of interest: by that rule "no difference".'
    )


def _gains_from_scratch(sweeps: Sweeps, rows: _Rows) -> list[_Gain]:
    """Loss saved by learned ranks in models trained from scratch."""
    group, gains = "language modelling", []
    locality = sweeps.get("locality-chinchilla", ())
    for form, name in ((LOCALITY_EVEN[1].name, "even windows"), (LOCALITY[1].name, "few layers wide")):
        pairs = _paired(locality, form, scores_without_choice(form))
        if pairs:
            gain = mean_interval([without - chosen for chosen, without in pairs])
            gains.append(_Gain(group, f"4.4M, scored, {name}", gain))
    rows |= rows_of(sweeps, "locality-chinchilla")
    larger = [name for name in sweeps if name.startswith("scratch-tables-")]
    for name, learned, newest, label in (*_FRESH_PAIRS, *((size, *pair) for size in larger for pair in _LARGER_PAIRS)):
        found = _fresh_gain(sweeps.get(name, ()), learned, newest)
        if found is not None:
            gains.append(_Gain(group, f"{millions(sweeps[name]):.1f}M, {label}", found))
            rows |= rows_of(sweeps, name)
    return gains


def _gains_of_conversion(results: Path, rows: _Rows) -> list[_Gain]:
    """Loss saved by learned ranks in a converted model."""
    lines = of_main_model(read_conversion(results))
    model = lines[0]["model"] if lines else ""
    files = {
        line["key"]: file.name
        for file in sorted(results.glob(PATTERN))
        for line in _json_lines(file)
        if line.get("model") == model
    }
    gains = []
    for state in ("frozen", "distilled"):
        for corpus in ("text", "code"):
            gain, used = _converted(lines, state, corpus)
            if gain is not None:
                gains.append(_Gain("conversion", f"135M, {state}, {corpus}", gain))
                rows |= {line["key"]: (f"lab/results/{files[line['key']]}", line) for line in used}
    return gains


def _gains_in_retrieval(sweeps: Sweeps, rows: _Rows) -> list[_Gain]:
    """Right answers gained by chosen keys."""
    gains = []
    slopes, _, level, *_, newest_far = (form.name for form in NEEDLE_FAR)
    for name, learned, newest, form in (
        ("needle-seeds", "dma, learned, head windows", "swa, sinks", "windows per head"),
        ("needle-far", slopes, newest_far, "recall with slopes"),
        ("needle-far", level, newest_far, "recall"),
    ):
        found = _needle_seeds(sweeps.get(name, ()), learned, newest)
        gains += [_Gain("needles", f"{form}, {where}", gain) for where, gain in found]
        if found:
            rows |= rows_of(sweeps, name)
    for name in ("needle-long", "needle-quick"):
        gains += [_Gain("needles", where, gain) for where, gain in _needles(sweeps.get(name, ()))]
    rows |= rows_of(sweeps, "needle-long", "needle-quick")
    start = f"{MQAR_PUBLISHED[-1].name}, from dense"
    for name, best, control, label in (
        ("mqar-quick", MQAR[1].name, MQAR[2].name, "up to 256 pairs, ranks from attention, w/N 1/16"),
        ("mqar-published", MQAR_PUBLISHED[2].name, start, "512 pairs, w/N 1/16, 8 epochs"),
        ("mqar-patient", MQAR_PUBLISHED[2].name, start, "512 pairs, w/N 1/16, 16 epochs"),
    ):
        recall = _recall(sweeps.get(name, ()), best, control)
        if recall is not None:
            gains.append(_Gain("recall", label, recall))
            rows |= rows_of(sweeps, name)
    return gains


def _forest(losses: Sequence[_Gain], shares: Sequence[_Gain]) -> Any:
    """Draw both lists below each other: every gain with its interval, and its figures beside it."""
    from matplotlib.figure import Figure

    lines = len(losses) + len(shares)
    figure = Figure(figsize=(9, 1.6 + 0.24 * lines), layout="constrained")
    panels = figure.subplots(2, 1, height_ratios=(len(losses), len(shares)))
    for axes, gains, scale, digits, label in (
        (panels[0], losses, 1.0, 3, "nats saved by choosing keys"),
        (panels[1], shares, 100.0, 0, "points of right answers gained"),
    ):
        for place, gain in enumerate(reversed(gains)):
            found = gain.found
            low, high = scale * (found.mean - found.low), scale * (found.high - found.mean)
            colour = _GROUPS[gain.group]
            axes.errorbar(scale * found.mean, place, xerr=[[low], [high]], fmt="o", color=colour, capsize=3)
            axes.text(
                1.01, place, found.shown(scale, digits), transform=axes.get_yaxis_transform(), fontsize=7, va="center"
            )
        axes.set_yticks(range(len(gains)), [f"{gain.group}: {gain.label}" for gain in reversed(gains)], fontsize=7)
        axes.axvline(0, color=BLACK, linewidth=1)
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylim(-0.6, len(gains) - 0.4)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(alpha=0.3, axis="x")
    reach = max(abs(bound) for gain in losses for bound in (gain.found.low, gain.found.high))
    if reach > _WIDEST:
        panels[0].set_xlim(-_WIDEST / 2, _WIDEST / 2)
    return figure


def _fresh_gain(runs: Sequence[Record], learned: str, newest: str) -> Interval | None:
    """Test loss saved by learned ranks over the newest keys of as many pairs, in study `scratch`."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.result.get("test") is not None:
            # A form of many windows is named with the one that is meant.
            for name in {without_window(run), scratch_name(run.config)}:
                losses[name][run.seed] = run.result["test"]
    gain = paired_difference(losses.get(learned, {}), losses.get(newest, {}))
    return None if math.isnan(gain.low) else gain


def _needle_seeds(runs: Sequence[Record], learned: str, newest: str) -> list[tuple[str, Interval]]:
    """Exact match gained by learned ranks over newest keys up to the trained length, seed by seed, inside the widest
    window and beyond it. Needles next to the question are left out: any window has them."""
    found: dict[str, dict[int, dict[bool, float]]] = defaultdict(lambda: defaultdict(dict))
    edges = {window_of(run, newest) for run in runs if newest in run.result["loss"]}
    contexts = {NeedleConfig.of(run.config).context for run in runs if newest in run.result["loss"]}
    if not edges:
        return []
    edge, context = max(edges), max(contexts)
    for run in runs:
        scores = [RetrievalScore(**score) for score in run.result["scores"]]
        for inside in (True, False):
            cells = [
                score.exact
                for score in scores
                if score.length <= context and score.depth < 1 and (distance(score) <= edge) == inside
            ]
            if cells and NeedleConfig.of(run.config).context == context:
                found[needle_name(run.config)][run.seed][inside] = float(np.mean(cells))
    made = []
    for inside in (True, False):
        sides = [
            {seed: -both[inside] for seed, both in found.get(name, {}).items() if inside in both}
            for name in (learned, newest)
        ]
        gain = paired_difference(*sides)
        if not math.isnan(gain.low):
            count = len(sides[0].keys() & sides[1].keys())
            made.append((f"{'inside' if inside else 'beyond'} the window, {count} seeds", gain))
    return made


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that a kill cut off is left out."""
    lines = []
    for text in file.read_text(encoding="utf-8").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "key" in line:
            lines.append(line)
    return lines


def _paired(runs: Sequence[Record], form: str, control: str) -> list[tuple[float, float]]:
    """Losses of the form and its control at equal corpus, seed and rate."""
    found: dict[str, dict[tuple[str, int, float], float]] = {form: {}, control: {}}
    for run in runs:
        name = variant_name(run.config)
        if name in found:
            place = (run.config["corpus"], run.seed, run.config["learning_rate"])
            found[name][place] = run.result["loss"]
    return [(found[form][place], found[control][place]) for place in sorted(found[form].keys() & found[control].keys())]


def _converted(
    lines: Sequence[Mapping[str, Any]], state: str, corpus: str
) -> tuple[Interval | None, list[Mapping[str, Any]]]:
    """Loss saved by learned ranks over the newest keys, paired by document: each in its own windows, or in the same."""
    how = "distilled, 400 steps" if state == "distilled" else "model frozen"
    earlier = "distilled" if state == "distilled" else "model frozen"
    compared = (
        (f"windows and slopes by loss, {how}", f"windows by loss, {how}"),
        (earlier, earlier),
    )
    for learned, newest in compared:
        names = {
            f"learned ranks, a window per head, {learned}": "learned",
            f"newest keys, a window per head, {newest}": "newest",
        }
        found: dict[str, Mapping[str, Any]] = {}
        for line in lines:
            spec, settings = line["spec"], line["settings"]
            ranks = names.get(form_name(spec))
            usual = spec["budget"] == 512 and not spec["seed"]
            if ranks and usual and line["measure"] == "continuation" and settings["corpus"] == corpus:
                found.setdefault(ranks, line)
        if len(found) == 2:
            pairs = zip(found["newest"]["result"]["losses"], found["learned"]["result"]["losses"], strict=True)
            return mean_interval([newest - learned for newest, learned in pairs]), list(found.values())
    return None, []


def _needles(runs: Sequence[Record]) -> list[tuple[str, Interval]]:
    """Exact match gained over sliding windows of the same sizes, inside the widest window and beyond it."""
    made = []
    for form in NEEDLE:
        own = [run for run in runs if form.role == "best" and form.name in run.result["loss"]]
        if not own:
            continue
        context, edge = own[0].config["context"], max(own[0].config["layer_windows"])
        cells: dict[str, dict[tuple[str, int, float], Any]] = {}
        for score in mean_scores(runs):
            if score.length <= context and score.depth < 1:
                cells.setdefault(score.model, {})[score.task, score.length, score.depth] = score
        ours, theirs = cells[form.name], cells.get(without_choice(form.name), {})
        for inside in (True, False):
            both = [cell for cell in ours.keys() & theirs.keys() if (distance(ours[cell]) <= edge) == inside]
            if both:
                means = [sum(found[cell].exact for cell in both) / len(both) for found in (ours, theirs)]
                variance = sum(
                    found[cell].exact * (1 - found[cell].exact) / found[cell].samples
                    for found in (ours, theirs)
                    for cell in both
                )
                margin = 1.96 * variance**0.5 / len(both)
                gain = means[0] - means[1]
                place = "inside" if inside else "beyond"
                where = f"ranks from attention, {context} tokens, {place} the window, over answers"
                made.append((where, Interval(gain, gain - margin, gain + margin)))
    return made


def _recall(runs: Sequence[Record], best: str, control: str) -> Interval | None:
    """Accuracy gained by the best form over sliding windows of the same sizes, at width 128, seed by seed."""
    by_rate: dict[str, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        if run.config["width"] == 128:
            by_rate[mixer_name(run.config)][run.config["learning_rate"]][run.seed] = -run.result["accuracy"]
    own = {
        name: min(rates.values(), key=lambda each: float(np.mean([*each.values()]))) for name, rates in by_rate.items()
    }
    gain = paired_difference(own.get(best, {}), own.get(control, {}))
    return None if math.isnan(gain.low) else gain  # one seed has no interval
