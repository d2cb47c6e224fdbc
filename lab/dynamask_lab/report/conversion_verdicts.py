"""The goals of a conversion, one row each: what decides it, over how many seeds, at which cache, and what bounds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynamask_lab.report import conversion_figures as figures
from dynamask_lab.report.conversion_figures import BLOCK, Measured
from dynamask_lab.report.conversion_goals import GEMMA, SMOLLM2, TOKENS_PER_SECOND
from dynamask_lab.studies.conversion import close, final, settle
from dynamask_lab.studies.conversion import gemma as gemma_list
from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.conversion.jobs import LENGTHS
from dynamask_lab.studies.conversion.levers import DENSE, FROZEN, converted
from dynamask_lab.studies.conversion.report import GROUPS, Study
from dynamask_lab.sweeps.section import Row

BOUNDS = {
    "adapted": "the converted model's next tokens; train the dense model first, then convert",
    "tracking": "imitates the dense model, which copies the worked example's names; frozen it is ahead",
    "pairs": "the dense model, which answers hardly any",
    "multi-key 3": "the dense model, which answers hardly any",
    "gemma": "its three global heads choose keys before the queries are known; the best keys per query lose 0.005",
    "shared": "two runs or more shared the card",
    "narrow": "the budget: 256 keys per KV head",
}
"""What bounds a goal where it is missed."""


def verdict_rows(lines: Iterable[Mapping[str, Any]], timed: Iterable[Mapping[str, Any]] = ()) -> list[Row]:
    """Judge each goal once.

    Args:
        lines: of the study, all models.
        timed: lines of `decode_gpu.py`.

    Returns:
        One row per goal: what, its bar, the figure with its 95% interval, seeds, the cache and the share of the pairs
        of query and key, and whether it is met.
    """
    own: list[dict[str, Any]] = [dict(line) for line in lines]
    study, gemma = (Study(line for line in own if line["model"] == name) for name in (SMOLLM2, GEMMA))
    rows: list[Row] = []

    def add(
        what: str, bar: str, found: Measured, met: bool | None, specs: Sequence[Spec] = (), bound: str = ""
    ) -> None:
        word = "" if met is None else "met" if met else f"**missed**: {BOUNDS[bound]}" if bound else "**missed**"
        row = {"what": what, "goal": bar, "measured": found.text, "seeds": "", "cache": "", "pairs": "", "": word}
        if found.value is None:
            row |= {"measured": "not run", "": ""}
        if specs:
            row["seeds"] = str(len(specs)) if specs[0].trained or len(specs) > 1 else ""
            row["cache"] = f"1/{BLOCK // specs[0].budget}" if specs[0].budget else "all"
            share = figures.share_of_pairs(gemma if what.startswith("Gemma") else study, specs[0])
            row["pairs"] = f"{share:.0%}" if share is not None else ""
        rows.append(row)

    def below(what: str, found: Measured, bar: float, specs: Sequence[Spec], bound: str = "") -> None:
        add(what, f"<= {bar:+.3f}", found, found.value is not None and found.value <= bar, specs, bound)

    def at_least(what: str, found: Measured, bar: float, specs: Sequence[Spec], bound: str = "") -> None:
        met = found.value is not None and round(found.value, 3) >= bar
        add(what, f">= {bar:.2f}", found, met, specs, bound)

    def measured(specs: Sequence[Spec]) -> list[Spec]:
        return [spec for spec in specs if study.losses(spec.name, "text")] or [*specs][:1]

    def answered(specs: Sequence[Spec]) -> list[Spec]:
        return [spec for spec in specs if figures.scores(study, spec)] or [*specs][:1]

    frozen = measured([FROZEN, *(converted(steps=0, seed=seed) for seed in (1, 2))])
    below("text loss above dense, frozen", figures.text_loss(study, frozen, DENSE), 0.040, frozen)
    default = measured([*settle.DEFAULT.values()])
    below("text loss above dense, distilled", figures.text_loss(study, default, DENSE), 0.005, default)
    name = "text loss above dense trained on the same tokens, converted from it"
    for title, form, base in (
        (f"{name} (its best rate)", settle.FROM_BEST, settle.BEST_ADAPTED),
        (f"{name} (in the same loop)", close.FROM_ADAPTED, close.ADAPTED),
    ):
        below(title, figures.text_loss(study, [form], base), 0.010, [form])
    name = "text loss above dense trained on the same tokens, next tokens as the loss"
    found = figures.text_loss(study, [settle.LABELLED], close.ADAPTED)
    below(name, found, 0.010, [settle.LABELLED], "adapted")
    name += ", both at 2e-4, dense's rate falling to zero"
    below(name, figures.text_loss(study, [final.LABELLED], final.ADAPTED), 0.010, [final.LABELLED], "adapted")

    for title, bar, specs, bound in (
        ("1/16", 0.98, [*settle.DEFAULT.values()], ""),
        ("1/8", 1.0, [settle.WIDE], ""),
        ("1/8, embeddings learning, last weights, 2e-4", 1.0, [final.WIDE], ""),
        ("1/32", 0.85, [*settle.NARROWS], "narrow"),
    ):
        forms = answered(specs)
        at_least(
            f"needles at 1K to 4K, share of dense, {title}", figures.needles(study, forms, DENSE), bar, forms, bound
        )
    for group, tasks in GROUPS.items():
        peer, found = figures.ahead(study, settle.DEFAULT[0], tasks)
        part = _part(study, tasks)
        met: bool | None = found.value is not None and found.value > 0
        if part and (found.high or 0) >= 0:
            met = None
        what = f"{group}: score above the best peer's ({peer or 'none'}), distilled{part}"
        add(what, "interval above 0", found, met, [settle.DEFAULT[0]], _bound(group))
        if met:
            continue
        others = (
            ("embeddings learning, last weights, seed 1", close.SEEDS[0]),
            ("frozen", FROZEN),
            ("dense trained, then converted", _adapted(study, tasks)),
        )
        for title, spec in others:
            peer, found = figures.ahead(study, spec, tasks)
            if found.value is not None:
                name = f"{group}: the same ({peer}), {title}"
                add(name, "interval above 0", found, found.value > 0, [spec], _bound(group))
    peer, found = figures.ahead(study, settle.DEFAULT[0], GROUPS["pairs"], ["streaming_llm"])
    count = len(study.scores(settle.DEFAULT[0].name, GROUPS["pairs"]))
    if found.value is not None:
        what = f"pairs: above {peer} alone, {count} examples, distilled"
        add(what, "interval above 0", found, found.value > 0, [settle.DEFAULT[0]], "pairs")

    what = "learned ranks above newest keys in windows of their own"
    pair = [settle.DEFAULT[0]]
    add(f"{what}: text loss", "shown", figures.text_loss(study, pair, settle.NEWEST), None, pair)
    add(f"{what}: needles, ratio", "shown", figures.needles(study, pair, settle.NEWEST), None, pair)
    judged = [spec for spec in default if study.of(spec.name, "benchmark")]
    add("benchmarks above dense", "within noise", *figures.benchmarks(study, judged), judged)

    took = "seconds from dense to converted"
    seeds = [seed for seed in settle.LAST if figures.seconds(study, [seed]).value is not None]
    found = figures.seconds(study, seeds)
    forms = [converted(steps=0, seed=seed) for seed in seeds] or [FROZEN]
    add(f"{took}, frozen", "<= 60", found, (found.value or 0) <= 60, forms, "shared")
    seeds = [seed for seed in seeds if figures.seconds(study, [seed], settle.LAST).value is not None]
    found = figures.seconds(study, seeds, settle.LAST)
    forms = [settle.LAST[seed] for seed in seeds] or [settle.LAST[0]]
    add(f"{took}, distilled", "<= 300", found, (found.value or 0) <= 300, forms, "shared")
    rates = [rate for (_, recorded), rate in figures.timed(timed).items() if recorded]
    found = Measured(f"{max(rates):,.0f}", max(rates)) if rates else figures.NOTHING
    met = (found.value or 0) >= TOKENS_PER_SECOND
    add("distillation, tokens/s on one GPU", f">= {TOKENS_PER_SECOND:,}", found, met)
    kept, whole = figures.speed(study, FROZEN, 16), figures.speed(study, DENSE, 16)
    if kept and whole:
        text = f"{kept[0] / 2**20:.1f} of {whole[0] / 2**20:.1f}"
        add("cache of a sequence at 8K, MiB", "shown", Measured(text, kept[0]), None, [FROZEN])
    for batch in (1, 16):
        decoded = figures.speed(study, FROZEN, batch)
        if decoded:
            name = f"decoded tokens/s at 8K, windows with slopes, batch {batch}"
            add(name, "shown", Measured(f"{decoded[1]:,.0f}", decoded[1]), None, [FROZEN])

    distilled = gemma_list.averaged(gemma_list.SCALED[0])
    if not gemma.losses(distilled.name, "text"):
        distilled = gemma_list.averaged(gemma_list.GENTLE[0])
    narrow, *wide = gemma_list.OPENING
    for title, spec in (("frozen", narrow), ("distilled", distilled), *(("frozen", spec) for spec in wide)):
        bar = 0.005 if spec.distilled else 0.040
        below(
            f"Gemma 3 270M, ranks on planted facts: text loss above dense, {title}",
            figures.text_loss(gemma, [spec], DENSE),
            bar,
            [spec],
            "gemma",
        )
        found = figures.needles(gemma, [spec], DENSE)
        at_least(
            f"Gemma 3 270M, ranks on planted facts: needles, share of dense, {title}", found, 0.98, [spec], "gemma"
        )
    return rows


def _part(study: Study, tasks: Sequence[str]) -> str:
    """Which share of the first examples the default answered, where not all of them."""
    found = [key for key in study.scores(settle.DEFAULT[0].name, tasks) if key[3] < figures.FIRST]
    wanted = len(tasks) * len(LENGTHS) * figures.FIRST
    return "" if not found or len(found) >= wanted else f", {len(found)} of {wanted} examples, the shorter ones"


def _bound(group: str) -> str:
    return group if group in BOUNDS else ""


def _adapted(study: Study, tasks: Sequence[str]) -> Spec:
    """The conversion of a trained dense model that answered the tasks at every length, the best dense model's first."""
    found = (spec for spec in (settle.FROM_BEST, close.FROM_ADAPTED) if study.scores(spec.name, tasks, length=8192))
    return next(found, settle.FROM_BEST)
