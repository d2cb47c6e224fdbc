"""Exhibit 2: the effect of choosing keys, as a forest plot."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.inspect.style import BLACK, BLUE
from dynamask_lab.language.engine import LanguageConfig
from dynamask_lab.report.conversion import PATTERN, form_name, of_main_model, read_conversion
from dynamask_lab.report.exhibits.common import (
    BEST,
    CONTROL,
    Drawn,
    Sweeps,
    any_depth,
    best_losses,
    panels_of,
    rows_of,
    without_window,
)
from dynamask_lab.report.pictures import save_small
from dynamask_lab.studies import Record
from dynamask_lab.studies.judged import LOCALITY, LOCALITY_EVEN, MQAR, MQAR_PUBLISHED, NEEDLE
from dynamask_lab.studies.locality.report import without_choice as scores_without_choice
from dynamask_lab.studies.locality.study import variant_name
from dynamask_lab.studies.mqar.study import mixer_name
from dynamask_lab.studies.needle.report import distance, without_choice
from dynamask_lab.studies.needle.study import NeedleConfig, mean_scores, needle_name
from dynamask_lab.sweeps.section import Exhibit
from dynamask_lab.sweeps.verdicts import Interval, SeedSpread, mean_interval, paired_difference


def effect_of_choosing(results: Path, sweeps: Sweeps, folder: Path) -> Drawn | None:
    """A forest plot: what choosing keys gives over as many keys without a choice that is learned."""
    losses: list[tuple[str, Interval]] = []
    shares: list[tuple[str, Interval]] = []
    rows: dict[str, tuple[str, Any]] = {}
    locality = sweeps.get("locality-chinchilla", ())
    for form, name in ((LOCALITY_EVEN[1].name, "even windows"), (LOCALITY[1].name, "few layers wide")):
        pairs = _paired(locality, form, scores_without_choice(form))
        if pairs:
            losses.append((f"from scratch, 4.4M, {name}", mean_interval([b - a for a, b in pairs])))
    scaling = [run for run in sweeps.get("scaling-small", ()) if run.config["width"] == 256]
    own = best_losses(scaling, any_depth)
    if BEST in own and CONTROL in own:
        spread = SeedSpread.pooled(list(own.values()))
        losses.append(("from scratch, 4.4M, code + text, w/N 1/8", spread.difference(own[BEST], own[CONTROL])))
    rows |= rows_of(sweeps, "locality-chinchilla", "scaling-small")
    for name, learned, newest, label in (
        ("scratch", "learned, even", "sliding + sinks", "fresh tokens, w/N 1/16"),
        ("scratch-added", "learned, slopes, even", "sliding + sinks", "fresh tokens, slopes, w/N 1/16"),
        (
            "scratch-added",
            "learned, slopes, one wide layer",
            "sliding + sinks, one wide layer",
            "fresh tokens, slopes, one layer wide",
        ),
        (
            "scratch-judged",
            "learned, steep slopes, one wide layer",
            "sliding + sinks, one wide layer",
            "fresh tokens, steep slopes, one layer wide",
        ),
        (
            "scratch-rates",
            "scored, half rate, one wide layer",
            "scored, no choice, half rate, one wide layer",
            "fresh tokens, scores on the logits, one layer wide",
        ),
        (
            "scratch-tables",
            "learned, half rate, slopes, one wide layer",
            "sliding + sinks, half rate, one wide layer",
            "fresh tokens, slopes, one layer wide, half rate",
        ),
        (
            "scratch-tables-10M",
            "learned, half rate, slopes, one wide layer",
            "sliding + sinks, half rate, one wide layer",
            "20 fresh tokens a parameter, slopes, one layer wide",
        ),
        ("scratch-reading", "learned, head windows", "newest, head windows", "documents of 16K, windows per head"),
    ):
        gain = _fresh_gain(sweeps.get(name, ()), learned, newest)
        if gain is not None:
            size = LanguageConfig.of(sweeps[name][0].config).parameters / 1e6
            losses.append((f"from scratch, {size:.1f}M, {label}", gain))
            rows |= rows_of(sweeps, name)
    lines = of_main_model(read_conversion(results))
    model = lines[0]["model"] if lines else ""
    files = {
        line["key"]: file.name
        for file in sorted(results.glob(PATTERN))
        for line in _json_lines(file)
        if line.get("model") == model
    }
    for state in ("frozen", "distilled"):
        for corpus in ("text", "code"):
            gain, used = _converted(lines, state, corpus)
            if gain is not None:
                losses.append((f"converted 135M, {state}, {corpus}", gain))
                rows |= {line["key"]: (f"lab/results/{files[line['key']]}", line) for line in used}
    for name, learned, newest in (
        ("needle-seeds", "dma, learned, head windows", "swa, sinks"),
        ("needle-far", "dma, learned, slopes, windows 16/352", "swa, sinks, windows 16/352"),
        ("needle-far", "dma, learned, windows 16/352", "swa, sinks, windows 16/352"),
    ):
        seeds = _needle_seeds(sweeps.get(name, ()), learned, newest)
        if seeds is not None:
            shares.append(seeds)
            rows |= rows_of(sweeps, name)
    for name in ("needle-long", "needle-quick"):
        for where, gain in _needles(sweeps.get(name, ())):
            shares.append((where, gain))
    rows |= rows_of(sweeps, "needle-long", "needle-quick")
    recall = _recall(sweeps.get("mqar-quick", ()), MQAR[1].name, MQAR[2].name)
    if recall is not None:
        shares.append(("associative recall, width 128, w/N 1/16", recall))
        rows |= rows_of(sweeps, "mqar-quick")
    start = f"{MQAR_PUBLISHED[-1].name}, from dense"
    recall = _recall(sweeps.get("mqar-published", ()), MQAR_PUBLISHED[3].name, start)
    if recall is not None:
        shares.append(("associative recall, 512 pairs, width 128, w/N 1/16", recall))
        rows |= rows_of(sweeps, "mqar-published")
    if not losses or not shares:
        return None
    figure, (left, right) = panels_of(10.5, 0.9 + 0.33 * max(len(losses), len(shares)), 2)
    for axes, points, scale, label in (
        (left, losses, 1.0, "nats saved by choosing keys"),
        (right, shares, 100.0, "points of right answers gained"),
    ):
        for place, (_, found) in enumerate(reversed(points)):
            low, high = scale * (found.mean - found.low), scale * (found.high - found.mean)
            axes.errorbar(scale * found.mean, place, xerr=[[low], [high]], fmt="o", color=BLUE, capsize=3)
        axes.set_yticks(range(len(points)), [name for name, _ in reversed(points)], fontsize=7.5)
        axes.axvline(0, color=BLACK, linewidth=1)
        axes.set(xlabel=label, ylim=(-0.6, len(points) - 0.4))
        axes.grid(alpha=0.3, axis="x")
    better = sum(found.low > 0 for _, found in losses)
    found_more = sum(found.low > 0 for _, found in shares)
    text = (
        f"Choosing keys lowers the loss in {better} of {len(losses)} comparisons with as many keys without a learned "
        f"choice, and finds more in {found_more} of {len(shares)} (95% intervals that exclude zero). Intervals of "
        "models from scratch cover seeds, those of converted models documents, and those of needles the examples of "
        "one training seed, where no seeds are named."
    )
    alt = "forest plot of the gain from choosing keys, in loss and in right answers, each with its interval"
    picture = save_small(figure, folder / "choosing.svg")
    exhibit = Exhibit("choosing", "Effect of choosing", list(rows), text, picture=picture, alt=alt)
    return exhibit, rows, "dynamask experiment locality | scaling | needle | mqar; lab/scripts/conversion_gpu.sh"


def _fresh_gain(runs: Sequence[Record], learned: str, newest: str) -> Interval | None:
    """Test loss saved by learned ranks over the newest keys of as many pairs, in study `scratch`."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.result.get("test") is not None:
            losses[without_window(run)][run.seed] = run.result["test"]
    gain = paired_difference(losses.get(learned, {}), losses.get(newest, {}))
    return None if math.isnan(gain.low) else gain


def _needle_seeds(runs: Sequence[Record], learned: str, newest: str) -> tuple[str, Interval] | None:
    """Exact match gained by learned ranks over newest keys within the examples' length, seed by seed."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        longest = NeedleConfig.of(run.config).context // 2
        cells = [score["exact"] for score in run.result["scores"] if score["length"] <= longest]
        found[needle_name(run.config)][run.seed] = float(np.mean(cells))
    ours, theirs = found.get(learned, {}), found.get(newest, {})
    gain = paired_difference({seed: -share for seed, share in ours.items()}, {s: -share for s, share in theirs.items()})
    if math.isnan(gain.low):
        return None
    form = "" if "head windows" in learned else ", one wide layer" + (", slopes" if "slopes" in learned else "")
    count = len(ours.keys() & theirs.keys())
    return f"needles, w/N 1/16{form}, within the examples' length, {count} seeds", gain


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
                where = f"needles, trained at {context}, {'inside' if inside else 'beyond'} the window"
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
