"""Retrieval by length and depth as heat maps, models side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from dynamask.errors import InvalidInputError
from dynamask.evaluation.retrieval import RetrievalScore, read_scores
from dynamask.inspect.style import save_figure

_NAME = 30
"""Letters of a model's name that fit above its panel in one line."""

METRICS = {"exact": "exact match", "recall": "share of the values found"}


def score_grid(
    scores: Sequence[RetrievalScore], lengths: Sequence[int], depths: Sequence[float], metric: str
) -> list[list[float]]:
    """Arrange the metric of one model and task by (depths, lengths); NaN where it was not measured.

    Raises:
        InvalidInputError: two scores of one length and depth.
    """
    found: dict[tuple[int, float], float] = {}
    for score in scores:
        if (score.length, score.depth) in found:
            raise InvalidInputError(
                f"{score.model} has two scores for {score.task} at length {score.length}, depth {score.depth}: give "
                "runs that are to be compared different names"
            )
        found[score.length, score.depth] = getattr(score, metric)
    return [[found.get((length, depth), math.nan) for length in lengths] for depth in depths]


def draw_needle(files: Sequence[str | Path], picture: str | Path, *, metric: str = "exact") -> Path:
    """Draw one row per task and one column per model: depth against length, shaded by the metric.

    Args:
        files: JSON lines that `write_scores` wrote; the models in them are drawn side by side, in order.
        picture: file to write, by its suffix .png, .svg or .pdf.
        metric: "exact" or "recall".

    Raises:
        UsageError: a file that cannot be read or holds no scores.
        InvalidInputError: an unknown metric, or two scores for one cell.
    """
    return draw_scores([score for file in files for score in read_scores(file)], picture, metric=metric)


def draw_scores(
    scores: Sequence[RetrievalScore], picture: str | Path, *, metric: str = "exact", trained_on: int | None = None
) -> Path:
    """Draw scores in memory; see `draw_needle`.

    Args:
        scores: of any models and tasks.
        picture, metric: see `draw_needle`.
        trained_on: tokens of the training sequences; a line marks where lengths exceed it.

    Raises:
        InvalidInputError: an unknown metric, or two scores for one cell.
    """
    from matplotlib.figure import Figure

    if metric not in METRICS:
        raise InvalidInputError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    models = list(dict.fromkeys(score.model for score in scores))
    tasks = list(dict.fromkeys(score.task for score in scores))
    # One pair of axes for all panels: models are comparable at a glance, and what one was not measured on stays blank.
    lengths = sorted({score.length for score in scores})
    depths = sorted({score.depth for score in scores})

    width = 1.6 + max(2.4, 0.62 * len(lengths)) * len(models)
    figure = Figure(figsize=(width, 0.9 + (0.9 + 0.34 * len(depths)) * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(models), squeeze=False, sharex=True, sharey=True)
    for row, task in zip(panels, tasks, strict=True):
        for axes, model in zip(row, models, strict=True):
            own = [score for score in scores if (score.model, score.task) == (model, task)]
            grid = score_grid(own, lengths, depths, metric)
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    if not math.isnan(value):
                        ink = "black" if value > 0.6 else "white"
                        axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=ink)
            if trained_on is not None and lengths[0] <= trained_on < lengths[-1]:
                inside = sum(length <= trained_on for length in lengths)
                axes.axvline(inside - 0.5, color="white", linewidth=3)
                axes.axvline(inside - 0.5, color="black", linestyle="--", linewidth=1.2)
            axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=45, fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths], fontsize=7)
    for axes in panels[-1]:
        beyond = "" if trained_on is None else f" (line: trained at {trained_on})"
        axes.set_xlabel(f"length in tokens{beyond}", fontsize=8)
    for row, task in zip(panels, tasks, strict=True):
        row[0].set_ylabel(f"{task}\ndepth", fontsize=8)
    for axes, model in zip(panels[0], models, strict=True):
        axes.set_title(textwrap.fill(model, _NAME), fontsize=8)
    figure.colorbar(image, ax=panels, label=METRICS[metric], pad=0.01)
    return save_figure(figure, picture)
