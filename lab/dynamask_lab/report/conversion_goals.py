"""The goals of the conversion study, each with what was measured and whether it is met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dynamask_lab.report import conversion_figures as figures
from dynamask_lab.report.conversion_figures import Measured
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
from dynamask_lab.studies.conversion.gemma import JUDGED as GEMMA_JUDGED
from dynamask_lab.studies.conversion.levers import DENSE, FROZEN, converted
from dynamask_lab.studies.conversion.report import GROUPS, Study, difference
from dynamask_lab.sweeps.section import Row

SMOLLM2, GEMMA = "smollm2-135m-instruct", "gemma3-270m"
TOKENS_PER_SECOND = 120_000


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
    below(text, "frozen", figures.text_loss(study, [FROZEN], DENSE), 0.040, _FROZEN)
    seeds = [converted(steps=0, seed=seed) for seed in (1, 2)]
    below(text, "frozen, mean of three seeds", figures.text_loss(study, [FROZEN, *seeds], DENSE), 0.040, _FROZEN)
    for seed, spec in settle.DEFAULT.items():
        below(text, f"distilled, seed {seed}", figures.text_loss(study, [spec], DENSE), 0.005, _STEPS)
    measured = [spec for spec in settle.DEFAULT.values() if study.losses(spec.name, "text")]
    below(
        text,
        f"distilled, mean of the seeds ({len(measured)})",
        figures.text_loss(study, measured, DENSE),
        0.005,
        _STEPS,
    )
    for name, spec in tried["loss"]:
        below(text, name, figures.text_loss(study, [spec], DENSE), 0.005, _STEPS)
    against = "text loss above dense trained on the same tokens"
    below(against, "next tokens alone", figures.text_loss(study, [settle.LABELLED], close.ADAPTED), 0.010, _ADAPTATION)
    below(
        against,
        "next tokens alone, 2e-4; dense at 2e-4",
        figures.text_loss(study, [LABELLED], ADAPTED),
        0.010,
        _OTHER_LOOP,
    )
    name = "next tokens alone, 2e-4; dense in the same loop at 4e-4"
    add(against, name, "shown", figures.text_loss(study, [LABELLED], close.ADAPTED), None)
    again = "dense trained, then converted"
    below(against, f"{again}; both at 4e-4", figures.text_loss(study, [close.FROM_ADAPTED], close.ADAPTED), 0.010)

    name = f"{again} at 4e-4; dense trained at 2e-4, its rate falling to zero"
    best = figures.text_loss(study, [settle.FROM_BEST], settle.BEST_ADAPTED)
    below(against, name, best, 0.010)

    share_of = "needle tasks at 1K to 4K, share of dense"
    add(share_of, "frozen", "shown", figures.needles(study, [FROZEN], DENSE), None)
    for seed, spec in settle.DEFAULT.items():
        at_least(share_of, f"distilled, seed {seed}", figures.needles(study, [spec], DENSE), 0.98, _TRIES)
    for name, spec in tried["tasks"]:
        at_least(share_of, name, figures.needles(study, [spec], DENSE), 0.98)
    for share_kept, bar, spec, earlier in (("1/8", 1.0, settle.WIDE, WIDE), ("1/32", 0.85, settle.NARROW, NARROW)):
        at_least(share_of, f"{share_kept}, distilled", figures.needles(study, [spec], DENSE), bar, _STEPS)
        name = f"{share_kept}, {_HALF_RATE}"
        at_least(share_of, name, figures.needles(study, [earlier], DENSE), bar, _STEPS)
    found = figures.needles(study, [close.FROM_ADAPTED], close.ADAPTED)
    at_least("the same, share of dense trained on the same tokens", again, found, 0.98)

    for group, tasks in GROUPS.items():
        distilled = (("distilled", settle.DEFAULT[0]), _LOST)
        longest = 4096 if group == "needles" else 8192
        ready = (each for each in distilled if study.scores(each[1].name, tasks, length=longest))
        mixed = [each for each in _TRIED if each[1] in settle.MIXED and study.scores(each[1].name, tasks)]
        mixed = mixed if group == "tracking" else []
        for name, spec in (next(ready, distilled[0]), ("frozen", FROZEN), *mixed):
            peer, found = figures.ahead(study, spec, tasks)
            met = found.value is not None and found.value > 0
            what = f"{group}: score above the best peer's"
            own_lead = difference(study.scores(DENSE.name, tasks), study.scores(f"{peer}-{spec.budget}", tasks), 2)
            bound = f"{_PEER[group]}; the dense model is ahead by {own_lead}" if group in _PEER else ""
            add(what, f"{name}; {peer}", "interval above 0", found, met, bound)

    what = "learned ranks above newest keys in windows of their own"
    for name, spec, other in _CHOICES:
        add(f"{what}: text loss", name, "shown", figures.text_loss(study, [spec], other), None)
        add(f"{what}: needle tasks, ratio", name, "shown", figures.needles(study, [spec], other), None)

    what = "benchmarks: converted - dense"
    for seed, spec in settle.DEFAULT.items():
        add(what, f"distilled, seed {seed}", "within noise", *figures.benchmarks(study, [spec]))
    measured = [spec for spec in settle.DEFAULT.values() if study.of(spec.name, "benchmark")]
    name = f"distilled, mean of the seeds ({len(measured)})"
    add(what, name, "within noise", *figures.benchmarks(study, measured))
    for name, spec in (*tried["benchmark"], _LOST):
        add(what, name, "within noise", *figures.benchmarks(study, [spec]), _BENCHMARKS)

    took = "seconds from dense to converted"
    seconds = figures.seconds(study, (0, 1, 2))
    add(took, "frozen, other jobs on the GPU", "<= 60", seconds, (seconds.value or 0) <= 60, _SHARED)
    seconds = figures.seconds(study, [*settle.LAST], settle.LAST)
    add(took, "distilled, beside other trainings", "<= 300", seconds, (seconds.value or 0) <= 300, _SHARED)
    for seed in settle.LAST:
        seconds = figures.seconds(study, [seed], settle.LAST)
        add(took, f"distilled, beside other trainings, seed {seed}", "shown", seconds, None)
    goal = f">= {TOKENS_PER_SECOND:,}"
    for (blocks, recorded), rate in sorted(figures.timed(timed).items()):
        name = f"alone on the GPU, batches of {blocks} blocks" + ("" if recorded else ", recorded=False")
        found, met = Measured(f"{rate:,.0f}", rate), rate >= TOKENS_PER_SECOND
        add("distillation, tokens/s", name, goal if recorded else "shown", found, met if recorded else None)
    steady = figures.steady_rate(study, turns=False)
    add("distillation, tokens/s", "each of two trainings at once on a GPU", "shown", steady, None)
    steady = figures.steady_rate(study, turns=True)
    add("distillation, tokens/s", "alone but for evaluations, the steps behind the first", "shown", steady, None)

    gemma = Study(line for line in own if line["model"] == GEMMA)
    for name, spec in GEMMA_JUDGED:
        if gemma.losses(spec.name, "text"):
            bar = 0.005 if spec.distilled else 0.040
            below(f"Gemma 3 270M: {text}", name, figures.text_loss(gemma, [spec], DENSE), bar, _GEMMA)
    for name, spec in GEMMA_JUDGED:
        if figures.scores(gemma, spec):
            at_least(f"Gemma 3 270M: {share_of}", name, figures.needles(gemma, [spec], DENSE), 0.98, _GEMMA)
    return rows


_HALF_RATE = "embeddings learning, last weights, 2e-4"
_TRIED = (
    (_HALF_RATE, DISTILLED),
    ("embeddings learning, last weights", QUICKER),
    ("embeddings learning, last weights, 800 steps", LONGER),
    ("embeddings fixed, last weights, seed 1", settle.LAST[1]),
    ("a quarter of the loss at the beginning, last weights, seed 1", settle.BEGINNING),
    *((f"distilled, {1 - spec.mixed:.0%} dense weights", spec) for spec in settle.MIXED),
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
_SHARED = "two runs or more shared the card"
