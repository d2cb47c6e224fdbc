"""Exhibit 4: exact match against the distance from needle to question."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.evaluation.retrieval import RetrievalScore
from dynamask.inspect.style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY
from dynamask_lab.report.exhibits.common import Drawn, Sweeps, panels_of, rows_of, widest_layer
from dynamask_lab.report.pictures import save_small
from dynamask_lab.studies import Record
from dynamask_lab.studies.judged import NEEDLE, NEEDLE_FAR, pairs_of
from dynamask_lab.studies.needle.report import distance
from dynamask_lab.studies.needle.study import NeedleConfig, mean_scores, needle_name
from dynamask_lab.sweeps.section import Exhibit

_SLOPES, _RECALL, _NEWEST = (NEEDLE_FAR[place].name for place in (0, 2, 4))
_SEEDED = {
    "mha": ("dense", BLACK),
    _RECALL: ("recall", BLUE),
    _SLOPES: ("recall with slopes", GREEN),
    _NEWEST: ("newest keys in the same windows", ORANGE),
}
"""Forms with several training seeds, and how they are drawn."""
_LEVERS = {
    "mha": ("dense", BLACK),
    _RECALL: ("recall", BLUE),
    f"{_RECALL}, drope": ("recall, drope", PINK),
    "mha, ssmax": ("dense, ssmax", GREEN),
    "mha, drope": ("dense, drope", RED),
}
"""Forms without and with a lever for length, all on the same mixtures: those of dense attention, and `recall` with
"drope"; and how they are drawn."""
_LONGER = "mha, longer examples"
"""Dense attention's other lever: it cannot read the mixtures of the others, which hold no longer examples."""


