"""What `measure_masks_over_training` found, as a section of the report: lifetimes and the need for a choice by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamask_lab.report.masks import lifts, measured_on, span, with_error
from dynamask_lab.report.pictures import save_small
from dynamask_lab.sweeps.section import Exhibit, Row, Section


def masks_over_training_section(figures: dict[str, Any], folder: Path) -> tuple[Section, dict[str, Any], str]:
    """A line that `dynamask report masks RUN --over-training` wrote; see `reports.benchmarks`.

    Args:
        figures: the line.
        folder: where its picture goes.

    Returns:
        See `Benchmark.section`.
    """
    model, steps = figures["model"], figures["steps"]
    rows = {f"steps[{number}]": step for number, step in enumerate(steps)}
    picture = draw_lifetimes_over_training(figures, folder / "lifetimes.svg")
    text = (
        f"`{figures.get('name', 'a model')}`: {model['parameters'] / 1e6:.1f}M parameters, {model['layers']} layers, "
        f"window {model['window']}, local {model['local']}; {figures['texts']} texts of {figures['length']} tokens."
    )
    exhibits = [
        Exhibit(
            "lifetimes",
            "Lifetimes over training",
            list(rows),
            "Of the keys of a text's first half, in all heads: how many live so many queries. Under a sliding window "
            f"all live {model['window']}.",
            picture=picture,
            alt="share of keys by lifetime, stacked, against the training step",
        ),
        Exhibit(
            "choice",
            "Does the model come to need its choice?",
            list(rows),
            "`without the choice`: nats per token more with the newest keys in place of the chosen ones, ± one "
            "standard error. `beyond`: share of the visible pairs further apart than a sliding window reaches, of the "
            "median head and of the one with most. `survive`: the kind of token that lives for two windows most above "
            "its share.",
            [_row(step) for step in steps],
        ),
    ]
    return Section(text, exhibits), rows, measured_on(figures)


def _row(step: dict[str, Any]) -> Row:
    beyond = sorted(share for layer in step["kept_beyond_window"] for share in layer)
    names, rows, *_ = lifts(step)
    best = max(((lift, name) for lift, name in zip(rows[0], names, strict=True) if lift is not None), default=None)
    return {
        "step": str(step["step"]),
        "loss": f"{step['loss']['trained']:.4f}",
        "without the choice": with_error(step["loss"]["sliding"]),
        "beyond, median": f"{beyond[len(beyond) // 2]:.1%}",
        "beyond, most": f"{beyond[-1]:.1%}",
        "survive": "" if best is None else f"{best[1]} ({best[0]:.1f}x)",
    }


def draw_lifetimes_over_training(figures: dict[str, Any], picture: Path) -> Path:
    """Shares of keys by lifetime, stacked, against the step.

    Args:
        figures: what `measure_masks_over_training` returned.
        picture: file to write.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    edges = figures["steps"][0]["lifetimes"]["edges"]
    places = [step["step"] for step in figures["steps"]]
    shares = np.array([np.mean(np.asarray(step["lifetimes"]["share"]), axis=(0, 1)) for step in figures["steps"]])
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    below = np.zeros(len(places))
    for number, edge in enumerate(edges):
        label = span(edge, edges[number + 1] - 1) if number < len(edges) - 1 else f"{edge} or more"
        color = colormaps["viridis"](number / max(1, len(edges) - 1))
        axes.fill_between(places, below, below + shares[:, number], color=color, label=label, linewidth=0)
        below = below + shares[:, number]
    axes.set(xlabel="training step", ylabel="share of keys", ylim=(0, 1))
    axes.set_xlim(places[0], max(places[-1], places[0] + 1))
    axes.legend(title="queries that see a key", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return save_small(figure, picture)
