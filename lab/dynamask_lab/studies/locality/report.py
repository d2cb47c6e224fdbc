"""Locality in the report: every form's loss, and whether it is level with a sliding window early and mha at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynamask_lab.studies.locality.study import GENTLE_MEANS, locality_summary, variant_name
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Section, gains_hold, judged_forms

EARLY = 100
"""Steps after which dma is to be no worse than swa."""

_CONTROL = "no choice"
"""In the name of a run whose window is all local (`variant_name`)."""

_CEILING = "all keys"
"""In the name of a run without a window: no form at a sixteenth of the context."""

_RANKED = ", ranked by attention"
_WINDOWS = ", windows "
"""What follows the ranks in the name of a run whose layers have windows of their own."""

_Losses = dict[str, dict[tuple[str, int, int, float], Record]]


@reports("locality")
def report_locality(records: Sequence[Record], folder: Path) -> Section:
    """See `Experiment.report`."""
    keys = [record.key for record in records]
    exhibits = [
        Exhibit(
            "loss",
            "Validation loss by mechanism",
            keys,
            "Nats per token, mean over seeds at the best learning rate; @n: after n steps. `penalty`: the rival with "
            f"the distance penalty on its logits that dma's recency amounts to. {GENTLE_MEANS}",
            locality_summary(records),
            _draw(records, folder / "locality.svg"),
            "final validation loss of every mechanism, one panel per corpus",
        )
    ]
    runs: _Losses = defaultdict(dict)
    for record in records:
        config = record.config
        place = (config["corpus"], config["width"], record.seed, config["learning_rate"])
        runs[variant_name(config)][place] = record
    ours = [name for name in runs if "dma" in name and _CONTROL not in name and _CEILING not in name]
    # In all layers, and in some.
    kinds = ([name for name in ours if not _mixed(name)], [name for name in ours if _mixed(name)])
    forms = judged_forms(*kinds, loss=lambda name: _final(runs[name]))
    findings = [_compare(form, runs) for form in forms]
    for control in sorted(name for name in runs if _CONTROL in name):
        findings += [_choice(form, control, runs) for form in _chosen(control) if form in runs]
    return Section("", exhibits, findings)


def _mixed(name: str) -> bool:
    """Whether layers of several mechanisms have that name: "4 dma+2 mha"."""
    return name[0].isdigit()


def _final(runs: dict[tuple[str, int, int, float], Record]) -> float:
    losses = [run.result["loss"] for run in runs.values()]
    return float(np.mean([np.inf if loss is None else loss for loss in losses]))


def _compare(form: str, runs: _Losses) -> Finding:
    """Against swa at the first look from step EARLY on, against mha at the end, at equal corpus, seed and rate."""
    both = sorted(runs[form].keys() & runs["swa"].keys() & runs["mha"].keys())
    keys = [runs[name][place].key for place in both for name in (form, "swa", "mha")]
    early, late = [], []
    for place in both:
        ours, swa, mha = (runs[name][place] for name in (form, "swa", "mha"))
        looks = [(_early(ours), _early(swa)), (ours.result["loss"], mha.result["loss"])]
        if any(loss is None for pair in looks for loss in pair):
            return Finding("locality", form, "a run was too short or diverged", None, keys)
        (our_early, swa_early), (our_late, mha_late) = looks
        early.append(swa_early - our_early)  # type: ignore[operator]
        late.append(mha_late - our_late)
    if not both:
        return Finding("locality", form, "swa and mha did not run at the same settings", None, [])
    pairs = f"over {len(both)} runs of each"
    measured = f"{_span(early)} nats below swa at step {EARLY}, {_span(late)} below mha at the end, {pairs}"
    return Finding("locality", form, measured, min(*early, *late) >= 0, keys)


def _chosen(control: str) -> list[str]:
    """The forms that differ from a control by their choice of keys: with one score for ranks and logits, and with ranks
    of their own (whose score on the logits reads the head's own value alone, where the control's reads all heads')."""
    form = control.replace(f", {_CONTROL}", "", 1)
    gates, windows, rest = form.partition(_WINDOWS)
    return [form, f"{gates}{_RANKED}{windows}{rest}"]


def _choice(form: str, control: str, runs: _Losses) -> Finding:
    """A form against its control, at equal corpus, seed and rate."""
    both = sorted(runs[form].keys() & runs[control].keys())
    pairs = [(runs[control][place].result["loss"], runs[form][place].result["loss"]) for place in both]
    keys = [runs[name][place].key for place in both for name in (form, control)]
    if not pairs or any(loss is None for pair in pairs for loss in pair):
        return Finding("choice", form, "no finished pair of runs at the same settings", None, keys)
    gains = [without - chosen for without, chosen in pairs]
    measured = f"{_span(gains)} nats below its control at the end, over {len(both)} runs of each"
    return Finding("choice", form, measured, gains_hold(gains), keys)


def _early(record: Record) -> float | None:
    return next((look["loss"] for look in record.result["curve"] if look["step"] >= EARLY), None)


def _span(margins: Sequence[float]) -> str:
    return f"{margins[0]:+.3f}" if len(margins) == 1 else f"{min(margins):+.3f} to {max(margins):+.3f}"


def _draw(records: Sequence[Record], picture: Path) -> Path:
    from matplotlib.figure import Figure

    from dynamask.inspect.style import BLACK, BLUE, GREEN, ORANGE, SKY, save_figure

    corpora = sorted({record.config["corpus"] for record in records})
    losses: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.result["loss"] is not None:
            losses[variant_name(record.config)][record.config["corpus"]].append(record.result["loss"])
    order = sorted(losses, key=lambda name: -float(np.mean([loss for each in losses[name].values() for loss in each])))
    figure = Figure(figsize=(4.6 + 3.4 * len(corpora), 1.4 + 0.26 * len(order)), layout="constrained")
    panels = figure.subplots(1, len(corpora), squeeze=False, sharey=True)[0]
    for axes, corpus in zip(panels, corpora, strict=True):
        for row, name in enumerate(order):
            color = GREEN if _mixed(name) else {"swa": ORANGE, "mha": BLACK}.get(name[:3], BLUE)
            marker = "D" if "paper" in name else "^" if "penalty" in name else "o"
            own = losses[name].get(corpus, [])
            axes.plot(own, [row] * len(own), marker, color=SKY if "paper" in name else color, markersize=6)
        axes.set(title=corpus, xlabel="validation loss, nats per token")
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.grid(alpha=0.3)
    return save_figure(figure, picture)
