"""Scaling in the report: loss against compute with the fits, perplexity by position, dma against every rival."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamask_lab.language.engine import LanguageConfig
from dynamask_lab.studies.locality.study import GENTLE_MEANS, variant_name
from dynamask_lab.studies.scaling.power_law import fit_power_law
from dynamask_lab.studies.scaling.study import scaling_summary
from dynamask_lab.sweeps.provenance import shared
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section

RIVALS = ("mha", "swa", "mla", "nsa")


@dataclass(frozen=True)
class _Best:
    """One mechanism at one size, at its best learning rate.

    Attributes:
        size: non-embedding parameters that runs are matched by.
        rates: how many were tried.
        runs: of the best rate.
    """

    size: int
    rates: int
    runs: list[Record]

    @property
    def seeds(self) -> set[int]:
        return {run.seed for run in self.runs}


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
            f"{'s' if seeds > 1 else ''}. Exponents with 90% intervals of a residual bootstrap. Compute is useful "
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
    forms = [name for name in best if name.startswith("dma")]
    return Section("", exhibits, [_compare(form, best) for form in forms])


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
            means = {rate: _mean([run.result["loss"] for run in runs]) for rate, runs in by_rate.items()}
            rate = min(means, key=lambda each: means[each])
            found[name].append(_Best(size, len(by_rate), by_rate[rate]))
    return found


def _mean(losses: Sequence[float | None]) -> float:
    return float(np.mean([np.inf if loss is None else loss for loss in losses]))


def _compare(form: str, best: dict[str, list[_Best]]) -> Finding:
    """The form against every rival at every size, over the seeds that both ran, where the rival had no fewer rates to
    choose from."""
    margins: list[tuple[float, str]] = []
    keys: list[str] = []
    met = set()
    for ours in best[form]:
        for rival in RIVALS:
            for theirs in best.get(rival, ()):
                seeds = ours.seeds & theirs.seeds
                if theirs.size == ours.size and theirs.rates >= ours.rates and seeds:
                    met.add(rival)
                    pair = [[run for run in each.runs if run.seed in seeds] for each in (ours, theirs)]
                    losses = [_mean([run.result["loss"] for run in runs]) for runs in pair]
                    margins.append((losses[1] - losses[0], f"{rival} at {ours.size / 1e6:.1f}M"))
                    keys += [run.key for runs in pair for run in runs]
    keys = list(dict.fromkeys(keys))
    if not margins:
        return Finding("perplexity", form, "no rival ran as many learning rates with one of its seeds", None, keys)
    (worst, against), (most, over) = min(margins), max(margins)
    ahead = sum(margin > 0 for margin, _ in margins)
    measured = (
        f"lower in {ahead} of {len(margins)} comparisons; {_perplexity(worst)} against {against}, {_perplexity(most)} "
        f"against {over}"
    )
    if met != set(RIVALS):
        missing = ", ".join(sorted(set(RIVALS) - met))
        return Finding("perplexity", form, f"{measured}; not compared with {missing}", None, keys)
    return Finding("perplexity", form, measured, ahead == len(margins), keys)


def _perplexity(margin: float) -> str:
    """A difference of losses as the change of perplexity it is."""
    return "diverged" if not math.isfinite(margin) else f"perplexity {math.expm1(-margin):+.1%}"


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

    from dynamask.inspect.style import line_style, save_figure

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
        if len(np.unique(compute)) > 1:
            law = fit_power_law(compute, loss, samples=1)
            grid = np.geomspace(compute.min(), compute.max(), 30)
            left.plot(grid, law(grid), **(style | {"marker": ""}))
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
    return save_figure(figure, picture)
