"""The exhibits that open `docs/results`: each a picture of raw lines, two sentences, and the command of its runs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.inspect.style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY
from dynamask_lab.language.engine import LanguageConfig
from dynamask_lab.report.conversion import PATTERN, form_name, of_main_model, read_conversion
from dynamask_lab.report.pictures import save_small
from dynamask_lab.studies import Record
from dynamask_lab.studies.ablation.study import LEAKY, ablation_name, language_settings
from dynamask_lab.studies.ceiling.report import ceiling_exhibit
from dynamask_lab.studies.judged import LOCALITY, LOCALITY_EVEN, MQAR, MQAR_PUBLISHED, NEEDLE, SCALING
from dynamask_lab.studies.locality.report import without_choice as scores_without_choice
from dynamask_lab.studies.locality.study import variant_name
from dynamask_lab.studies.mqar.study import mixer_name
from dynamask_lab.studies.needle.report import distance, without_choice
from dynamask_lab.studies.needle.study import NeedleConfig, mean_scores, needle_name
from dynamask_lab.studies.scaling.report import loss_by_step
from dynamask_lab.studies.scratch.study import scratch_name
from dynamask_lab.sweeps.section import Exhibit
from dynamask_lab.sweeps.verdicts import Interval, SeedSpread, mean_interval, paired_difference

Sweeps = Mapping[str, Sequence[Record]]
"""Name of a results file without its suffix -> the runs in it."""
Drawn = tuple[Exhibit, dict[str, tuple[str, Any]], str]
"""An exhibit, its raw rows with their files, and the command of its runs."""

_PLAIN, _BEST, _CONTROL = (form.name for form in SCALING)
_COLOURS = {_PLAIN: SKY, _BEST: BLUE, _CONTROL: ORANGE, "mha": BLACK, "swa": RED, "mla": GREEN}
_NAMES = {
    _PLAIN: "the paper's form",
    _BEST: "0.1's ranks, few layers wide",
    _CONTROL: "newest keys, few layers wide",
    "mha": "dense",
    "swa": "newest keys, even",
    "mla": "latent (mla)",
}


def exhibits(results: Path, sweeps: Sweeps, folder: Path) -> list[Drawn]:
    """Draw every exhibit that has raw lines.

    Args:
        results: folder of raw lines.
        sweeps: the runs of the experiments in it.
        folder: for the pictures.
    """
    draw: list[Callable[[Path, Sweeps, Path], Drawn | None]] = [
        loss_against_window,
        effect_of_choosing,
        loss_against_step,
        match_against_distance,
        cost,
        ceiling_exhibit,
    ]
    return [found for each in draw if (found := each(results, sweeps, folder)) is not None]


def _figure(width: float, height: float, panels: int, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, **options)[0]


def _rows(sweeps: Sweeps, *names: str) -> dict[str, tuple[str, Any]]:
    return {run.key: (f"lab/results/{name}.jsonl", _plain(run)) for name in names for run in sweeps.get(name, ())}


def _plain(run: Record) -> dict[str, Any]:
    return asdict(run)


def _losses(runs: Sequence[Record], named: Callable[[Record], str]) -> dict[str, list[float]]:
    """Losses by name at the best rate, of runs of one size and corpus."""
    by_rate: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.result["loss"] is not None:
            by_rate[named(run)][run.config["learning_rate"]].append(run.result["loss"])
    return {name: min(rates.values(), key=lambda each: float(np.mean(each))) for name, rates in by_rate.items()}


_FRESH = {
    "dense": ("dense", BLACK),
    "paper": ("the paper's form", SKY),
    "sliding + sinks": ("newest keys and sinks", RED),
    "learned, even": ("learned ranks", BLUE),
    "sliding + sinks, one wide layer": ("newest keys, one layer wide", ORANGE),
    "learned, slopes, one wide layer": ("learned ranks with slopes, one layer wide", PINK),
}
"""Forms of study `scratch` that exhibits show -> name and colour."""


def _fresh(sweeps: Sweeps, name: str = "scratch") -> dict[tuple[str, float], list[Record]]:
    """Runs of study `scratch` by form and window over context, of forms that exhibits show."""
    found: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for run in sweeps.get(name, ()):
        whole = scratch_name(run.config)
        form, _, at = whole.rpartition(", ")
        share = 1 / int(at.partition("/")[2]) if "/" in at else 1.0
        if (form or whole) in _FRESH and run.result.get("test") is not None:
            found[form or whole, share].append(run)
    return dict(found)


def _test_gap(found: Mapping[tuple[str, float], Sequence[Record]], form: tuple[str, float]) -> Interval:
    """Test loss above dense attention, seed by seed."""
    ours, dense = ({run.seed: run.result["test"] for run in found[each]} for each in (form, ("dense", 1.0)))
    return paired_difference(dense, ours)


def _above(gap: Interval) -> str:
    """A gap in words: "0.108 nats [0.036 to 0.180] below"."""
    low, high = sorted((abs(gap.low), abs(gap.high))) if gap.low * gap.high > 0 else (gap.low, gap.high)
    return f"{abs(gap.mean):.3f} nats [{low:.3f} to {high:.3f}] {'above' if gap.mean > 0 else 'below'}"


def loss_against_window(results: Path, sweeps: Sweeps, folder: Path) -> Drawn | None:
    """Loss above dense attention against window over context; and what the leak of one top-k for all queries gives."""
    panels = _windows_of_sweeps(sweeps)
    leaks = "ablation-leak" if len({run.seed for run in sweeps.get("ablation-leak", ())}) > 1 else "ablation-probe"
    ablation = sweeps.get(leaks, ())
    fresh = _fresh(sweeps)
    if not panels or not ablation or ("dense", 1.0) not in fresh:
        return None
    tables = sweeps.get("scratch-tables", ())
    figure, (first, *second, left, right) = _figure(18 if tables else 14, 3.9, 4 if tables else 3)
    keys = [run.key for runs in fresh.values() for run in runs]
    gap_of = {form: _test_gap(fresh, form) for form in fresh}
    for (name, share), above in gap_of.items():
        label, colour = _FRESH[name]
        margins = [[above.mean - above.low], [above.high - above.mean]]
        first.errorbar(share, above.mean, yerr=margins, fmt="o", color=colour, capsize=3, label=label)
    first.set(title="4.4M parameters, fresh tokens, three seeds")
    handles, labels = first.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    first.legend(once.values(), once.keys(), fontsize=7)
    for (label, share), runs in panels.items():
        losses = _losses(runs, _any_depth)
        dense = float(np.mean(losses["mha"]))
        for name in (_PLAIN, _BEST, _CONTROL, "swa"):
            if name in losses:
                gap = float(np.mean(losses[name])) - dense
                left.plot(share, gap, "o", color=_COLOURS[name], markersize=7)
                left.annotate(label, (share, gap), textcoords="offset points", xytext=(7, -3), fontsize=6.5)
        keys += [run.key for run in runs if _any_depth(run) in (_PLAIN, _BEST, _CONTROL, "swa", "mha")]
    for name in (_PLAIN, _BEST, _CONTROL, "swa"):
        left.plot([], [], "o", color=_COLOURS[name], label=_NAMES[name])
    left.set(title="4.4M parameters, tokens read repeatedly")
    left.legend(fontsize=7)
    larger = sweeps.get("scratch-tables-10M", ())
    halved = _shares_at_half_rate(tables, second[0]) if tables else ""
    if second and larger:
        _shares_at_half_rate(larger, second[0], "s")
        second[0].set(title="fresh tokens, one rate: 4.4M (dots), 10.0M (squares)")
    keys += [run.key for run in (*tables, *larger)]
    for axes in (first, *second, left):
        axes.axhline(0, color=BLACK, linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="window / context", ylabel="nats above dense attention", xlim=(1 / 24, 1.5))
        axes.set_yscale("symlog", linthresh=0.5 if axes is left else 0.2)
    leak = _leak(ablation, right)
    keys += [run.key for run in ablation]
    narrow = min(share for _, share in fresh)
    told = [_above(gap_of[form]) for form in (("paper", 1.0), ("paper", narrow), ("sliding + sinks", narrow))]
    text = (
        f"With a window as long as the context, as the paper mostly trains, its form ends {told[0]} dense attention; "
        f"with 1/{1 / narrow:.0f} of the context {told[1]} it, and newest keys with sinks {told[2]} it. The leak (one "
        "choice of keys for all queries, which sees the future) lowers the loss of a model trained with it by "
        f"{leak} nats, which exact selection then loses."
    )
    text += _at_half_the_rate(sweeps) + halved
    alt = "loss above dense attention against window over context; loss of a small model by window, exact and leaky"
    picture = save_small(figure, folder / "loss-window.svg")
    exhibit = Exhibit("loss-window", "Loss against window over context", keys, text, picture=picture, alt=alt)
    command = "dynamask experiment scratch --size 4M; dynamask experiment scaling --size small"
    names = ("scratch", "scratch-tables", "scratch-tables-10M", "scaling-small", "locality-chinchilla", leaks)
    size = leaks.removeprefix("ablation-")
    more = f"dynamask experiment locality --size chinchilla; dynamask experiment ablation --size {size}"
    return exhibit, _rows(sweeps, *names), f"{command}; {more}"


def _at_half_the_rate(sweeps: Sweeps) -> str:
    """What is left of the gap at w = N where dense attention has the rate of the paper's form, as a sentence."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for run in sweeps.get("scratch-rates", ()):
        losses[_without_window(run)][run.seed] = run.result["test"]
    gap = paired_difference(losses.get("dense, half rate", {}), losses.get("paper", {}))
    if math.isnan(gap.low):
        return ""
    return f" At half the rate for both, and half the tokens of a step, the form with w = N ends {_above(gap)} it."


