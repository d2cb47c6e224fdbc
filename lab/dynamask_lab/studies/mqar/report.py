"""MQAR in the report: accuracy against width and length, seconds per step, and the paper's claims about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamask_lab.studies.judged import (
    MQAR,
    MQAR_PUBLISHED,
    Judged,
    found_windows,
    share_of_pairs,
    widest_of,
    window_share,
)
from dynamask_lab.studies.mqar.study import BestRuns, MqarConfig, best_runs
from dynamask_lab.sweeps.provenance import shared
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section
from dynamask_lab.sweeps.verdicts import (
    NOT_TESTED,
    SHARE_INTEREST,
    Interval,
    all_of,
    judge,
    judge_no_worse,
    paired_difference,
)

RIVALS = ("mha", "swa", "mla", "nsa")
_SINKS = "swa, sinks"
"""Stands for sliding windows where it ran instead of them; for a form that starts dense, with the same start."""
_FROM_DENSE = ", from dense"
_EPOCHS = 8
"""Of most sweeps."""


@reports("mqar")
def report_mqar(records: Sequence[Record], folder: Path) -> Section:
    """See `Experiment.report`."""
    found = best_runs(records)
    keys = [run.key for best in found for run in best.runs]
    table = [_row(best) for best in found]
    seeds = len({run.seed for run in records})
    text = (
        "Share of the queries answered rightly, at the learning rate with the best mean accuracy; columns "
        f"*pairs/length* are the test segments. {seeds} seed{'s' if seeds > 1 else ''}. `dma, paper` is the paper's "
        "form (no local share, no recency). `ms/step` is wall time over training steps, data and tests included; it "
        "is left out where runs shared their device. Training ends at 99% accuracy: what got there may recall more."
    )
    if any(best.mixer.endswith(_FROM_DENSE) for best in found):
        text += (
            " Forms `from dense` see every key at first and narrow windows later: in training they see more pairs than "
            "when they are tested."
        )
    exhibits = [
        Exhibit(
            "accuracy",
            "Accuracy by width and by length",
            keys,
            text,
            table,
            _draw(found, folder / "accuracy.svg"),
            "accuracy against model width, and against length and pairs, one line per mechanism",
        )
    ]
    findings = [
        finding
        for form in (*MQAR, *MQAR_PUBLISHED)
        for ours in _own(form, found)
        for finding in (_recall(form, ours, found), _goal(form, ours, found), _efficiency(form, ours, found))
        if finding is not None
    ]
    return Section(
        "Two layers of each mechanism recall values under keys they have read "
        "([zoology](https://arxiv.org/abs/2312.04927)'s mixture of lengths).",
        exhibits,
        findings,
    )


def _shape(best: BestRuns) -> tuple[int, int, str]:
    return best.width, best.window, best.mixer


def _seconds_per_step(records: Sequence[Record]) -> dict[tuple[int, int, str], float]:
    """Median over all runs of a mixer, width and window."""
    found: dict[tuple[int, int, str], list[float]] = defaultdict(list)
    for record in records:
        settings = MqarConfig.of(record.config)
        steps = settings.steps(settings.train) * record.result["epochs"]
        for best in best_runs([record]):
            found[_shape(best)].append(record.seconds / steps)
    return {shape: float(np.median(seconds)) for shape, seconds in found.items()}


def _row(best: BestRuns) -> Row:
    cells = {"width": str(best.width), "window": str(best.window or "all"), "mechanism": best.mixer}
    cells |= {"accuracy": f"{best.accuracy:.3f}"}
    cells |= {f"{pairs}/{length}": f"{accuracy:.3f}" for (length, pairs), accuracy in best.slices().items()}
    step = float(np.median(list(_seconds_per_step(best.runs).values())))
    rates = len({rate for rate, _ in best.tried})
    alone = not any(shared(run.device) for run in best.runs)
    return cells | {"rate": f"{best.rate:.1e} of {rates}"} | ({"ms/step": f"{1e3 * step:.1f}"} if alone else {})


def _own(form: Judged, found: Sequence[BestRuns]) -> list[BestRuns]:
    """The form at every width, at the window of the first: where most seeds of it ran, of those the greatest width."""
    own = [best for best in found if best.mixer == form.name]
    own.sort(key=lambda best: (len({seed for _, seed in best.tried}), best.width), reverse=True)
    return [best for best in own if best.window == own[0].window]


def _rivals(ours: BestRuns, found: Sequence[BestRuns]) -> list[BestRuns]:
    """The rivals of a form's width and window that ran the same rates, and enough of its seeds for an interval."""
    alike = [
        best
        for best in found
        if best.width == ours.width and best.window in (0, ours.window) and _comparable(ours, best)
    ]
    own_start = ours.mixer.endswith(_FROM_DENSE) and any(best.mixer == _SINKS + _FROM_DENSE for best in alike)
    sinks = _SINKS + _FROM_DENSE if own_start else _SINKS
    return [best for best in alike if best.mixer in (*RIVALS, sinks) and best.mixer != ours.mixer]


