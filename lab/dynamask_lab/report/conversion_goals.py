"""The goals of the conversion study, each with what was measured and whether it is met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamask_lab.studies.conversion import close, settle
from dynamask_lab.studies.conversion.final import (
    ADAPTED,
    DISTILLED,
    LABELLED,
    LONGER,
    NARROW,
    NEWEST,
    QUICKER,
    WIDE,
)
from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.conversion.gemma import JUDGED as GEMMA_JUDGED
from dynamask_lab.studies.conversion.levers import DENSE, FROZEN, converted
from dynamask_lab.studies.conversion.measure import BENCHMARKS
from dynamask_lab.studies.conversion.report import GROUPS, Study, Values, difference, interval, share
from dynamask_lab.sweeps.section import Row

GOAL_LENGTHS = (1024, 2048, 4096)
SMOLLM2, GEMMA = "smollm2-135m-instruct", "gemma3-270m"
_TOKENS_PER_SECOND = 120_000
_PEERS = ("streaming_llm", "snapkv", "tova", "expected_attention", "keydiff", "ada_snapkv", "ada_expected_attention")


@dataclass(frozen=True)
class Measured:
    """A figure that a goal judges.

    Attributes:
        text: as the table shows it.
        value: what is compared with the bar; None where nothing was measured.
    """

    text: str
    value: float | None = None


def goal_rows(lines: Iterable[Mapping[str, Any]], timed: Iterable[Mapping[str, Any]] = ()) -> list[Row]:
    """Judge the goals.

    Args:
        lines: of the study, all models.
        timed: lines of `decode_gpu.py`, of which those of distillation count: it timed them alone on a GPU.

    Returns:
        One row per goal: what, the form, the bar, what was measured with its 95% interval, met or missed, and what
        bounds it where it is missed.
    """
    own: list[dict[str, Any]] = [dict(line) for line in lines]
    study = Study(line for line in own if line["model"] == SMOLLM2)
    rows: list[Row] = []

    def add(what: str, form: str, goal: str, found: Measured, met: bool | None, bound: str = "") -> None:
        if found.value is None:
            rows.append({"what": what, "form": form, "goal": goal, "measured": "not run", "": ""})
            return
        word = "" if met is None else "met" if met else "**missed**"
        if met is False and bound:
            word += f": {bound}"
        rows.append({"what": what, "form": form, "goal": goal, "measured": found.text, "": word})

    def below(what: str, form: str, found: Measured, bar: float, bound: str = "") -> None:
        add(what, form, f"<= {bar:+.3f}", found, found.value is not None and found.value <= bar, bound)

    def at_least(what: str, form: str, found: Measured, bar: float, bound: str = "") -> None:
        add(what, form, f">= {bar:.2f}", found, found.value is not None and round(found.value, 3) >= bar, bound)

    tried = {what: [each for each in _TRIED if study.of(each[1].name, what)] for what in ("loss", "tasks", "benchmark")}
    text = "text loss above dense"
    below(text, "frozen", _loss(study, FROZEN, DENSE), 0.040, _FROZEN)
    seeds = [converted(steps=0, seed=seed) for seed in (1, 2)]
    below(text, "frozen, mean of three seeds", _mean_loss(study, [FROZEN, *seeds]), 0.040, _FROZEN)
    for seed, spec in settle.DEFAULT.items():
        below(text, f"distilled, seed {seed}", _loss(study, spec, DENSE), 0.005, _STEPS)
    measured = [spec for spec in settle.DEFAULT.values() if study.losses(spec.name, "text")]
    below(text, f"distilled, mean of the seeds ({len(measured)})", _mean_loss(study, measured), 0.005, _STEPS)
    for name, spec in tried["loss"]:
        below(text, name, _loss(study, spec, DENSE), 0.005, _STEPS)
    against = "text loss above dense trained on the same tokens"
    below(against, "next tokens alone", _loss(study, settle.LABELLED, close.ADAPTED), 0.010, _ADAPTATION)
    below(against, "next tokens alone, 2e-4; dense at 2e-4", _loss(study, LABELLED, ADAPTED), 0.010, _OTHER_LOOP)
    name = "next tokens alone, 2e-4; dense in the same loop at 4e-4"
    add(against, name, "shown", _loss(study, LABELLED, close.ADAPTED), None)
    again = "dense trained, then converted"
    below(against, f"{again}; both at 4e-4", _loss(study, close.FROM_ADAPTED, close.ADAPTED), 0.010)

    share_of = "needle tasks at 1K to 4K, share of dense"
    add(share_of, "frozen", "shown", _needles(study, FROZEN, DENSE), None)
    for seed, spec in settle.DEFAULT.items():
        at_least(share_of, f"distilled, seed {seed}", _needles(study, spec, DENSE), 0.98, _TRIES)
    for name, spec in tried["tasks"]:
        at_least(share_of, name, _needles(study, spec, DENSE), 0.98)
    for share_kept, bar, spec, earlier in (("1/8", 1.0, settle.WIDE, WIDE), ("1/32", 0.85, settle.NARROW, NARROW)):
        at_least(share_of, f"{share_kept}, distilled", _needles(study, spec, DENSE), bar, _STEPS)
        name = f"{share_kept}, {_HALF_RATE}"
        at_least(share_of, name, _needles(study, earlier, DENSE), bar, _STEPS)
    found = _needles(study, close.FROM_ADAPTED, close.ADAPTED)
    at_least("the same, share of dense trained on the same tokens", again, found, 0.98)

    for group, tasks in GROUPS.items():
        distilled = (("distilled", settle.DEFAULT[0]), _LOST)
        longest = 4096 if group == "needles" else 8192
        ready = (each for each in distilled if study.scores(each[1].name, tasks, length=longest))
        for name, spec in (next(ready, distilled[0]), ("frozen", FROZEN)):
            peer, found = _ahead(study, spec, tasks)
            met = found.value is not None and found.value > 0
            what = f"{group}: score above the best peer's"
            own_lead = difference(study.scores(DENSE.name, tasks), study.scores(f"{peer}-{spec.budget}", tasks), 2)
            bound = f"{_PEER[group]}; the dense model is ahead by {own_lead}" if group in _PEER else ""
            add(what, f"{name}; {peer}", "interval above 0", found, met, bound)

    what = "learned ranks above newest keys in windows of their own"
    for name, spec, other in _CHOICES:
        add(f"{what}: text loss", name, "shown", _loss(study, spec, other), None)
        add(f"{what}: needle tasks, ratio", name, "shown", _needles(study, spec, other), None)

    what = "benchmarks: converted - dense"
    for seed, spec in settle.DEFAULT.items():
        add(what, f"distilled, seed {seed}", "within noise", *_benchmarks(study, [spec]))
    measured = [spec for spec in settle.DEFAULT.values() if study.of(spec.name, "benchmark")]
    name = f"distilled, mean of the seeds ({len(measured)})"
    add(what, name, "within noise", *_benchmarks(study, measured))
    for name, spec in (*tried["benchmark"], _LOST):
        add(what, name, "within noise", *_benchmarks(study, [spec]), _BENCHMARKS)

    seconds = _seconds(study, None)
    add("seconds from dense to converted", "frozen", "<= 60", seconds, (seconds.value or 0) <= 60, _SHARED)
    seconds = _seconds(study, settle.LAST[1])
    name = "distilled, beside another training on the GPU"
    add("seconds from dense to converted", name, "<= 300", seconds, (seconds.value or 0) <= 300, _SHARED)
    name = "distilled, beside another training and Gemma's jobs"
    add("seconds from dense to converted", name, "shown", _seconds(study, settle.LAST[0]), None)
    goal = f">= {_TOKENS_PER_SECOND:,}"
    for (blocks, recorded), rate in sorted(_timed(timed).items()):
        name = f"alone on the GPU, batches of {blocks} blocks" + ("" if recorded else ", recorded=False")
        found, met = Measured(f"{rate:,.0f}", rate), rate >= _TOKENS_PER_SECOND
        add("distillation, tokens/s", name, goal if recorded else "shown", found, met if recorded else None)
    steady = _steady_rate(study)
    add("distillation, tokens/s", "each of two trainings at once on a GPU", "shown", steady, None)

    gemma = Study(line for line in own if line["model"] == GEMMA)
    for name, spec in GEMMA_JUDGED:
        if gemma.losses(spec.name, "text"):
            bar = 0.005 if spec.distilled else 0.040
            below(f"Gemma 3 270M: {text}", name, _loss(gemma, spec, DENSE), bar, _GEMMA)
    for name, spec in GEMMA_JUDGED:
        if _scores(gemma, spec):
            at_least(f"Gemma 3 270M: {share_of}", name, _needles(gemma, spec, DENSE), 0.98, _GEMMA)
    return rows


_HALF_RATE = "embeddings learning, last weights, 2e-4"
_TRIED = (
    (_HALF_RATE, DISTILLED),
    ("embeddings learning, last weights", QUICKER),
    ("embeddings learning, last weights, 800 steps", LONGER),
    ("embeddings fixed, last weights, seed 1", settle.LAST[1]),
    ("a quarter of the loss at the beginning, last weights, seed 1", settle.BEGINNING),
)
"""What was tried before the default was settled, or beside it."""
_CHOICES = (
    ("distilled", settle.DEFAULT[0], settle.NEWEST),
    (f"distilled; newest keys: {_HALF_RATE}", settle.DEFAULT[0], NEWEST),
    (f"both: {_HALF_RATE}", DISTILLED, NEWEST),
)
_LOST = "embeddings learning, last weights, seed 1", close.SEEDS[0]
_TRIES = "within the interval of the examples"
_STEPS = "bounded by the length and rate of the distillation: more of both lower it"
_FROZEN = "bounded by static ranks and windows; the mean of the seeds decides"
_ADAPTATION = "train the dense model first, then convert"
_OTHER_LOOP = (
    "the dense model's rate falls to zero, the converted one's to a tenth, which was not told apart; train the dense "
    "model first, then convert"
)
_BENCHMARKS = "mostly BoolQ and LAMBADA; the embeddings followed the texts"
_PEER = {
    "multi-key 3": "bounded by the dense model, which answers hardly any",
    "pairs": "bounded by the dense model, which answers hardly any",
    "tracking": "imitates the dense model, which copies the worked example's names, see variable tracking",
}
_GEMMA = "its three global heads choose their keys before the queries are known; see the rows of oracles"
_SHARED = "bounded by the training step; two runs shared the card"


def _loss(study: Study, spec: Spec, base: Spec) -> Measured:
    values, other = study.losses(spec.name, "text"), study.losses(base.name, "text")
    common = [key for key in values if key in other]
    if not common:
        return Measured("")
    return Measured(difference(values, other), float(np.mean([values[key] - other[key] for key in common])))


def _mean_loss(study: Study, specs: Sequence[Spec]) -> Measured:
    base = study.losses(DENSE.name, "text")
    found = [study.losses(spec.name, "text") for spec in specs]
    if not found or not all(found) or not base:
        return Measured("")
    figures = np.array([[values[key] - base[key] for key in base] for values in found]).mean(0)
    low, high = interval(figures)
    return Measured(f"{figures.mean():+.3f} ({low:+.3f} to {high:+.3f})", float(figures.mean()))


def _scores(study: Study, spec: Spec) -> Values:
    found: dict[Any, float] = {}
    for length in GOAL_LENGTHS:
        found |= study.scores(spec.name, GROUPS["needles"], length=length)
    return {key: value for key, value in found.items() if key[2] == "essays"}


def _needles(study: Study, spec: Spec, base: Spec) -> Measured:
    values, other = _scores(study, spec), _scores(study, base)
    common = [key for key in values if key in other]
    total = sum(other[key] for key in common)
    if not total:
        return Measured("")
    ratio = sum(values[key] for key in common) / total
    return Measured(f"{ratio:.3f} {share(values, other).partition(' ')[2]}", ratio)


def _ahead(study: Study, spec: Spec, tasks: Sequence[str]) -> tuple[str, Measured]:
    """The best peer of a task group, and the difference; its value is the interval's lower end."""
    scored = {peer: study.scores(f"{peer}-{spec.budget}", tasks) for peer in _PEERS}
    values = study.scores(spec.name, tasks)
    scored = {peer: found for peer, found in scored.items() if found and set(found) >= set(values)}
    if not values or not scored:
        return "", Measured("")
    best = max(scored, key=lambda peer: float(np.mean([scored[peer][key] for key in values])))
    figures = np.array([values[key] - scored[best][key] for key in values])
    return best, Measured(difference(values, scored[best], 2), interval(figures)[0])


