"""Locality in the report: every form's loss, and whether it is level with a sliding window early and mha at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynamask_lab.language.engine import LanguageConfig
from dynamask_lab.studies.judged import LOCALITY, LOCALITY_EVEN, Judged, found_windows, pairs_of, window_share
from dynamask_lab.studies.locality.study import GENTLE_MEANS, locality_summary, variant_name
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section
from dynamask_lab.sweeps.verdicts import (
    LOSS_INTEREST,
    NOT_TESTED,
    all_of,
    judge,
    judge_no_worse,
    mean_interval,
)

EARLY = 100
"""Steps after which dma is to be no worse than swa."""

_CONTROL = "no choice"
"""In the name of a run whose window is all local (`variant_name`)."""

_RANKED = ", ranked by attention"

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
            f"the distance penalty on its logits that dma's recency amounts to. `pairs`: query-key pairs as a share of "
            f"dense attention's; `widest layer`: the keys of its queries. {GENTLE_MEANS}",
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
    findings = [_compare("locality-asked", form, runs) for form in LOCALITY_EVEN if form.name in runs]
    findings += [_compare("locality", form, runs) for form in LOCALITY if form.name in runs]
    for form in (LOCALITY_EVEN[1], LOCALITY[1]):
        control = without_choice(form.name)
        if form.name in runs and control in runs:
            findings.append(_choice(form, control, runs))
    return Section("", exhibits, findings)


def _mixed(name: str) -> bool:
    """Whether layers of several mechanisms have that name: "4 dma+2 mha"."""
    return name[0].isdigit()


def _compare(claim: str, form: Judged, runs: _Losses) -> Finding:
    """Against swa at the first look from step EARLY on, against mha at the end, at equal corpus, seed and rate."""
    both = sorted(runs[form.name].keys() & runs["swa"].keys() & runs["mha"].keys())
    keys = [runs[name][place].key for place in both for name in (form.name, "swa", "mha")]
    setting = _setting([runs[form.name][place] for place in both])
    early, late = [], []
    for place in both:
        ours, swa, mha = (runs[name][place] for name in (form.name, "swa", "mha"))
        looks = [(_early(ours), _early(swa)), (ours.result["loss"], mha.result["loss"])]
        if any(loss is None for pair in looks for loss in pair):
            measured = "a run was too short or diverged"
            return Finding(claim, form.name, measured, NOT_TESTED, keys, form.role, setting)
        (our_early, swa_early), (our_late, mha_late) = looks
        early.append(swa_early - our_early)  # type: ignore[operator]
        late.append(mha_late - our_late)
    if not both:
        measured = "swa and mha did not run at the same settings"
        return Finding(claim, form.name, measured, NOT_TESTED, [], form.role, setting)
    found = [mean_interval(gains) for gains in (early, late)]
    measured = (
        f"nats below swa at step {EARLY} {found[0]}, below mha at the end {found[1]}, over {len(both)} runs of each"
    )
    seeds = len({place[2] for place in both})
    verdict = all_of([judge_no_worse(each, LOSS_INTEREST, seeds=seeds) for each in found])
    interest, short = f"{LOSS_INTEREST} nats", f"{found[1]} nats to mha at the end"
    return Finding(claim, form.name, measured, verdict, keys, form.role, setting, interest, short)


def _setting(records: Sequence[Record]) -> Row:
    if not records:
        return {}
    return {
        "w/N": window_share(found_windows(records[0])),
        "size": f"{LanguageConfig.of(records[0].config).parameters / 1e6:.1f}M",
        "seeds": str(len({record.seed for record in records})),
        "pairs": pairs_of(list(records)),
    }


def without_choice(form: str) -> str:
    """The name of what differs from a form by its choice of keys alone: the same scores on the logits of the newest."""
    name, mark, rest = form.partition(_RANKED)
    kind, comma, others = name.partition(", ")
    return f"{kind}, {_CONTROL}{comma}{others}{rest if mark else ''}"


def _choice(form: Judged, control: str, runs: _Losses) -> Finding:
    """A form against its control, at equal corpus, seed and rate."""
    both = sorted(runs[form.name].keys() & runs[control].keys())
    pairs = [(runs[control][place].result["loss"], runs[form.name][place].result["loss"]) for place in both]
    keys = [runs[name][place].key for place in both for name in (form.name, control)]
    setting = _setting([runs[form.name][place] for place in both])
    if not pairs or any(loss is None for pair in pairs for loss in pair):
        measured = "no finished pair of runs at the same settings"
        return Finding("choice", form.name, measured, NOT_TESTED, keys, form.role, setting)
    found = mean_interval([without - chosen for without, chosen in pairs])
    measured = f"nats below {control} at the end {found}, over {len(both)} runs of each"
    verdict = judge(found, LOSS_INTEREST, seeds=len({place[2] for place in both}))
    return Finding("choice", form.name, measured, verdict, keys, form.role, setting, f"{LOSS_INTEREST} nats")


def _early(record: Record) -> float | None:
    return next((look["loss"] for look in record.result["curve"] if look["step"] >= EARLY), None)


def _draw(records: Sequence[Record], picture: Path) -> Path:
    from matplotlib.figure import Figure

    from dynamask.inspect.style import BLACK, BLUE, GREEN, ORANGE, SKY
    from dynamask_lab.report.pictures import save_small

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
    return save_small(figure, picture)
