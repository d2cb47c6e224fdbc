"""The study `recurrent` in the report: test losses, and the claim about a choice of keys beside a recurrent model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dynamask_lab.studies.recurrent.study import WINDOW, recurrent_name, recurrent_summary
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Section
from dynamask_lab.sweeps.verdicts import LOSS_INTEREST, all_of, judge, paired_difference


@reports("recurrent")
def report_recurrent(records: Sequence[Record], folder: Path) -> Section:
    """See `Experiment.report`."""
    text = (
        f"Test loss, nats per token, mean over seeds. Five of six layers are a Gated DeltaNet, and one attends: to "
        f"every key, to the newest {WINDOW}, or to the {WINDOW} of the best learned ranks. `gdn` has no layer that "
        "attends; it has a few per cent more parameters than the others."
    )
    keys = [record.key for record in records]
    exhibit = Exhibit("loss", "Loss by form", keys, text, recurrent_summary(records))
    runs: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        runs[recurrent_name(record.config)][record.seed] = record
    ours, findings = runs.get("gdn + learned", {}), []
    rivals = [name for name in ("gdn", "gdn + sliding", "gdn + dense") if runs.get(name)]
    if ours and rivals:
        losses = {name: {seed: float(run.result["test"]) for seed, run in each.items()} for name, each in runs.items()}
        gaps = {name: paired_difference(losses["gdn + learned"], losses[name]) for name in rivals}
        seeds = {name: len(runs[name].keys() & ours.keys()) for name in rivals}
        told = (f"{name} {gap} ({seeds[name]} seed{'s' if seeds[name] > 1 else ''})" for name, gap in gaps.items())
        measured = f"test loss, nats below {', '.join(told)}"
        verdicts = [judge(gap, LOSS_INTEREST, seeds=seeds[name]) for name, gap in gaps.items() if name != "gdn + dense"]
        first = next(iter(ours.values()))
        setting = {
            "w/N": f"1/{first.config['length'] // WINDOW}",
            "size": f"{first.result['parameters']['non_embedding'] / 1e6:.1f}M",
            "seeds": " to ".join(dict.fromkeys(str(bound(seeds.values())) for bound in (min, max))),
        }
        used = [run.key for name in ("gdn + learned", *rivals) for run in runs[name].values()]
        findings.append(
            Finding(
                "recurrent",
                "gdn + learned",
                measured,
                all_of(verdicts),
                used,
                "best",
                setting,
                f"{LOSS_INTEREST} nats",
                f"{gaps['gdn + sliding']} nats to gdn + sliding" if "gdn + sliding" in gaps else "",
            )
        )
    return Section("", [exhibit], findings)
