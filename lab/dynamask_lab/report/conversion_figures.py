"""The figures of the conversion study that its goals judge, each with its 95% interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.conversion.levers import DENSE, converted
from dynamask_lab.studies.conversion.measure import BENCHMARKS
from dynamask_lab.studies.conversion.peers import PEERS
from dynamask_lab.studies.conversion.report import GROUPS, RESAMPLES, Study, Values, difference, interval

GOAL_LENGTHS = (1024, 2048, 4096)
BLOCK = 8192
FIRST = 25
"""Examples of each task and length that every form answers."""


@dataclass(frozen=True)
class Measured:
    """A figure that a goal judges.

    Attributes:
        text: as the table shows it.
        value: what is compared with the bar; None where nothing was measured.
        high: the upper end of the interval, where it counts.
    """

    text: str
    value: float | None = None
    high: float | None = None


NOTHING = Measured("")


def text_loss(study: Study, specs: Sequence[Spec], base: Spec) -> Measured:
    """How far the mean text loss of forms, the mean of which counts, is above that of another."""
    other = study.losses(base.name, "text")
    values = _mean([study.losses(spec.name, "text") for spec in specs])
    common = [key for key in values if key in other]
    if not common:
        return NOTHING
    return Measured(difference(values, other), float(np.mean([values[key] - other[key] for key in common])))


def scores(study: Study, spec: Spec) -> Values:
    """The needle scores that count, by example."""
    found: dict[Any, float] = {}
    for length in GOAL_LENGTHS:
        found |= study.scores(spec.name, GROUPS["needles"], length=length)
    return {key: value for key, value in found.items() if key[2] == "essays"}


def needles(study: Study, specs: Sequence[Spec], base: Spec) -> Measured:
    """The needle score of forms, the mean of which counts, as a share of another's."""
    values, other = _mean([scores(study, spec) for spec in specs]), scores(study, base)
    pairs = np.array([(values[key], other[key]) for key in values if key in other])
    if not len(pairs) or not pairs[:, 1].sum():
        return NOTHING
    drawn = pairs[np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))].sum(1)
    low, high = np.percentile(drawn[:, 0] / np.maximum(drawn[:, 1], 1e-9), (2.5, 97.5))
    ratio = float(pairs[:, 0].sum() / pairs[:, 1].sum())
    return Measured(f"{ratio:.3f} ({low:.2f} to {high:.2f})", ratio)


def ahead(study: Study, spec: Spec, tasks: Sequence[str], peers: Sequence[str] = PEERS) -> tuple[str, Measured]:
    """The best peer of a task group, and the difference; its value is the interval's lower end.

    Peers count that answered all of the first examples; further examples count that all of these peers answered.
    Texts other than essays do not count: not every peer read them.
    """
    scored = {peer: study.scores(f"{peer}-{spec.budget}", tasks) for peer in peers}
    values = study.scores(spec.name, tasks)
    values = {key: value for key, value in values.items() if key[2] == "essays"}
    first = {key for key in values if key[3] < FIRST}
    scored = {peer: found for peer, found in scored.items() if found and set(found) >= first}
    common = [key for key in values if all(key in found for found in scored.values())]
    if not common or not scored:
        return "", NOTHING
    best = max(scored, key=lambda peer: float(np.mean([scored[peer][key] for key in common])))
    figures = np.array([values[key] - scored[best][key] for key in common])
    low, high = interval(figures)
    digits = 3 if len(common) > 400 else 2
    text = f"{figures.mean():+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return best, Measured(text, low, high)


def benchmarks(study: Study, specs: Sequence[Spec]) -> tuple[Measured, bool]:
    """How far the answers of forms, the mean of which counts, are above the dense model's; whether 0 is within."""
    base = _answers(study, DENSE)
    values = _mean([_answers(study, spec) for spec in specs])
    figures = np.array([value - base[key] for key, value in values.items() if key in base])
    if not len(figures):
        return NOTHING, False
    low, high = interval(figures)
    return Measured(f"{figures.mean():+.4f} ({low:+.4f} to {high:+.4f})", float(figures.mean())), low <= 0 <= high