def match_against_distance(results: Path, sweeps: Sweeps, folder: Path) -> Drawn | None:
    """Exact match against the distance from needle to question, with the window's edges."""
    first = sweeps.get("needle-far", ())
    sweeps = {**sweeps, "needle-levers": _apart(sweeps.get("needle-levers", ()), first)}
    second = sweeps["needle-levers"]
    runs, seeded, levers = sweeps.get("needle-long", ()), _common(first, _SEEDED), _common(second, _LEVERS)
    if not runs or not seeded:
        return None
    context = NeedleConfig.of(runs[0].config).context
    plain, best, control = (form.name for form in (NEEDLE[0], NEEDLE[1], NEEDLE[3]))
    shown = {
        "mha": ("dense", BLACK),
        best: ("ranks from attention, two layers wide", BLUE),
        "dma, from dense, ranked by attention^4": ("ranks from attention, even windows", GREEN),
        "dma, upcycled, ranked by attention^4": ("ranks from attention, upcycled", PINK),
        control: ("newest keys, two layers wide", RED),
        plain: ("paper", SKY),
    }
    figure, (left, right, *third) = panels_of(19 if levers else 13, 4, 3 if levers else 2)
    scores = mean_scores(runs)
    _draw(left, scores, shown, context, {512: "even window", 1280: "widest layer"})
    left.set_title(f"{_sizes(runs)} parameters, trained at {context:,} tokens, one seed", fontsize=9)
    nearer = NeedleConfig.of(seeded[0].config).context
    narrow, wide = (bound(_window_sizes(seeded)) for bound in (min, max))
    far = mean_scores(seeded)
    edges = {narrow: "narrow layers", wide: "widest layer"}
    longest = [run for run in second if needle_name(run.config) == _LONGER]
    with_lever = mean_scores([*levers, *longest])
    panels = [(right, far, seeded, _SEEDED, f"{_sizes(seeded)} parameters, trained at {nearer:,} tokens")]
    drawn = _LEVERS | ({_LONGER: ("dense, longer examples (other mixtures)", GREY)} if longest else {})
    panels += [(axes, with_lever, levers, drawn, "With levers for length, on other mixtures") for axes in third]
    for axes, found_in, own, forms, what in panels:
        _draw(axes, found_in, forms, nearer, edges)
        count = len({run.seed for run in own})
        axes.set_title(f"{what}, {count} seeds, 12% of the pairs", fontsize=9)

    found = {name: _beyond(far, name, wide, nearer) for name in _SEEDED}
    longer = {name: _beyond(scores, name, 1280, context) for name in ("mha", best, control)}
    dense, chosen, newest = (
        [(longer[one], runs, one, scores), (found[other], seeded, other, far)]
        for one, other in (("mha", "mha"), (best, _RECALL), (control, _NEWEST))
    )
    text = (
        "Beyond the widest layer's window and within the trained length, chosen keys find "
        f"{_compared(chosen, newest)} needles than the newest keys in the same windows, and {_compared(chosen, dense)} "
        f"than dense attention. {_of_longer_texts(with_lever, nearer) if levers else _NONE_LONGER}"
    )
    table = [
        _row(f"{length:,}", label, each[place], length)
        for place, length in ((1, nearer), (0, context))
        for label, each in (
            ("dense", dense),
            (("ranks from attention", "recall")[place], chosen),
            (("newest keys", "sliding")[place], newest),
        )
    ]
    table[len(table) // 2 : len(table) // 2] = [
        _row(
            f"{nearer:,}, levers",
            label,
            (_beyond(with_lever, name, wide, nearer), [*levers, *longest], name, with_lever),
            nearer,
        )
        for name, (label, _) in (drawn.items() if levers else ())
    ]
    caption = (
        "Found: exact match with the needle beyond the widest layer's window and within the trained length. Pairs: "
        "share of dense attention's at that length; widest layer: the share of its pairs. In longer texts: exact match "
        "beyond the trained length. Levers: these forms read other builds of the mixtures than the first ones; longer "
        "examples, of up to 1,024 tokens in sequences of 2,048, are of their own."
    )
    picture = save_small(figure, folder / "match-distance.svg")
    alt = "exact match against distance from needle to question, one line per form, window edges drawn"
    keys = list(dict.fromkeys(run.key for run in (*runs, *seeded, *levers, *longest)))
    exhibit = Exhibit("match-distance", "Exact match against distance", keys, text, table, picture, alt, caption)
    command = "dynamask experiment needle --size long; dynamask experiment needle --size far"
    return exhibit, rows_of(sweeps, "needle-long", "needle-far", "needle-levers"), command


_Found = tuple[float, Sequence[Record], str, Sequence[RetrievalScore]]
"""The share of needles that a form finds, the runs of the figure, the form's name in them, and their mean scores."""


def _sizes(runs: Sequence[Record]) -> str:
    """Parameters of the models, least and most: "11.3M to 11.5M"."""
    sizes = sorted(run.result["parameters"] / 1e6 for run in runs)
    return " to ".join(dict.fromkeys(f"{size:.1f}M" for size in (sizes[0], sizes[-1])))


def _row(length: str, label: str, form: _Found, context: int) -> dict[str, str]:
    found, runs, name, scores = form
    own = [run for run in runs if needle_name(run.config) == name]
    row = {"trained at, tokens": length, "form": label, "found": f"{found:.0%}", "parameters": _sizes(own)}
    seeds = str(len({run.seed for run in own}))
    row |= {"pairs": pairs_of(own), "widest layer": widest_layer(own), "seeds": seeds}
    return row | {"in longer texts": f"{_found_longer(scores, name, context):.0%}"}


def _compared(ours: Sequence[_Found], theirs: Sequence[_Found]) -> str:
    """Say whether our shares are above theirs in all cases, in none, or in some."""
    above = [own[0] > other[0] for own, other in zip(ours, theirs, strict=True)]
    return "more" if all(above) else "partly more" if any(above) else "fewer"


_NONE_LONGER = "Hardly any form finds needles in texts longer than those of its training."
_FINDS = 0.5
"""Exact match from which a form is said to find needles in longer texts."""