def _benchmarks(study: Study, specs: Sequence[Spec]) -> tuple[Measured, bool]:
    """How far the answers of forms, the mean of which counts, are above the dense model's; whether 0 is within."""
    base: Values = {key: value for name in BENCHMARKS for key, value in study.answers(DENSE.name, name, "acc").items()}
    found = [
        {key: value for name in BENCHMARKS for key, value in study.answers(spec.name, name, "acc").items()}
        for spec in specs
    ]
    common = [key for key in base if found and all(key in values for values in found)]
    if not common:
        return Measured(""), False
    figures = np.array([np.mean([values[key] for values in found]) - base[key] for key in common])
    low, high = interval(figures)
    return Measured(f"{figures.mean():+.4f} ({low:+.4f} to {high:+.4f})", float(figures.mean())), low <= 0 <= high


def _seconds(study: Study, spec: Spec | None) -> Measured:
    """Seconds of ranks, windows and, for a spec, its distillation."""
    names = {"learn_ranks": Spec("converted", None).name, "allocate_windows": FROZEN.name}
    found = [
        min((row["result"]["seconds"] for row in study.of(name, stage)), default=None) for stage, name in names.items()
    ]
    if spec is not None:
        found.append(min((row["result"]["seconds"] for row in study.of(spec.name, "train")), default=None))
    if any(each is None for each in found):
        return Measured("")
    parts = [float(each) for each in found if each is not None]
    return Measured(f"{sum(parts):.0f} ({' + '.join(f'{part:.0f}' for part in parts)})", sum(parts))


def _timed(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[int, bool], float]:
    """The most tokens per second of distilling SmolLM2 compiled, by blocks of a batch, by CUDA graph or not."""
    found: dict[tuple[int, bool], float] = {}
    for line in lines:
        alone = not line.get("beside")
        wanted = line.get("part") == "distillation" and line.get("compiled") and line.get("model") == "smollm2-135m"
        if alone and wanted:
            name = int(line["B"]), bool(line.get("recorded"))
            found[name] = max(found.get(name, 0.0), float(line["tokens_per_s"]))
    return found


def _steady_rate(study: Study) -> Measured:
    """The most tokens per second of a training behind its first steps, which compile."""
    rates = []
    for row in study.rows:
        times = row["result"].get("times") if row["measure"] == "train" else None
        if times and not row["spec"].get("label_share"):
            (first, start), (last, end) = times[1], times[-1]
            steps = len(row["result"]["history"])
            rates.append((last - first) / (end - start) * row["result"]["tokens"] / steps)
    return Measured(f"{max(rates):,.0f}", max(rates)) if rates else Measured("")