def _comparable(ours: BestRuns, rival: BestRuns) -> bool:
    rates, seeds = ({place[i] for place in ours.tried} for i in (0, 1))
    both = seeds & {seed for _, seed in rival.tried}
    return rates == {rate for rate, _ in rival.tried} and len(both) >= min(2, len(seeds))


def _setting(ours: BestRuns) -> Row:
    config = ours.runs[0].config
    (longest, pairs), epochs = max((length, pairs) for length, pairs, _ in config["test"]), config["epochs"]
    least = min(length for length, *_ in config["test"])
    return {
        "w/N": _windows(ours, longest),
        "size": f"width {ours.width}" + ("" if epochs == _EPOCHS else f", {epochs} epochs"),
        "seeds": str(len(ours.runs)),
        "pairs": _pairs(ours, longest) + (f" ({_pairs(ours, least)} at {least} tokens)" if least < longest else ""),
        "task": f"{pairs} pairs in {longest} tokens",
    }


def _windows(ours: BestRuns, length: int) -> str:
    """Window over context, with the widest head's pairs where windows are per head."""
    return window_share(widest_of(ours.runs, length=length))


def _pairs(ours: BestRuns, length: int) -> str:
    """The share of dense attention's pairs at one length, with the windows that each run's training found."""
    shares = [share_of_pairs({**found_windows(run), "length": length}) for run in ours.runs]
    low, high = (f"{100 * bound:.0f}%" for bound in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def _recall(form: Judged, ours: BestRuns, found: Sequence[BestRuns]) -> Finding:
    """The form's accuracy against every rival's, seed by seed, which share their data.

    Training stops at 99 % accuracy, so two that reached it are equal.
    """
    rivals = _rivals(ours, found)
    told, verdicts, difference = [], [], ""
    for rival in rivals:
        done = min(ours.accuracy, rival.accuracy) >= 0.99
        gain = Interval(0.0, 0.0, 0.0) if done else _above(ours, rival)
        told.append(f"{rival.mixer} {gain}")
        difference = f"{gain} accuracy" if rival.mixer == "mha" or not difference else difference
        verdicts.append(judge(gain, SHARE_INTEREST))
    keys = [run.key for best in (ours, *rivals) for run in best.runs]
    if not told:
        measured = "no rival ran the same learning rates and seeds"
        return Finding("recall", form.name, measured, NOT_TESTED, keys, form.role, _setting(ours))
    measured = f"accuracy {ours.accuracy:.3f}, above {', '.join(told)}"
    ran = {best.mixer.removesuffix(_FROM_DENSE).removesuffix(", sinks") for best in (ours, *rivals)}
    missing = [rival for rival in RIVALS if rival not in ran]
    if missing:
        measured += f"; not compared with {', '.join(missing)}"
        verdicts.append(NOT_TESTED)
    verdict = all_of(verdicts)
    interest = f"{SHARE_INTEREST} accuracy"
    return Finding("recall", form.name, measured, verdict, keys, form.role, _setting(ours), interest, difference)


def _goal(form: Judged, ours: BestRuns, found: Sequence[BestRuns]) -> Finding | None:
    """A form with learned ranks against dense attention, which it should be no worse than."""
    dense = next((best for best in _rivals(ours, found) if best.mixer == "mha"), None)
    if dense is None or form.role != "best" or "learned" not in form.name:
        return None
    gain = _above(ours, dense)
    if min(ours.accuracy, dense.accuracy) >= 0.99:
        gain = Interval(0.0, 0.0, 0.0)
    by_length = (f"{length} tokens {found}" for length, found in _above_by_length(ours, dense).items())
    ended = ", which ended at 99%, so a lower bound of its lead" if dense.accuracy >= 0.99 > ours.accuracy else ""
    measured = f"accuracy {ours.accuracy:.3f}, above mha {gain}{ended}; {', '.join(by_length)}"
    keys = [run.key for best in (ours, dense) for run in best.runs]
    interest, verdict = f"{SHARE_INTEREST} accuracy", judge_no_worse(gain, SHARE_INTEREST)
    difference = f"{gain} accuracy"
    return Finding("recall-goal", form.name, measured, verdict, keys, form.role, _setting(ours), interest, difference)


def _above(ours: BestRuns, rival: BestRuns) -> Interval:
    """How far the form's accuracy lies above the rival's."""
    errors = ({run.seed: -run.result["accuracy"] for run in best.runs} for best in (ours, rival))
    return paired_difference(*errors)


def _above_by_length(ours: BestRuns, rival: BestRuns) -> dict[int, Interval]:
    """The same by the length of the test texts."""

    def errors(best: BestRuns, length: int) -> dict[int, float]:
        return {
            run.seed: -float(np.mean([part["accuracy"] for part in run.result["slices"] if part["length"] == length]))
            for run in best.runs
        }

    lengths = sorted({length for length, _ in ours.slices()})
    return {length: paired_difference(errors(ours, length), errors(rival, length)) for length in lengths}


def _efficiency(form: Judged, ours: BestRuns, found: Sequence[BestRuns]) -> Finding:
    """Seconds per step against every rival's, where every run had one and the same device to itself."""
    rivals = _rivals(ours, found)
    runs = [run for best in (ours, *rivals) for run in best.runs]
    keys = [run.key for run in runs]

    def finding(measured: str, verdict: str, difference: str = "") -> Finding:
        own = (form.role, _setting(ours), "5% of a step", difference)
        return Finding("recall-efficiency", form.name, measured, verdict, keys, *own)

    if any(shared(run.device) for run in runs) or len({run.device for run in runs}) > 1:
        reason = "runs shared their device or ran on several, so their times do not compare"
        return finding(reason, NOT_TESTED, "times shared a device")
    if not rivals:
        return finding("no rival ran the same learning rates and seeds", NOT_TESTED)
    steps = _seconds_per_step(runs)
    told, verdicts = [], []
    for rival in rivals:
        saved = 1 - steps[_shape(ours)] / steps[_shape(rival)]
        told.append(f"{rival.mixer} {saved:+.0%}")
        # Times of runs on an idle device differ by about a per cent.
        verdicts.append(judge(Interval(saved, saved - 0.02, saved + 0.02), 0.05))
    if {best.mixer for best in rivals} != set(RIVALS):
        verdicts.append(NOT_TESTED)
    return finding(f"time of a step saved against {', '.join(told)}", all_of(verdicts), f"{told[0]} of a step's time")


def _draw(found: Sequence[BestRuns], picture: Path) -> Path:
    """One row per window: accuracy against width, and at the greatest width against the test segments."""
    from matplotlib.figure import Figure

    from dynamask.inspect.style import line_style
    from dynamask_lab.report.pictures import save_small

    windows = sorted({best.window for best in found if best.window}) or [0]
    widths = sorted({best.width for best in found})
    figure = Figure(figsize=(10.5, 3.4 * len(windows)), layout="constrained")
    panels = figure.subplots(len(windows), 2, squeeze=False)
    for (left, right), window in zip(panels, windows, strict=True):
        shown: dict[str, list[BestRuns]] = defaultdict(list)
        for best in found:
            if best.window in (0, window):
                shown[best.mixer].append(best)
        shapes: list[tuple[int, int]] = sorted({shape for best in found for shape in best.slices()})
        for number, (name, own) in enumerate(shown.items()):
            style: dict[str, Any] = line_style(name, number) | {"markersize": 5, "label": name}
            left.plot([widths.index(best.width) for best in own], [best.accuracy for best in own], **style)
            widest = own[-1].slices()
            points = [(place, widest[shape]) for place, shape in enumerate(shapes) if shape in widest]
            right.plot(*zip(*points, strict=True), **style)
        left.set(title=f"window {window or 'none'}: by width", xlabel="width of the model", ylabel="accuracy")
        left.set_xticks(range(len(widths)), [str(width) for width in widths])
        right.set(title=f"window {window or 'none'}: by length, width {widths[-1]}", xlabel="length (pairs)")
        right.set_xticks(range(len(shapes)), [f"{length}\n({pairs})" for length, pairs in shapes], fontsize=8)
        for axes in (left, right):
            axes.set_ylim(-0.03, 1.03)
            axes.grid(alpha=0.3)
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save_small(figure, picture)
