"""The study `scratch` in the report: test losses by form, and the claim about perplexity at every window share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynamask_lab.language.engine import LanguageConfig
from dynamask_lab.studies.judged import pairs_of, window_share
from dynamask_lab.studies.scratch.study import scratch_name, scratch_summary
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Section
from dynamask_lab.sweeps.verdicts import LOSS_INTEREST, NOT_TESTED, Interval, SeedSpread, all_of, judge, judge_no_worse

GOAL_INTEREST = 0.01
"""How far above dense attention's loss the goal allows the best form's to lie, in nats per token."""
_ROLES = {"paper": "plain", "learned, head windows": "best", "newest, head windows": "control"}
_CHOICES = ("sliding + sinks", "newest, head windows", "paper")


@reports("scratch")
def report_scratch(records: Sequence[Record], folder: Path) -> Section:
    """See `Experiment.report`."""
    text = "Nats per token, mean over seeds. Verdicts read the test split, on which no form is chosen."
    exhibits = [
        Exhibit("loss", "Loss by form", [record.key for record in records], text, scratch_summary(records)),
    ]
    return Section("", exhibits, _findings(records))


def _test_loss(record: Record) -> float:
    loss = record.result.get("test")
    return math.inf if loss is None else float(loss)


def _findings(records: Sequence[Record]) -> list[Finding]:
    """Every form against dense attention of the same size, and against the rivals of its window."""
    sizes: dict[int, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        sizes[LanguageConfig.of(record.config).parameters][scratch_name(record.config)].append(record)
    findings = []
    for size, found in sizes.items():
        spread = SeedSpread.paired([{run.seed: _test_loss(run) for run in runs} for runs in found.values()])
        for name, runs in sorted(found.items(), key=lambda item: _place(item[0], item[1][0])):
            form, _, at = name.rpartition(", ")
            role = _ROLES.get(form)
            if role is None:
                continue
            rivals = ["dense", *(f"{rival}, {at}" for rival in _CHOICES if at != "w = N" and rival != form)]
            rivals = [rival for rival in rivals if rival in found]
            told, verdicts = [], []
            for rival in rivals:
                gap = _gap(runs, found[rival], spread)
                seeds = min(len(runs), len(found[rival]))
                told.append(f"{rival} {gap}")
                decide = judge_no_worse if role == "best" and rival == "dense" else judge
                verdicts.append(decide(gap, GOAL_INTEREST if role == "best" else LOSS_INTEREST, seeds=seeds))
            setting = {
                "w/N": window_share(runs[0].config),
                "size": f"{size / 1e6:.1f}M",
                "seeds": str(len({run.seed for run in runs})),
                "pairs": pairs_of(runs),
            }
            keys = [run.key for each in (name, *rivals) for run in found[each]]
            measured = f"test loss, nats below {', '.join(told)}" if told else "no rival ran"
            verdict = all_of(verdicts) if told else NOT_TESTED
            subject = f"{name}, {setting['size']}, fresh tokens"
            interest = f"{GOAL_INTEREST if role == 'best' else LOSS_INTEREST} nats"
            findings.append(Finding("scratch", subject, measured, verdict, keys, role, setting, interest))
            if role != "control":
                findings.append(_perplexity(subject, name, found, spread, setting, role))
    return findings


def _gap(ours: Sequence[Record], theirs: Sequence[Record], spread: SeedSpread) -> Interval:
    """How far our loss lies below theirs, over the seeds that both have."""
    shared = {run.seed for run in ours} & {run.seed for run in theirs}
    both = [[_test_loss(run) for run in runs if run.seed in shared] for runs in (ours, theirs)]
    return spread.difference(*both) if shared else Interval(math.nan, math.nan, math.nan)


def _perplexity(
    subject: str,
    name: str,
    found: Mapping[str, list[Record]],
    spread: SeedSpread,
    setting: dict[str, str],
    role: str,
) -> Finding:
    """The paper's claim about perplexity: below dense attention, sliding windows, mla and nsa."""
    at = name.rpartition(", ")[2]
    rivals = ["dense", f"sliding + sinks, {at}", "mla", "nsa"]
    if at == "w = N":
        rivals.remove(f"sliding + sinks, {at}")  # dense attention itself
    told, verdicts, keys = [], [], [run.key for run in found[name]]
    for rival in rivals:
        if rival in found:
            gap = _gap(found[name], found[rival], spread)
            told.append(f"{rival} {gap}")
            verdicts.append(judge(gap, LOSS_INTEREST, seeds=min(len(found[name]), len(found[rival]))))
            keys += [run.key for run in found[rival]]
        else:
            verdicts.append(NOT_TESTED)
    lacking = ", ".join(rival for rival in rivals if rival not in found)
    measured = f"test loss, nats below {', '.join(told)}" + (f"; not compared with {lacking}" if lacking else "")
    return Finding("perplexity", subject, measured, all_of(verdicts), keys, role, setting, f"{LOSS_INTEREST} nats")


def _place(name: str, run: Record) -> tuple[int, str]:
    return (int(run.config.get("window") or 0), name)