_HALVED = {
    "paper": ("the paper's form", SKY),
    "sliding + sinks, half rate": ("newest keys and sinks", RED),
    "learned, half rate, slopes, even": ("learned ranks with slopes", PINK),
    "sliding + sinks, half rate, one wide layer": ("newest keys, one layer wide", ORANGE),
    "scored, half rate, one wide layer": ("0.1's form with scores, one layer wide", GREEN),
    "learned, half rate, slopes, one wide layer": ("learned ranks with slopes, one layer wide", BLUE),
}
"""Forms of size `4M-tables` that exhibits show -> name and colour."""


def _shares_at_half_rate(runs: Sequence[Record], axes: Any, marker: str = "o") -> str:
    """Draw the gap to dense attention against window over context, all at half the rate; what it says of the paper."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.result.get("test") is not None:
            losses[scratch_name(run.config)][run.seed] = run.result["test"]
    told = []
    shown = set()
    for whole, ours in sorted(losses.items()):
        form, _, at = whole.rpartition(", w = ")
        gap = paired_difference(losses.get("dense, half rate", {}), ours)
        if form not in _HALVED or math.isnan(gap.mean):
            continue
        label, colour = _HALVED[form]
        share = 1 / int(at.partition("/")[2]) if "/" in at else 1.0
        margins = None if math.isnan(gap.low) else [[gap.mean - gap.low], [gap.high - gap.mean]]
        name = None if form in shown or marker != "o" else label
        axes.errorbar(share, gap.mean, yerr=margins, fmt=marker, color=colour, capsize=3, label=name)
        shown.add(form)
        if form == "paper" and margins:
            told.append((share, f"with w = {at} {_above(gap)}"))
    axes.set(title="4.4M parameters, fresh tokens, one rate")
    axes.legend(fontsize=7)
    if not told:
        return ""
    ends = ", ".join(words for _, words in sorted(told, reverse=True))
    return f" At half the rate on other fresh tokens the paper's form ends {ends} dense attention."


def _any_depth(run: Record) -> str:
    return variant_name(run.config, any_depth=True)


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


def _leak(runs: Sequence[Record], axes: Any) -> str:
    """Draw the ablation's losses by window; return how much the leak flatters the model that is trained with it."""
    seeds: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    both: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        name, share = ablation_name(run.config), run.config["window"] / run.config["length"]
        seeds[name][share].append(run.result["loss"])
        if run.config["attention"] == LEAKY:
            both[share].append((run.result["exact_loss"], run.result["leaky_loss"]))
    for share, losses in both.items():
        exact, leaky = (float(np.mean(side)) for side in zip(*losses, strict=True))
        axes.plot([share, share], [exact, leaky], color=PINK, linewidth=1)
        axes.plot(share, exact, "D", color=PINK, label="the paper's form, trained with the leak: exact")
        axes.plot(share, leaky, "D", color=PINK, markerfacecolor="none", label="the same, read with the leak")
    for name, label, colour in (("dma", "0.1's default", BLUE), ("sliding window", "newest keys", RED)):
        points = sorted((share, float(np.mean(losses))) for share, losses in seeds[name].items())
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    for share, own in seeds["dma, paper's form"].items():
        axes.plot(share, float(np.mean(own)), "D", color=SKY, label="the paper's form")
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
    gains = sorted(float(np.mean([exact - leaky for exact, leaky in losses])) for losses in both.values())
    return " to ".join(dict.fromkeys(f"{gain:.2f}" for gain in (gains[0], gains[-1])))


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
    own = _losses(scaling, _any_depth)
    if _BEST in own and _CONTROL in own:
        spread = SeedSpread.pooled(list(own.values()))
        losses.append(("from scratch, 4.4M, code + text, w/N 1/8", spread.difference(own[_BEST], own[_CONTROL])))
    rows |= _rows(sweeps, "locality-chinchilla", "scaling-small")
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
            rows |= _rows(sweeps, name)
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
            rows |= _rows(sweeps, name)
    for name in ("needle-long", "needle-quick"):
        for where, gain in _needles(sweeps.get(name, ())):
            shares.append((where, gain))
    rows |= _rows(sweeps, "needle-long", "needle-quick")
    recall = _recall(sweeps.get("mqar-quick", ()), MQAR[1].name, MQAR[2].name)
    if recall is not None:
        shares.append(("associative recall, width 128, w/N 1/16", recall))
        rows |= _rows(sweeps, "mqar-quick")
    start = f"{MQAR_PUBLISHED[-1].name}, from dense"
    recall = _recall(sweeps.get("mqar-published", ()), MQAR_PUBLISHED[3].name, start)
    if recall is not None:
        shares.append(("associative recall, 512 pairs, width 128, w/N 1/16", recall))
        rows |= _rows(sweeps, "mqar-published")
    if not losses or not shares:
        return None
    figure, (left, right) = _figure(10.5, 0.9 + 0.33 * max(len(losses), len(shares)), 2)
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