def seconds(study: Study, seeds: Sequence[int], trained: Mapping[int, Spec] | None = None) -> Measured:
    """Seconds of ranks, windows and distillation, from a compiler's cache that held nothing.

    Args:
        study: with the stages; of several runs of a stage the last counts.
        seeds: whose mean counts; those that ran all stages.
        trained: the distillation of each seed; None: the model stays frozen.

    Returns:
        The mean, with the fastest and the slowest seed where there are several, and the mean of each stage.
    """
    found = []
    for seed in seeds:
        names = {"learn_ranks": Spec("converted", None, seed=seed), "allocate_windows": converted(steps=0, seed=seed)}
        if trained is not None:
            names["train"] = trained[seed]
        cold = [
            [row["result"]["seconds"] for row in study.of(spec.name, stage) if not row["result"].get("warm")]
            for stage, spec in names.items()
        ]
        if all(cold):
            found.append([float(each[-1]) for each in cold])
    if not found:
        return NOTHING
    totals = [sum(stages) for stages in found]
    parts = " + ".join(f"{each:.0f}" for each in np.mean(found, axis=0))
    reach = f"{min(totals):.0f} to {max(totals):.0f}; " if len(totals) > 1 else ""
    return Measured(f"{np.mean(totals):.0f} ({reach}{parts})", float(np.mean(totals)))


def timed(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[int, bool], float]:
    """The most tokens per second of distilling SmolLM2 compiled, by blocks of a batch, by CUDA graph or not."""
    found: dict[tuple[int, bool], float] = {}
    for line in lines:
        alone = not line.get("beside")
        wanted = line.get("part") == "distillation" and line.get("compiled") and line.get("model") == "smollm2-135m"
        if alone and wanted:
            name = int(line["B"]), bool(line.get("recorded"))
            found[name] = max(found.get(name, 0.0), float(line["tokens_per_s"]))
    return found


def steady_rate(study: Study, *, turns: bool) -> Measured:
    """The most tokens per second of a training behind its first steps, which compile.

    Args:
        study: with the trainings.
        turns: of those that had the GPU in turns, beside evaluations; else of those beside another training.
    """
    rates = []
    for row in study.rows:
        times = row["result"].get("times") if row["measure"] == "train" else None
        if times and not row["spec"].get("label_share") and turns == ("waited" in row["result"]):
            (first, start), (last, end) = times[1], times[-1]
            steps = len(row["result"]["history"])
            rates.append((last - first) / (end - start) * row["result"]["tokens"] / steps)
    return Measured(f"{max(rates):,.0f}", max(rates)) if rates else NOTHING


def speed(study: Study, spec: Spec, batch: int) -> tuple[float, float] | None:
    """Bytes of a sequence's cache and decoded tokens per second, from the run of forms with slopes."""
    found = [
        row["result"]
        for row in study.of(spec.name, "speed")
        if row["settings"].get("slopes") and row["settings"]["batch"] == batch
    ]
    return (found[-1]["cache_bytes"], found[-1]["decoded_tokens_per_second"]) if found else None


def share_of_pairs(study: Study, spec: Spec) -> float | None:
    """The share of a block's pairs of query and key that windows of a form let through; None where none are kept."""
    for row in study.rows:
        own = row["spec"]
        same = own["budget"] == spec.budget and own["seed"] == spec.seed and own["ranks"] == spec.ranks
        if row["measure"] == "allocate_windows" and same and own.get("allocation") == spec.allocation:
            windows = [window for layer in row["result"]["windows"] if layer for window in layer]
            shares = [window * (2 * BLOCK - window) / BLOCK**2 if window < BLOCK else 1.0 for window in windows]
            return float(np.mean(shares))
    return None


def _answers(study: Study, spec: Spec) -> Values:
    return {key: value for name in BENCHMARKS for key, value in study.answers(spec.name, name, "acc").items()}


def _mean(found: Sequence[Values]) -> Values:
    """The mean over forms of what all of them have; nothing if one of them was not measured."""
    common = set.intersection(*(set(values) for values in found)) if found else set()
    return (
        {key: float(np.mean([values[key] for values in found])) for key in found[0] if key in common} if found else {}
    )
