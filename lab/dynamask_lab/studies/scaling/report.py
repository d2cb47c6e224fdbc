"""Scaling in the report: loss against compute, by step and by position, and judged forms against every rival."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamask_lab.language.engine import LanguageConfig
from dynamask_lab.studies.judged import SCALING, Judged, found_windows, pairs_of, share_of_pairs, window_share
from dynamask_lab.studies.locality.study import GENTLE_MEANS, variant_name
from dynamask_lab.studies.scaling.study import scaling_summary
from dynamask_lab.sweeps.provenance import shared
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section
from dynamask_lab.sweeps.verdicts import (
    LOSS_INTEREST,
    NOT_TESTED,
    REPRODUCED,
    Interval,
    all_of,
    judge,
    paired_difference,
)

RIVALS = ("mha", "swa", "mla", "nsa")


@dataclass(frozen=True)
class _Best:
    """One mechanism at one size, at its best learning rate.

    Attributes:
        size: non-embedding parameters that runs are matched by.
        rates: those tried.
        runs: of the best rate.
    """

    size: int
    rates: frozenset[float]
    runs: list[Record]

    @property
    def seeds(self) -> set[int]:
        return {run.seed for run in self.runs}

    @property
    def losses(self) -> dict[int, float]:
        """By seed, infinite where the run diverged."""
        return {run.seed: math.inf if run.result["loss"] is None else run.result["loss"] for run in self.runs}

    @property
    def at_the_edge(self) -> bool:
        """Whether the best rate is the least or the greatest of several: a better one may lie outside."""
        return len(self.rates) > 1 and self.runs[0].config["learning_rate"] in (min(self.rates), max(self.rates))


@reports("scaling")
def report_scaling(records: Sequence[Record], folder: Path) -> Section:
    """See `Experiment.report`."""
    best = _best(records)
    keys = [run.key for sizes in best.values() for found in sizes for run in found.runs]
    largest = max(found.size for sizes in best.values() for found in sizes)
    at_largest = {name: found for name, sizes in best.items() for found in sizes if found.size == largest}
    seeds = len({record.seed for record in records})
    common = {(config.corpus, config.length) for config in (LanguageConfig.of(record.config) for record in records)}
    data = "; ".join(f"{corpus}, {length} tokens a sequence" for corpus, length in sorted(common))
    exhibits = [
        Exhibit(
            "loss",
            "Loss against compute",
            keys,
            f"Validation loss in nats per token at the best learning rate tried; {data}; {seeds} seed"
            f"{'s' if seeds > 1 else ''}. `pairs`: query-key pairs as a share of dense attention's. Compute is useful "
            f"work: weights, output layer, and attention over the keys that are seen. {GENTLE_MEANS}",
            scaling_summary(records),
            _draw(best, at_largest, folder / "scaling.svg"),
            "validation loss against training compute, and perplexity by position, one line per mechanism",
        ),
        Exhibit(
            "positions",
            f"Perplexity by position, {largest / 1e6:.1f}M parameters",
            [run.key for found in at_largest.values() for run in found.runs],
            table=[_positions_row(name, found) for name, found in at_largest.items()],
        ),
        Exhibit(
            "speed",
            f"Speed and memory, {largest / 1e6:.1f}M parameters",
            [run.key for found in at_largest.values() for run in found.runs],
            "Where runs shared their device with others, as many as it says, their speeds do not compare."
            if any(shared(run.device) for found in at_largest.values() for run in found.runs)
            else "",
            [_speed_row(name, found) for name, found in at_largest.items()],
        ),
    ]
    gap = _gap_rows(at_largest)
    if gap:
        about = "Nats below mha after so many steps (mean over seeds); the last column is the end of the training."
        names = [run.key for name, found in at_largest.items() if name != "mha" for run in found.runs]
        names += [run.key for run in at_largest["mha"].runs]
        title = f"Lead over dense attention by step, {largest / 1e6:.1f}M parameters"
        exhibits.insert(1, Exhibit("gap", title, names, about, gap))
    return Section("", exhibits, _findings(best))


def _gap_rows(at_largest: dict[str, _Best]) -> list[Row]:
    """How far every mechanism lies below mha at each look, at the largest size."""
    if "mha" not in at_largest:
        return []
    dense = loss_by_step(at_largest["mha"].runs)
    rows: list[Row] = []
    for name, found in at_largest.items():
        own = loss_by_step(found.runs)
        both = sorted(own.keys() & dense.keys())
        if name != "mha" and both:
            rows.append({"mechanism": name} | {f"@{step}": f"{dense[step] - own[step]:+.3f}" for step in both})
    return rows


def loss_by_step(runs: Sequence[Record]) -> dict[int, float]:
    """Validation loss after so many steps, mean over runs, at the steps that all of them looked at."""
    curves = [{look["step"]: look["loss"] for look in run.result["curve"] if look["loss"] is not None} for run in runs]
    steps = set(curves[0]).intersection(*curves[1:])
    return {step: float(np.mean([curve[step] for curve in curves])) for step in sorted(steps)}


def _best(records: Sequence[Record]) -> dict[str, list[_Best]]:
    """Mechanism -> its sizes in rising order."""
    groups: dict[str, dict[int, dict[float, list[Record]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for record in records:
        size = LanguageConfig.of(record.config).parameters
        groups[variant_name(record.config, any_depth=True)][size][record.config["learning_rate"]].append(record)
    found: dict[str, list[_Best]] = {}
    for name, sizes in sorted(groups.items()):
        found[name] = []
        for size, by_rate in sorted(sizes.items()):
            rate = _best_rate(by_rate)
            found[name].append(_Best(size, frozenset(by_rate), by_rate[rate]))
    return found


def _best_rate(by_rate: dict[float, list[Record]]) -> float:
    """The rate of the least mean loss over the seeds that every rate ran; over all of them where there is none."""
    common = set.intersection(*({run.seed for run in runs} for runs in by_rate.values()))
    means = {
        rate: _mean([run.result["loss"] for run in runs if not common or run.seed in common])
        for rate, runs in by_rate.items()
    }
    return min(means, key=lambda rate: means[rate])


def _mean(losses: Sequence[float | None]) -> float:
    return float(np.mean([np.inf if loss is None else loss for loss in losses]))


def _findings(best: dict[str, list[_Best]]) -> list[Finding]:
    """Judged forms against every rival, at the largest size that several seeds of them ran at and at the largest."""
    findings = []
    for form in SCALING:
        sizes = best.get(form.name, [])
        several = [found for found in sizes if len(found.seeds) > 1]
        for found in dict.fromkeys(id(each) for each in (*several[-1:], *sizes[-1:])):
            ours = next(each for each in sizes if id(each) == found)
            findings.append(_compare(form, ours, best))
        if sizes and form.role == "plain" and not any(_sees_all(found) for found in sizes):
            measured = (
                "the paper trains most of its tokens where the window holds the whole context; no run of this sweep did"
            )
            setting = {"w/N": "1", "size": "", "seeds": "0", "pairs": "100%"}
            subject = f"{form.name}, the paper's own setting"
            findings.append(Finding("perplexity", subject, measured, NOT_TESTED, [], form.role, setting))
    return findings


def _sees_all(found: _Best) -> bool:
    return all(share_of_pairs(run.config) >= 1 for run in found.runs)


def _gap(ours: _Best, theirs: _Best) -> Interval:
    """How far our losses lie below theirs, seed by seed: runs of one seed see the same tokens in the same order."""
    return paired_difference(ours.losses, theirs.losses)


def _compare(form: Judged, ours: _Best, best: dict[str, list[_Best]]) -> Finding:
    """The form against every rival of its size that had no fewer rates to choose from, by the seeds they share."""
    told, verdicts, edges, difference = [], [], [], ""
    keys = [run.key for run in ours.runs]
    for rival in RIVALS:
        tuned = next(iter(best.get(rival, ())), None)
        own = next(iter(best[form.name]))
        for theirs in best.get(rival, ()):
            if theirs.size != ours.size or tuned is None or len(tuned.rates) < len(own.rates):
                continue
            found = _gap(ours, theirs)
            verdict = judge(found, LOSS_INTEREST, seeds=len(ours.seeds & theirs.seeds))
            if tuned.at_the_edge:
                edges.append(rival)
                verdict = NOT_TESTED if verdict == REPRODUCED else verdict
            told.append(f"{rival} {found}")
            difference = f"{found} nats" if rival == "mha" or not difference else difference
            verdicts.append(verdict)
            keys += [run.key for run in theirs.runs]
    setting = {
        "w/N": window_share(found_windows(ours.runs[0])),
        "size": f"{ours.size / 1e6:.1f}M",
        "seeds": str(len(ours.seeds)),
        "pairs": pairs_of(ours.runs),
    }
    subject = f"{form.name}, {setting['size']}"
    if not told:
        measured = "no rival ran as many learning rates at that size"
        return Finding("perplexity", subject, measured, NOT_TESTED, keys, form.role, setting)
    measured = f"nats below {', '.join(told)}"
    if edges:
        measured += (
            f"; the best rate of {' and '.join(edges)} is the edge of the grid, so a lead over them decides nothing"
        )
    if len(told) < len(RIVALS):
        measured += f"; not compared with {', '.join(r for r in RIVALS if not any(t.startswith(r) for t in told))}"
        verdicts.append(NOT_TESTED)
    interest = f"{LOSS_INTEREST} nats"
    verdict = all_of(verdicts)
    return Finding("perplexity", subject, measured, verdict, keys, form.role, setting, interest, difference)


def _positions_row(name: str, found: _Best) -> Row:
    buckets: dict[tuple[int, int], list[float]] = defaultdict(list)
    for run in found.runs:
        for bucket in run.result["positions"]:
            if bucket["loss"] is not None:
                buckets[bucket["from"], bucket["to"]].append(bucket["loss"])
    cells = {f"{low}–{high - 1}": f"{math.exp(np.mean(losses)):.2f}" for (low, high), losses in sorted(buckets.items())}
    return {"mechanism": name} | cells


def _speed_row(name: str, found: _Best) -> Row:
    row = {"mechanism": name, "parameters": f"{found.runs[0].result['parameters']['non_embedding'] / 1e6:.2f}M"}
    speeds = [run.result["tokens_per_second"] for run in found.runs if run.result["tokens_per_second"]]
    memory = [run.result["peak_memory"] for run in found.runs if run.result["peak_memory"]]
    row["tokens/s"] = f"{np.median(speeds):,.0f}" if speeds else ""
    row["peak memory, GiB"] = f"{max(memory) / 2**30:.2f}" if memory else ""
    row["device"] = ", ".join(sorted({run.device for run in found.runs}))
    return row


def _draw(best: dict[str, list[_Best]], at_largest: dict[str, _Best], picture: Path) -> Path:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter

    from dynamask.inspect.style import line_style
    from dynamask_lab.report.pictures import save_small

    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    handles: dict[str, Any] = {}
    for number, (name, sizes) in enumerate(best.items()):
        style = line_style(name, number)
        runs = [run for found in sizes for run in found.runs if run.result["loss"] is not None]
        compute, loss = (np.array([run.result[each] for run in runs]) for each in ("flops", "loss"))
        if len(runs):
            left.plot(compute, loss, **(style | {"linestyle": "none"}))
            (handles[name],) = left.plot([], [], **style)
        if name in at_largest and at_largest[name].runs[0].result["loss"] is not None:
            buckets = at_largest[name].runs[0].result["positions"]
            middle = [(bucket["from"] + bucket["to"]) / 2 for bucket in buckets]
            means = np.mean([[b["loss"] for b in run.result["positions"]] for run in at_largest[name].runs], axis=0)
            right.plot(middle, np.exp(means), **style)
    left.set(xscale="log", yscale="log", xlabel="training compute, FLOP", ylabel="validation loss, nats per token")
    for which in ("major", "minor"):  # powers of ten say little of losses between two and five
        getattr(left.yaxis, f"set_{which}_formatter")(FormatStrFormatter("%g"))
    right.set(xlabel="position in the sequence", ylabel="perplexity")
    right.set_xscale("log", base=2)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.legend(list(handles.values()), list(handles), loc="outside right center", fontsize=8)
    return save_small(figure, picture)
