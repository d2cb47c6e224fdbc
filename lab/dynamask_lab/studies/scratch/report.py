"""The study `scratch` in the report: test losses by form, and the claim about perplexity at every window share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dynamask_lab.language.engine import LanguageConfig
from dynamask_lab.studies.judged import pairs_of, window_share
from dynamask_lab.studies.scratch.study import forms, scratch_name, scratch_summary
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Section
from dynamask_lab.sweeps.verdicts import LOSS_INTEREST, NOT_TESTED, SeedSpread, all_of, judge

RIVALS = ("dense", "sliding + sinks")
_ROLES = {"paper": "plain", "learned, head windows": "best", "learned, even": "", "newest, head windows": "control"}


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
    """Every form against dense attention and sliding windows with sinks of the same size."""
    sizes: dict[int, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        sizes[LanguageConfig.of(record.config).parameters][scratch_name(record.config)].append(record)
    findings = []
    for size, found in sizes.items():
        spread = SeedSpread.pooled([[_test_loss(run) for run in runs] for runs in found.values()])
        order = [*forms(1024), "newest, head windows"]
        for name, runs in sorted(found.items(), key=lambda item: order.index(item[0])):
            role = _ROLES.get(name.partition(",")[0], _ROLES.get(name))
            if role is None:
                continue
            told, verdicts = [], []
            for rival in RIVALS:
                if rival in found:
                    gap = spread.difference([_test_loss(r) for r in runs], [_test_loss(r) for r in found[rival]])
                    seeds = min(len(runs), len(found[rival]))
                    told.append(f"{rival} {gap}")
                    verdicts.append(judge(gap, LOSS_INTEREST, seeds=seeds))
            setting = {
                "w/N": window_share(runs[0].config),
                "size": f"{size / 1e6:.1f}M",
                "seeds": str(len({run.seed for run in runs})),
                "pairs": pairs_of(runs),
            }
            keys = [run.key for run in runs] + [
                run.key for rival in ("dense", "sliding + sinks") for run in found[rival]
            ]
            measured = f"test loss, nats below {', '.join(told)}" if told else "no rival ran"
            verdict = all_of(verdicts) if told else NOT_TESTED
            subject = f"{name}, {setting['size']}, fresh tokens"
            interest = f"{LOSS_INTEREST} nats"
            findings.append(Finding("scratch", subject, measured, verdict, keys, role, setting, interest))
            if role == "plain":  # the paper's claim names rivals that did not run here, so it cannot be borne out
                against = all_of([*verdicts, NOT_TESTED])
                lacking = f"{measured}; not compared with mla, nsa"
                findings.append(Finding("perplexity", subject, lacking, against, keys, role, setting, interest))
    return findings