def _of_longer_texts(scores: Sequence[RetrievalScore], context: int) -> str:
    """Say which forms find at least half of the needles beyond the trained length, and how many the best other does."""
    labels = {name: label for name, (label, _) in _LEVERS.items()} | {_LONGER: "dense, longer examples"}
    found = {label: _found_longer(scores, name, context) for name, label in labels.items()}
    best = [label for label, share in found.items() if share >= _FINDS]
    if not best:
        return _NONE_LONGER
    rest = max((share for share in found.values() if share < _FINDS), default=0.0)
    return (
        "In texts longer than those of its training, of one noise text repeated, "
        f"{' and '.join(f'`{label}`' for label in best)} {'finds' if len(best) == 1 else 'find'} more than half of the "
        f"needles, and no other form more than {math.ceil(100 * rest)}%."
    )


def _found_longer(scores: Sequence[RetrievalScore], name: str, context: int) -> float:
    own = [score.exact for score in scores if score.model == name and score.depth < 1 and score.length > context]
    return float(np.mean(own)) if own else 0.0


def _apart(runs: Sequence[Record], earlier: Sequence[Record]) -> list[Record]:
    """The runs, with keys of their own where an earlier run of the same settings read another mixture."""
    taken = {run.key for run in earlier}
    return [replace(run, key=f"{run.key}-{run.corpus[1][:8]}") if run.key in taken else run for run in runs]


def _common(runs: Sequence[Record], forms: Mapping[str, Any]) -> list[Record]:
    """The runs of the forms on the mixtures that all of these forms read."""
    read: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for run in runs:
        read[needle_name(run.config)].add((run.seed, run.corpus[1]))
    common = set.intersection(*(read[name] for name in forms))
    return [run for run in runs if needle_name(run.config) in forms and (run.seed, run.corpus[1]) in common]


def _window_sizes(runs: Sequence[Record]) -> list[int]:
    return [window for run in runs for window in run.config.get("layer_windows") or ()]


def _beyond(scores: Sequence[RetrievalScore], name: str, edge: int, context: int) -> float:
    """Mean exact match of a form in texts up to the trained length, with the needle beyond an edge."""
    own = [score for score in scores if score.model == name and score.depth < 1 and score.length <= context]
    return float(np.mean([score.exact for score in own if distance(score) > edge]))


def _draw(
    axes: Any,
    scores: Sequence[RetrievalScore],
    shown: Mapping[str, tuple[str, str]],
    context: int,
    edges: Mapping[int, str],
) -> None:
    """One line per form for texts up to the trained length, and a thin one for longer texts; the edges as verticals."""
    for name, (label, colour) in shown.items():
        for trained in (True, False):
            cells: dict[float, list[float]] = defaultdict(list)
            for score in scores:
                if score.depth < 1 and score.model == name and (score.length <= context) == trained:
                    cells[distance(score)].append(score.exact)
            points = sorted((place, 100 * float(np.mean(found))) for place, found in cells.items())
            if points:
                style: dict[str, Any] = {"label": label} if trained else {"alpha": 0.6, "linestyle": "--"}
                axes.plot(*zip(*points, strict=True), marker="o", color=colour, markersize=3 + trained, **style)
    for edge, label in {**edges, context // 2: "longest example", context: "trained length"}.items():
        axes.axvline(edge, color=GREY, linestyle=":")
        _name_edge(axes, edge, label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens from the needle to the question (dashed: longer texts)", ylabel="exact match, %")
    axes.set_ylim(-3, 103)
    axes.legend(fontsize=7.5)


def _name_edge(axes: Any, edge: int, label: str) -> None:
    """Write what a vertical line stands for beside it, legible over the curves."""
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5}
    place = {"rotation": 90, "va": "bottom", "ha": "right", "bbox": behind, "zorder": 1}
    axes.annotate(f"{label} {edge}", (edge, 4), textcoords="offset points", xytext=(-2, 0), fontsize=7, **place)
