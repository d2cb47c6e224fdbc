"""MQAR in the report: accuracy against width and length, seconds per step, and the paper's claims about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamask_lab.studies.mqar.study import BestRuns, MqarConfig, best_runs
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section, judged_forms

RIVALS = ("mha", "swa", "mla", "nsa")


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
        "form (no local share, no recency). `ms/step` is wall time over training steps, data and tests included."
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
    steps = _seconds_per_step(records)
    findings = []
    accuracy = {best.mixer: best.accuracy for best in sorted(found, key=lambda best: best.accuracy)}
    ours = [name for name in accuracy if name.startswith("dma")]
    for form in judged_forms(ours, loss=lambda name: -accuracy[name]):
        findings.append(_compare("recall", form, found, lambda best: best.accuracy, keys))
        findings.append(
            _compare("recall-efficiency", form, found, lambda best: -steps[_shape(best)], keys, "ms saved per step")
        )
    return Section(
        "Two layers of each mechanism recall values under keys they have read "
        "([zoology](https://arxiv.org/abs/2312.04927)'s mixture of lengths).",
        exhibits,
        [finding for finding in findings if finding is not None],
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
    return cells | {"rate": f"{best.rate:.1e} of {rates}", "ms/step": f"{1e3 * step:.1f}"}


def _compare(
    claim: str,
    form: str,
    found: Sequence[BestRuns],
    value: Callable[[BestRuns], float],
    keys: Sequence[str],
    unit: str = "",
) -> Finding | None:
    """The form against every rival of its width and window, where both ran the same rates and seeds.

    Training stops at 99 % accuracy, so two that reached it are equal.
    """
    own = [best for best in found if best.mixer == form]
    if not own:
        return None
    margins: list[tuple[float, str]] = []
    met = set()
    for ours in own:
        for rival in found:
            alike = rival.width == ours.width and rival.window in (0, ours.window) and rival.tried == ours.tried
            if rival.mixer in RIVALS and alike:
                met.add(rival.mixer)
                done = claim == "recall" and min(ours.accuracy, rival.accuracy) >= 0.99
                margin = 0.0 if done else value(ours) - value(rival)
                margins.append((margin, f"{rival.mixer} (width {ours.width}, window {ours.window})"))
    if not margins:
        return Finding(claim, form, "no rival ran the same learning rates and seeds", None, keys)
    if unit and len({run.device for best in found for run in best.runs}) > 1:
        return Finding(claim, form, "the runs are of several devices, whose times do not compare", None, keys)
    scale, digits = (1e3, 2) if unit else (1.0, 3)
    ahead = sum(margin >= 0 for margin, _ in margins)
    (worst, against), (best, over) = min(margins), max(margins)
    measured = (
        f"at least level in {ahead} of {len(margins)} comparisons; from {scale * worst:+.{digits}f} {unit} against "
        f"{against} to {scale * best:+.{digits}f} {unit} against {over}"
    ).replace("  ", " ")
    if met != set(RIVALS):
        missing = ", ".join(sorted(set(RIVALS) - met))
        return Finding(claim, form, f"{measured}; not compared with {missing}", None, keys)
    return Finding(claim, form, measured, ahead == len(margins), keys)


def _draw(found: Sequence[BestRuns], picture: Path) -> Path:
    """One row per window: accuracy against width, and at the greatest width against the test segments."""
    from matplotlib.figure import Figure

    from dynamask.inspect.style import line_style, save_figure

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
    return save_figure(figure, picture)