def _without_window(run: Record) -> str:
    """The form of a run of study `scratch`, its window left out."""
    name = scratch_name(run.config)
    return name.rpartition(", w = ")[0] or name


def _fresh_gain(runs: Sequence[Record], learned: str, newest: str) -> Interval | None:
    """Test loss saved by learned ranks over the newest keys of as many pairs, in study `scratch`."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        if run.result.get("test") is not None:
            losses[_without_window(run)][run.seed] = run.result["test"]
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


def loss_against_step(results: Path, sweeps: Sweeps, folder: Path) -> Drawn | None:
    """The lead over dense attention by step and by position, at the largest size."""
    runs = sweeps.get("scaling-small", ())
    width = max((run.config["width"] for run in runs), default=0)
    by_name: dict[str, list[Record]] = defaultdict(list)
    for run in runs:
        if run.config["width"] == width:
            by_name[_any_depth(run)].append(run)
    if "mha" not in by_name or _BEST not in by_name:
        return None
    dense = loss_by_step(by_name["mha"])
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.0), layout="constrained")
    below, (left, middle, right) = figure.subplots(2, 3)
    keys = [run.key for run in by_name["mha"]]
    left.plot(list(dense), list(dense.values()), "s--", color=BLACK, label="dense", markersize=4)
    gaps: dict[str, dict[int, float]] = {}
    positions = _by_position(by_name["mha"])
    for name in (_BEST, _CONTROL, "swa", "mla"):
        own = loss_by_step(by_name.get(name, [])) if by_name.get(name) else {}
        gaps[name] = {step: dense[step] - own[step] for step in own if step in dense}
        if own:
            keys += [run.key for run in by_name[name]]
            style = {"color": _COLOURS[name], "label": _NAMES[name], "markersize": 4}
            left.plot(list(own), list(own.values()), "o-", **style)
            middle.plot(list(gaps[name]), list(gaps[name].values()), "o-", **style)
            places = _by_position(by_name[name])
            right.plot(list(places), [positions[place] - loss for place, loss in places.items()], "o-", **style)
    fresh_text, fresh_keys = _fresh_by_step(sweeps, below)
    keys += fresh_keys
    for panels in (below, (left, middle, right)):
        for axes in panels[1:]:
            axes.axhline(0, color=BLACK, linestyle="--", linewidth=1)
            axes.set_ylabel("nats below dense attention")
        panels[0].set(xlabel="step", ylabel="validation loss", xscale="log")
        panels[1].set(xlabel="step", xscale="log")
        panels[2].set(xlabel="position in the sequence, at the end")
        panels[2].set_xscale("log", base=2)
        panels[0].legend(fontsize=7)
    lead = gaps[_BEST]
    most, last = max(lead, key=lambda step: lead[step]), max(lead)
    size = by_name["mha"][0].result["parameters"]["non_embedding"] / 1e6
    left.set_title(f"{size:.1f}M parameters, tokens read repeatedly, one seed", fontsize=9)
    text = (
        f"{fresh_text}At {size:.1f}M parameters the best form's lead over dense attention is {lead[most]:.3f} nats "
        f"after {most} steps and {lead[last]:+.3f} at the end ({last} steps, one seed: less than seeds differ by). "
        f"Sliding windows of the same sizes lead by {gaps[_CONTROL][most]:.3f} and {gaps[_CONTROL][last]:+.3f}; a lead "
        "that shrinks with training is faster learning, not a better model."
    )
    alt = "validation loss by step, and the gap to dense attention by step and by position"
    picture = save_small(figure, folder / "loss-step.svg")
    exhibit = Exhibit("loss-step", "Loss against step", keys, text, picture=picture, alt=alt)
    command = "dynamask experiment scratch --size 4M; dynamask experiment scaling --size small"
    return exhibit, _rows(sweeps, "scratch", "scaling-small"), command


def _fresh_by_step(sweeps: Sweeps, panels: Any) -> tuple[str, list[str]]:
    """Draw loss and gap to dense attention of study `scratch`; a sentence, and the keys of the runs."""
    fresh = _fresh(sweeps)
    if ("dense", 1.0) not in fresh:
        return "", []
    dense, positions = loss_by_step(fresh["dense", 1.0]), _by_position(fresh["dense", 1.0])
    gaps: dict[tuple[str, float], dict[int, float]] = {}
    for (name, share), runs in fresh.items():
        own, places = loss_by_step(runs), _by_position(runs)
        label, colour = _FRESH[name]
        style = {"color": colour, "label": f"{label}, w/N 1/{1 / share:.0f}" if share < 1 else label, "markersize": 4}
        panels[0].plot(list(own), list(own.values()), "s--" if name == "dense" else "o-", **style)
        if name == "dense" or (name == "paper" and share < 1):
            continue  # far below the others, so that their gaps would not be seen
        gaps[name, share] = {step: dense[step] - own[step] for step in own if step in dense}
        panels[1].plot(list(gaps[name, share]), list(gaps[name, share].values()), "o-", **style)
        panels[2].plot(list(places), [positions[place] - loss for place, loss in places.items()], "o-", **style)
    panels[0].set_title("4.4M parameters, fresh tokens, three seeds", fontsize=9)
    sliding = next((gap for (name, share), gap in gaps.items() if name == "sliding + sinks"), {})
    most, last = max(sliding, key=lambda step: sliding[step]), max(sliding)
    text = (
        f"At 4.4M parameters newest keys lead dense attention by {sliding[most]:.2f} nats after {most} steps and trail "
        f"it by {-sliding[last]:.2f} at the end ({last} steps, three seeds). "
    )
    text += _larger_by_step(sweeps)
    return text, [run.key for runs in fresh.values() for run in runs]


def _larger_by_step(sweeps: Sweeps) -> str:
    """The lead over dense attention by step at 10M parameters, of the form that is judged and of its control."""
    forms: dict[str, list[Record]] = defaultdict(list)
    for run in sweeps.get("scratch-tables-10M", ()):
        forms[_without_window(run)].append(run)
    if "dense, half rate" not in forms:
        return ""
    dense = loss_by_step(forms["dense, half rate"])
    told = []
    for name, label in (
        ("scored, half rate, one wide layer", "0.1's form with scores"),
        ("sliding + sinks, half rate, one wide layer", "newest keys"),
    ):
        if name in forms:
            own = loss_by_step(forms[name])
            gaps = {step: dense[step] - own[step] for step in own if step in dense}
            most, last = max(gaps, key=lambda step: gaps[step]), max(gaps)
            told.append(f"of {label} {gaps[most]:.2f} nats after {most} steps and {gaps[last]:+.3f} at the end")
    if not told:
        return ""
    leads = ", and ".join(told)
    return f"At 10.0M parameters and one rate, with one layer wide, the lead over it is {leads} ({last} steps). "


def _by_position(runs: Sequence[Record]) -> dict[float, float]:
    found: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        for bucket in run.result["positions"]:
            found[(bucket["from"] + bucket["to"]) / 2].append(bucket["loss"])
    return {place: float(np.mean(losses)) for place, losses in sorted(found.items())}


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
        plain: ("the paper's form", SKY),
    }
    cells: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score in mean_scores(runs):
        if score.depth < 1 and score.model in shown:
            cells[score.model][distance(score)].append(score.exact)
    figure, (axes, right) = _figure(13, 4, 2)
    seeds_text, seeds_keys = _distance_over_seeds(sweeps.get("needle-seeds", ()), right)
    for name, (label, colour) in shown.items():
        points = sorted((place, 100 * float(np.mean(found))) for place, found in cells[name].items())
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=4)
    edges = {512: "even window", 1280: "widest layer", context // 2: "longest example trained on"}
    for edge, label in edges.items():
        axes.axvline(edge, color=GREY, linestyle=":")
        axes.annotate(f"{label} {edge}", (edge, 28), fontsize=7, rotation=90, va="bottom", ha="right")
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
        f"From 1,280 tokens, past the widest layer's window, to the training length of {context:,}, dense attention "
        f"finds {beyond('mha'):.0%}, chosen keys {beyond(best):.0%}, newest keys in the same windows "
        f"{beyond(control):.0%} (one training seed). Beyond the training length the best form of all finds "
        f"{furthest:.0%}.{seeds_text}"
    )
    picture = save_small(figure, folder / "match-distance.svg")
    alt = "exact match against distance from needle to question, one line per form, window edges drawn"
    keys = [run.key for run in runs] + seeds_keys
    exhibit = Exhibit("match-distance", "Exact match against distance", keys, text, picture=picture, alt=alt)
    command = "dynamask experiment needle --size long; dynamask experiment needle --size seeds"
    return exhibit, _rows(sweeps, "needle-long", "needle-seeds"), command


def _distance_over_seeds(runs: Sequence[Record], axes: Any) -> tuple[str, list[str]]:
    """Draw exact match against distance of forms with several training seeds; a sentence, and the keys of the runs."""
    if not runs:
        axes.set_axis_off()
        return "", []
    settings = NeedleConfig.of(runs[0].config)
    window = min(run.config["window"] for run in runs if run.config["window"])
    shown = {
        "mha": ("dense", BLACK),
        "dma, learned, head windows": ("learned ranks, windows per head", BLUE),
        "swa, sinks": ("newest keys and sinks", RED),
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
        axes.annotate(f"{label} {edge}", (edge, 28), fontsize=7, rotation=90, va="bottom", ha="right")
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
        f" With {least} to {most} training seeds and a window of a sixteenth of the context, beyond the window and "
        f"within the longest example dense attention finds {within('mha'):.0%}, learned ranks "
        f"{within('dma, learned, head windows'):.0%} and newest keys {within('swa, sinks'):.0%}."
    )
    return text, [run.key for run in runs]


def cost(results: Path, sweeps: Sweeps, folder: Path) -> Drawn | None:
    """Time and memory against dense attention: one attention with its mask, training, decoding, cache."""
    attention, models = results / "h100-attention.json", results / "h100-model" / "model.json"
    if not attention.exists() or not models.exists():
        return None
    calls, model = (json.loads(file.read_text(encoding="utf-8")) for file in (attention, models))
    shape = {"D": 128, "H": 16, "G": 4, "w": 2048, "scores": "random"}
    timed = [
        row
        for row in calls["attention"]
        if all(row[name] == value for name, value in shape.items()) and "backward_ms" in row
    ]
    figure, panels = _figure(13, 3.4, 4)
    ours, dense = {}, {}
    for row in timed:
        ours[row["N"]] = sum(row.get(name) or 0.0 for name in ("forward_ms", "backward_ms", "expiry_ms", "lists_ms"))
        pairs = [[row.get(f"{peer}_{way}_ms") for way in ("forward", "backward")] for peer in ("flash", "cudnn", "fa3")]
        best = [min((pair[way] for pair in pairs if pair[way] is not None), default=float("nan")) for way in (0, 1)]
        if all(map(np.isfinite, best)):
            dense[row["N"]] = sum(best)
    for found, label, colour in ((ours, "dynamask, mask included", BLUE), (dense, "dense, fastest kernel", BLACK)):
        panels[0].plot(*zip(*sorted(found.items()), strict=True), "o-", color=colour, label=label, markersize=4)
    panels[0].set(title="attention, forward + backward, ms", xlabel="tokens", yscale="log")
    for axes, rows, place, value, title in (
        (panels[1], model["training"], "N", "tokens_per_s", "training, tokens/s (wall clock)"),
        (
            panels[2],
            [row for row in model["generation"] if row["batch"] == 1],
            "context",
            "tokens_per_s",
            "decoding, tokens/s",
        ),
        (
            panels[3],
            [row for row in model["generation"] if row["batch"] == 1],
            "context",
            "cache_mib",
            "cache, MiB a sequence",
        ),
    ):
        best_of = min if value == "cache_mib" else max
        for is_dense, label, colour in ((False, "dynamask", BLUE), (True, "dense", BLACK)):
            points: dict[int, float] = {}
            for row in rows:
                if row["attention"].startswith("mha") is is_dense and row.get(value) is not None:
                    points[row[place]] = best_of(row[value], points.get(row[place], row[value]))
            axes.plot(*zip(*sorted(points.items()), strict=True), "o-", color=colour, label=label, markersize=4)
        axes.set(title=title, xlabel="tokens")
        if value == "cache_mib":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    both = sorted(ours.keys() & dense.keys())
    first, last = both[0], both[-1]
    text = (
        f"With a window of {shape['w']:,} keys, one attention with its mask is {dense[first] / ours[first]:.2f} "
        f"times as fast as the fastest dense kernel at {first:,} tokens and {dense[last] / ours[last]:.0f} "
        f"times at {last:,}. Whole training steps gain less, because the rest of the model costs the same; decoding "
        "time and cache stop growing with the context."
    )
    keys = [f"attention[{number}]" for number, row in enumerate(calls["attention"]) if row in timed]
    rows_by_key: dict[str, tuple[str, Any]] = {
        key: ("lab/results/h100-attention.json", calls["attention"][int(key[10:-1])]) for key in keys
    }
    for part in ("training", "generation"):
        for number, row in enumerate(model[part]):
            rows_by_key[f"{part}[{number}]"] = ("lab/results/h100-model/model.json", row)
    picture = save_small(figure, folder / "cost.svg")
    alt = "time of attention, training speed, decoding speed and cache against tokens, beside dense attention"
    exhibit = Exhibit("cost", "Cost", list(rows_by_key), text, picture=picture, alt=alt)
    return exhibit, rows_by_key, "dynamask benchmark gpu; dynamask benchmark model"
