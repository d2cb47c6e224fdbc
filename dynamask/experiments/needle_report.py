"""The needle experiment in the report: heat maps, exact match by length, dynamic mask against dense attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dynamask.evaluation.retrieval import RetrievalScore
from dynamask.experiments.needle import NeedleConfig, mean_scores, needle_summary
from dynamask.experiments.results import Record
from dynamask.experiments.section import Exhibit, Finding, Row, Section, judged_forms

_UPCYCLED, _MIXED = "upcycled", "one layer in four dense"
"""In the names of models made of a dense one, and of those that keep some layers dense (`needle_name`)."""
_LEARNT = 0.1
"""Exact match below which neither of two models has learnt to retrieve, and nothing is to be compared."""


def report_needle(records: Sequence[Record], folder: Path) -> Section:
    """See `Experiment.report`."""
    from dynamask.reports.needle import draw_scores

    scores = mean_scores(records)
    keys = [record.key for record in records]
    contexts = sorted({NeedleConfig.of(record.config).context for record in records})
    losses: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for model, loss in record.result["loss"].items():
            losses[model].append(loss)
    training: list[Row] = [
        {"model": model, "runs": str(len(own)), "validation loss": f"{np.mean(own):.4f}"}
        for model, own in losses.items()
    ]
    trained = ", ".join(map(str, contexts))
    exhibits = [
        Exhibit(
            "depth-length",
            "Exact match by depth and length",
            keys,
            f"Per cent of the answers decoded in full; trained at {trained} tokens, examples at most half of it. At "
            "depth 1 the needle is next to the question, where any window has it: a third of the answers, where there "
            "are three depths.",
            needle_summary(records),
            draw_scores(scores, folder / "needle.svg", trained_on=contexts[0] if len(contexts) == 1 else None),
            "heat maps of exact match, depth against length, one row per task and one column per model",
        ),
        Exhibit("training", "Loss on the mixture", keys, table=training),
    ]
    ours = [model for model in losses if model.startswith("dma")]
    upcycled = [model for model in ours if _UPCYCLED in model]
    mixed = [model for model in ours if _MIXED in model]
    alone = [model for model in ours if model not in (*upcycled, *mixed)]
    forms = judged_forms(alone, mixed, upcycled, loss=lambda model: -_mean(scores, model))
    findings = [
        finding
        for model in forms
        for inside in (True, False)
        if (finding := _compare(model, scores, keys, max(contexts), inside)) is not None
    ]
    pairs = [(model, rival) for model in ours for rival in _without_choice(model, losses)]
    findings += [finding for pair in pairs if (finding := _gain(*pair, scores, keys)) is not None]
    return Section("", exhibits, findings)


def _mean(scores: Sequence[RetrievalScore], model: str) -> float:
    return float(np.mean([score.exact for score in scores if score.model == model]))


def _compare(
    model: str, scores: Sequence[RetrievalScore], keys: Sequence[str], context: int, inside: bool
) -> Finding | None:
    """The model against mha, over the cells that both were asked, up to the training length or beyond it.

    Better is what two standard errors of the difference do not explain.
    """
    found: dict[str, dict[tuple[str, int, float], RetrievalScore]] = defaultdict(dict)
    for score in scores:
        if (score.length <= context) == inside:
            found[score.model][score.task, score.length, score.depth] = score
    both = sorted(found[model].keys() & found["mha"].keys())
    where = f"to {context} tokens, trained for" if inside else f"beyond {context} tokens"
    subject = f"{model}, {where}"
    if not found[model]:
        return None
    if not both:
        return Finding("needle", subject, "mha was not tested", None, keys)
    ours, theirs = (float(np.mean([found[name][cell].exact for cell in both])) for name in (model, "mha"))
    noise = sum(_variance(found[name][cell]) for name in (model, "mha") for cell in both) ** 0.5 / len(both)
    measured = f"{ours:.1%} of the answers exact, mha {theirs:.1%}, over {len(both)} cells of task, length and depth"
    if abs(ours - theirs) < 2 * noise:
        measured += f": within the noise of ±{2 * noise:.1%}"
    if max(ours, theirs) < _LEARNT:
        return Finding("needle", subject, f"{measured}: neither learnt to retrieve", None, keys)
    return Finding("needle", subject, measured, ours > theirs and ours - theirs >= 2 * noise, keys)


def _without_choice(model: str, trained: Iterable[str]) -> list[str]:
    """What keeps as many keys as a model with ranks that learn, and chooses without: sliding windows of its own sizes,
    and, for one made of a dense model, the paper's ranks."""
    name, *parts = model.split(", ")
    windows = [part for part in parts if part.startswith("windows ")]
    rivals = [", ".join(["swa", *windows])]
    if _UPCYCLED in parts:
        rivals = [f"{name}, {_UPCYCLED}"]
    return [rival for rival in rivals if rival in trained and "ranked by" in model]


def _gain(model: str, rival: str, scores: Sequence[RetrievalScore], keys: Sequence[str]) -> Finding | None:
    """The model against one that chooses no keys, over all cells that both were asked."""
    found = {
        name: {(score.task, score.length, score.depth): score for score in scores if score.model == name}
        for name in (model, rival)
    }
    both = sorted(found[model].keys() & found[rival].keys())
    if not both:
        return None
    ours, theirs = (float(np.mean([found[name][cell].exact for cell in both])) for name in (model, rival))
    noise = 2 * sum(_variance(found[name][cell]) for name in (model, rival) for cell in both) ** 0.5 / len(both)
    measured = f"{ours:.1%} of the answers exact, {rival} {theirs:.1%}, noise ±{noise:.1%}, over {len(both)} cells"
    held = None if max(ours, theirs) < _LEARNT else ours - theirs >= noise
    return Finding("retrieval", model, measured, held, keys)


def _variance(score: RetrievalScore) -> float:
    """Of a cell's exact match, a share of its samples."""
    return score.exact * (1 - score.exact) / score.samples
