"""The study `reading` in the report: losses by how far back a last use lies, and the claim about far ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dynamask_lab.studies.judged import found_windows, pairs_of, window_share
from dynamask_lab.studies.reading.study import (
    CHOSEN,
    EQUAL,
    HALF,
    LEVEL,
    MORE,
    SLIDING,
    reading_name,
    reading_summary,
    sliced,
)
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Section
from dynamask_lab.sweeps.verdicts import LOSS_INTEREST, NOT_TESTED, judge, paired_difference

_FAR = ("256 to 8191", "8192 and more")


@reports("reading")
def report_reading(records: Sequence[Record], folder: Path) -> Section:
    """See `Experiment.report`."""
    text = (
        "Test loss, nats per token, mean over seeds, and the loss by how many tokens back a token last followed the "
        "same token as here. The wide layer sees 5632 keys, the others 256."
    )
    keys = [record.key for record in records]
    return Section("", [Exhibit("loss", "Loss by last use", keys, text, reading_summary(records))], _findings(records))


def _better_dense(runs: Mapping[str, Sequence[Record]]) -> str:
    """Dense attention at the rate with the lower mean test loss."""
    ran = [name for name in ("dense", HALF) if runs.get(name)]
    return min(ran, key=lambda name: float(np.mean([run.result["test"] for run in runs[name]])), default="dense")


def _findings(records: Sequence[Record]) -> list[Finding]:
    """The chosen keys against dense attention and against the newest keys, in the far slices."""
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        runs[reading_name(record.config)].append(record)
    found = []
    for name, when in ((name, when) for name in (CHOSEN, LEVEL) for when in (MORE, EQUAL)):
        ours = runs.get(f"{name}, {when}", [])
        for rival in (_better_dense(runs), f"{SLIDING}, {when}"):
            theirs = runs.get(rival, [])
            if not ours or not theirs:
                continue
            for part in _FAR:
                gap = paired_difference(
                    *(
                        {run.seed: sliced(run)[part][0] for run in side if part in sliced(run)}
                        for side in (ours, theirs)
                    )
                )
                tokens = sliced(ours[0])[part][1] if part in sliced(ours[0]) else 0
                measured = (
                    f"test loss of tokens last used {part} tokens back ({tokens} a run), nats below {rival} {gap}"
                )
                setting = {
                    "w/N": window_share(found_windows(ours[0])),
                    "size": "4.4M",
                    "seeds": str(min(len(ours), len(theirs))),
                    "pairs": pairs_of(ours),
                }
                verdict = judge(gap, LOSS_INTEREST, seeds=min(len(ours), len(theirs)))
                short = f"{gap} nats"
                if rival.startswith("dense") and not (runs.get("dense") and runs.get(HALF)):
                    verdict, measured = NOT_TESTED, f"{measured}; dense attention ran at one rate, perhaps too high"
                    short += ", dense at one rate"
                against = rival.removesuffix(f", {when}")
                subject = f"{name}, {when}, against {against}, last used {part} tokens back"
                role = "best" if when == MORE and name == CHOSEN else ""
                keys = [run.key for run in (*ours, *theirs)]
                interest = f"{LOSS_INTEREST} nats"
                found.append(Finding("reading", subject, measured, verdict, keys, role, setting, interest, short))
    return found
