"""The needle experiment in the report: heat maps, exact match by length, dynamic mask against dense attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynamask.evaluation.retrieval import RetrievalScore
from dynamask_lab.studies.needle.study import NeedleConfig, mean_scores, needle_summary
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section, judged_forms

_UPCYCLED, _MIXED = "upcycled", "one layer in four dense"
"""In the names of models made of a dense one, and of those that keep some layers dense (`needle_name`)."""
_LEARNT = 0.1
"""Exact match below which neither of two models has learnt to retrieve, and nothing is to be compared."""


@reports("needle")
def report_needle(records: Sequence[Record], folder: Path) -> Section:
    """See `Experiment.report`."""
    from dynamask.inspect.retrieval import draw_scores

    scores = mean_scores(records)
    keys = [record.key for record in records]
    contexts = sorted({NeedleConfig.of(record.config).context for record in records})
    depths = {score.depth for score in scores}
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
            "depth 1 the needle is next to the question, where any window has it: verdicts leave it out, and of "
            f"{len(depths)} depths it is {1 / len(depths):.0%} of the answers.",
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
    pairs = [(model, rival) for model in ours if (rival := _without_choice(model)) in losses]
    findings += [finding for pair in pairs if (finding := _gain(*pair, scores, keys)) is not None]
    return Section("", exhibits, findings)


def _far(scores: Sequence[RetrievalScore]) -> list[RetrievalScore]:
    """Those with the needle elsewhere than next to the question, where no choice of keys is needed to find it."""
    return [score for score in scores if score.depth < 1]


def _mean(scores: Sequence[RetrievalScore], model: str) -> float:
    return float(np.mean([score.exact for score in scores if score.model == model]))


def _compare(
    model: str, scores: Sequence[RetrievalScore], keys: Sequence[str], context: int, inside: bool
) -> Finding | None:
    """The model against mha, over the cells that both were asked, up to the training length or beyond it.

    Better is what two standard errors of the difference do not explain.
    """
    asked = [score for score in _far(scores) if (score.length <= context) == inside]
    where = f"to {context} tokens, trained for" if inside else f"beyond {context} tokens"
    subject = f"{model}, {where}"
    if not any(score.model == model for score in asked):
        return None
    pair = _exact(model, "mha", asked)
    if pair is None:
        return Finding("needle", subject, "mha was not tested", None, keys)
    ours, theirs, noise, cells = pair
    measured = f"{ours:.1%} of the answers exact, mha {theirs:.1%}, over {cells} cells of task, length and depth"
    if abs(ours - theirs) < noise:
        measured += f": within the noise of ±{noise:.1%}"
    if max(ours, theirs) < _LEARNT:
        return Finding("needle", subject, f"{measured}: neither learnt to retrieve", None, keys)
    return Finding("needle", subject, measured, ours > theirs and ours - theirs >= noise, keys)


def _without_choice(model: str) -> str | None:
    """What keeps as many keys as a model with ranks that learn, and chooses without: sliding windows of its own sizes,
    or, for one made of a dense model, the paper's ranks."""
    name, *parts = model.split(", ")
    if "ranked by" not in model:
        return None
    if _UPCYCLED in parts:
        return f"{name}, {_UPCYCLED}"
    return ", ".join(["swa", *(part for part in parts if part.startswith(("windows ", "no RoPE")))])


def _gain(model: str, rival: str, scores: Sequence[RetrievalScore], keys: Sequence[str]) -> Finding | None:
    """The model against one that chooses no keys, over the cells that both were asked."""
    pair = _exact(model, rival, _far(scores))
    if pair is None:
        return None
    ours, theirs, noise, cells = pair
    measured = f"{ours:.1%} of the answers exact, {rival} {theirs:.1%}, noise ±{noise:.1%}, over {cells} cells"
    held = None if max(ours, theirs) < _LEARNT else ours - theirs >= noise
    return Finding("retrieval", model, measured, held, keys)


def _exact(model: str, rival: str, scores: Sequence[RetrievalScore]) -> tuple[float, float, float, int] | None:
    """Mean exact match of two models over the cells that both were asked, two standard errors of the difference, and
    how many cells; None where they share none."""
    ours, theirs = (
        {(score.task, score.length, score.depth): score for score in scores if score.model == name}
        for name in (model, rival)
    )
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    means = [float(np.mean([found[cell].exact for cell in both])) for found in (ours, theirs)]
    noise = 2 * sum(_variance(found[cell]) for found in (ours, theirs) for cell in both) ** 0.5 / len(both)
    return means[0], means[1], noise, len(both)


def _variance(score: RetrievalScore) -> float:
    """Of a cell's exact match, a share of its samples."""
    return score.exact * (1 - score.exact) / score.samples
