"""What `measure_masks` found, as pictures, tables and the finding about content."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dynamask.inspect.style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY
from dynamask_lab.report.pictures import save_small
from dynamask_lab.sweeps.provenance import short_commit
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section
from dynamask_lab.sweeps.verdicts import LOSS_INTEREST, Interval, judge

_MANY = 24  # rows up to which a heat map's cells carry their numbers
_CONTROLS = {
    "sliding": "newest keys instead of the chosen, scores kept in the logits",
    "no_bias": "chosen keys, no scores in the logits",
    "gates_off": "newest keys, no scores: gates set to zero",
}


def draw_masks(figures: dict[str, Any], folder: Path, suffix: str = ".png") -> dict[str, Path]:
    """All pictures of one model.

    Args:
        figures: what `measure_masks` returned.
        folder: where the pictures go.
        suffix: ".png", ".svg" or ".pdf".

    Returns:
        Name of the picture -> its file.
    """
    drawn: dict[str, Callable[[dict[str, Any], Path], Path]] = {
        "maps": draw_maps,
        "lifetimes": draw_lifetimes,
        "kinds": draw_kinds,
        "distance": draw_distance,
        "threshold": draw_threshold,
    }
    return {name: draw(figures, folder / f"{name}{suffix}") for name, draw in drawn.items()}


def _rows(figures: dict[str, Any], per: str = "key_value_heads") -> list[str]:
    return [f"{layer}·{head}" for layer in range(figures["model"]["layers"]) for head in range(figures["model"][per])]


def _flat(nested: Sequence[Sequence[Any]]) -> list[Any]:
    """(L, G) -> [L·G]."""
    return [item for layer in nested for item in layer]


def draw_maps(figures: dict[str, Any], picture: Path) -> Path:
    """The mask of the sample text in the heads that keep most beyond the window: queries down, keys across."""
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sample, window = figures["sample"], figures["model"]["window"]
    heads, length = sample["heads"], len(sample["pieces"])
    columns = min(4, len(heads))
    lines = math.ceil(len(heads) / columns)
    figure = Figure(figsize=(2.9 * columns, 3.0 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    colors = ["#FFFFFF", "#F3D9A4", SKY, BLUE]
    age = np.arange(length)[:, None] - np.arange(length)
    for number, axes in enumerate(panels.flat):
        if number >= len(heads):
            axes.axis("off")
            continue
        seen = (age >= 0) & (np.arange(length)[:, None] < np.array(sample["expiry"][number]))
        near = (age >= 0) & (age < window)
        shade = np.where(seen, np.where(near, 2, 3), np.where(near, 1, 0))
        axes.imshow(shade, cmap=ListedColormap(colors), vmin=0, vmax=3, interpolation="nearest", rasterized=True)
        layer, head = heads[number]
        share = figures["kept_beyond_window"][layer][head]
        axes.set_title(f"layer {layer}, head {head}: {share:.0%} beyond", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("key")
    for row in panels:
        row[0].set_ylabel("query")
    names = ("kept, as a sliding window would", "kept, beyond its reach", "dropped, within its reach")
    shades = zip((SKY, BLUE, colors[1]), names, strict=True)
    patches = [Patch(facecolor=color, edgecolor=GREY, label=label) for color, label in shades]
    figure.legend(handles=patches, loc="outside upper center", ncols=3, fontsize=9)
    return save_small(figure, picture)


def draw_lifetimes(figures: dict[str, Any], picture: Path) -> Path:
    """Shares of keys by lifetime, one row per head, on a logarithmic scale."""
    from matplotlib.figure import Figure

    edges, window = figures["lifetimes"]["edges"], figures["model"]["window"]
    shares, names = _flat(figures["lifetimes"]["share"]), _rows(figures)
    labels = [span(low, high - 1) for low, high in pairwise(edges)] + [f"{edges[-1]}+"]
    figure = Figure(figsize=(1.8 + 0.62 * len(edges), 1.6 + _height(len(names))), layout="constrained")
    axes = figure.add_subplot()
    most = max(max(row) for row in shares)
    image = axes.imshow([[100 * s for s in row] for row in shares], cmap="cividis", vmin=0, aspect="auto")
    _numbers(axes, shares, lambda share: f"{100 * share:.0f}", lambda share: "black" if share > most / 2 else "white")
    place = sum(edge <= window for edge in edges) - 1
    mark = f"a sliding window: every key {window}"
    axes.plot(place, -0.5, "v", color=RED, markersize=9, clip_on=False, label=mark, linestyle="none")
    axes.set_xticks(range(len(edges)), labels, rotation=45, fontsize=8)
    _name_rows(axes, names)
    axes.set(xlabel="lifetime: queries that see the key", ylabel="layer · key/value head")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    figure.colorbar(image, ax=axes, label="% of the head's keys", pad=0.01)
    return save_small(figure, picture)


def lifts(figures: dict[str, Any]) -> tuple[list[str], list[list[float | None]], list[int], list[int]]:
    """How over-represented each kind of token is among long-lived keys.

    Returns:
        Names of the kinds that occur; per row, all heads together first, then each: share among long-lived keys over
        share among all (None where no key lives long); counts among all keys of one head; counts among long-lived keys
        of all heads.
    """
    kinds = figures["kinds"]
    disjoint = len(kinds["names"]) - 2  # the last two overlap with the others
    every = sum(kinds["total"][:disjoint])
    shown = [index for index, total in enumerate(kinds["total"]) if total]
    per_head = _flat(kinds["long_lived"])
    together = [sum(head[index] for head in per_head) for index in range(len(kinds["names"]))]

    def lift(counts: Sequence[int], index: int) -> float | None:
        alive = sum(counts[:disjoint])
        return (counts[index] / alive) / (kinds["total"][index] / every) if alive else None

    rows = [[lift(counts, index) for index in shown] for counts in (together, *per_head)]
    names = [kinds["names"][index] for index in shown]
    return names, rows, [kinds["total"][index] for index in shown], [together[index] for index in shown]


def draw_kinds(figures: dict[str, Any], picture: Path) -> Path:
    """Over- and under-representation of kinds of token among long-lived keys."""
    from matplotlib.figure import Figure

    names, rows, totals, alive = lifts(figures)
    shown = [[math.nan if lift is None else math.log2(max(lift, 1 / 16)) for lift in row] for row in rows]
    figure = Figure(figsize=(2.2 + 0.95 * len(names), 2.6 + _height(len(rows))), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shown, cmap="PuOr_r", vmin=-3, vmax=3, aspect="auto")
    _numbers(axes, rows, lambda lift: f"{lift:.2f}", lambda lift: "white" if not 1 / 4.5 < lift < 4.5 else "black")
    counted = zip(names, totals, alive, strict=True)
    axes.set_xticks(
        range(len(names)),
        [f"{name}\n{kept:,} of {total * (len(rows) - 1):,}" for name, total, kept in counted],
        rotation=40,
        ha="right",
        fontsize=8,
    )
    _name_rows(axes, ["all heads", *_rows(figures)])
    axes.axhline(0.5, color=BLACK, linewidth=1.2)
    axes.set_ylabel("layer · key/value head")
    life = figures["kinds"]["lifetime"]
    axes.set_title(f"share among keys that live {life}+ queries, over share among all keys (1 = as common)", fontsize=9)
    ticks = [-3, -2, -1, 0, 1, 2, 3]
    bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=ticks)
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    return save_small(figure, picture)


def draw_distance(figures: dict[str, Any], picture: Path) -> Path:
    """Quantiles of the distance heads read at, against the same heads under a sliding window."""
    from matplotlib.figure import Figure

    distance, window = figures["distance"], figures["model"]["window"]
    own, sliding, beyond = (_flat(distance[name]) for name in ("own", "sliding", "beyond_window"))
    names = _rows(figures, "heads")
    figure = Figure(figsize=(8.5, 1.8 + _height(len(names))), layout="constrained")
    axes = figure.add_subplot()
    markers = ("o", "s", "^")
    for row, (ours, theirs) in enumerate(zip(own, sliding, strict=True)):
        axes.plot([q + 1 for q in ours], [row - 0.15] * len(ours), color=BLUE, linewidth=1)
        axes.plot([q + 1 for q in theirs], [row + 0.2] * len(theirs), color=ORANGE, linewidth=1)
        for number, marker in enumerate(markers):
            axes.plot(ours[number] + 1, row - 0.15, marker, color=BLUE, markersize=5)
            axes.plot(theirs[number] + 1, row + 0.2, marker, color=ORANGE, markersize=4, markerfacecolor="white")
        if len(names) <= _MANY:
            place = (1.01, row)
            axes.annotate(f"{beyond[row]:.1%}", place, xycoords=("axes fraction", "data"), fontsize=7, va="center")
    axes.axvline(window, color=GREY, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="distance between query and key + 1, weighted by attention", ylabel="layer · query head")
    axes.set_title(f"at the right: attention further back than the window of {window}", fontsize=9, loc="right")
    _name_rows(axes, names)
    axes.invert_yaxis()
    quantiles = [f"{q:.0%}" for q in distance["quantiles"]]
    handles = [axes.plot([], [], "-", color=BLUE, label="as trained")[0]]
    handles += [axes.plot([], [], "-", color=ORANGE, label="same weights, sliding window")[0]]
    handles += [axes.plot([], [], m, color=GREY, label=q)[0] for m, q in zip(markers, quantiles, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)
    return save_small(figure, picture)


def draw_threshold(figures: dict[str, Any], picture: Path) -> Path:
    """The score a key needs to be kept, as the text goes on; a panel per layer."""
    from matplotlib.figure import Figure

    threshold = figures["threshold"]
    layers = figures["model"]["layers"]
    columns = min(4, layers)
    lines = math.ceil(layers / columns)
    figure = Figure(figsize=(3.0 * columns + 1.2, 2.6 * lines + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True)
    colors = (BLUE, RED, GREEN, ORANGE, PINK, BLACK, SKY, GREY)
    handles: dict[str, Any] = {}
    for layer, axes in enumerate(panels.flat):
        if layer >= layers:
            axes.axis("off")
            continue
        for head, (least, mean) in enumerate(zip(threshold["threshold"][layer], threshold["mean"][layer], strict=True)):
            color = colors[head % len(colors)]
            points = [(x, y, m) for x, y, m in zip(threshold["positions"], least, mean, strict=True) if y is not None]
            if points:
                x, y, m = zip(*points, strict=True)
                (handles[f"head {head}: least score kept"],) = axes.plot(x, y, color=color, marker=".", markersize=4)
                (handles[f"head {head}: mean score"],) = axes.plot(x, m, color=color, linestyle=":")
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("position of the query")
    for row in panels:
        row[0].set_ylabel("score")
    shown = dict(list(handles.items())[:12])
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=4, fontsize=8)
    return save_small(figure, picture)


def masks_section(figures: dict[str, Any], folder: Path) -> tuple[Section, dict[str, Any], str]:
    """A line that `dynamask report masks` wrote, as a section of the report; see `reports.benchmarks`."""
    pictures = draw_masks(figures, folder, ".svg")
    model, loss = figures["model"], figures["loss"]
    losses: list[Row] = [{"mask": "as trained", "loss": f"{loss['trained']:.4f}", "difference": ""}]
    for name, words in _CONTROLS.items():
        found = loss[name]
        losses.append({"mask": words, "loss": f"{found['loss']:.4f}", "difference": with_error(found)})
    names, rows, totals, alive = lifts(figures)
    kinds: list[Row] = [
        {
            "kind of token": name,
            "keys": f"{total * (len(rows) - 1):,}",
            "long-lived": f"{kept:,}",
            "share of it": f"{kept / (total * (len(rows) - 1)):.2%}",
            "lift": "" if lift is None else f"{lift:.2f}",
        }
        for name, total, kept, lift in zip(names, totals, alive, rows[0], strict=True)
    ]
    gates = _flat(figures["gate"]["a"])
    beyond, read = _flat(figures["kept_beyond_window"]), _flat(figures["distance"]["beyond_window"])
    text = (
        f"`{figures.get('name', 'a model')}`: {model['parameters'] / 1e6:.1f}M parameters, {model['layers']} layers, "
        f"window {model['window']}, local {model['local']}, recency {model['recency']:g}, {model['score_form']} "
        f"scores; {figures['texts']} texts of {figures['length']} tokens. Gates A from {min(gates):+.3f} to "
        f"{max(gates):+.3f}."
    )
    reach = f"a sliding window of {model['window']}"
    exhibits = [
        Exhibit(
            "loss",
            "Does the choice matter to this model?",
            ["loss"],
            "Nats per token, the weights as trained throughout; ± one standard error over texts. The weights fit the "
            "mask they were trained with, so this is no comparison with a model trained otherwise.",
            losses,
        ),
        Exhibit(
            "maps",
            "Masks",
            ["sample", "kept_beyond_window"],
            f"The heads that keep most beyond the reach of {reach}. Over all heads, {min(beyond):.1%} to "
            f"{max(beyond):.1%} of the visible pairs lie beyond it.",
            picture=pictures["maps"],
        ),
        Exhibit(
            "lifetimes",
            "Lifetimes",
            ["lifetimes"],
            f"Of the keys of a text's first half. Under {reach} all keys live {model['window']} queries.",
            picture=pictures["lifetimes"],
        ),
        Exhibit(
            "kinds",
            "What survives",
            ["kinds"],
            f"Keys that live at least {figures['kinds']['lifetime']} queries. The last two kinds overlap with the "
            "others.",
            kinds,
            pictures["kinds"],
        ),
        Exhibit(
            "distance",
            "How far back heads read",
            ["distance"],
            f"{min(read):.1%} to {max(read):.1%} of a head's attention lies beyond the reach of {reach}.",
            picture=pictures["distance"],
        ),
        Exhibit(
            "threshold",
            "What a key must score",
            ["threshold"],
            "The least score among the contested keys that are kept: it only rises. Dotted, the mean of the prefix.",
            picture=pictures["threshold"],
        ),
    ]
    found = loss["sliding"]
    error = found["standard_error"]
    measured = (
        f"taking the choice away costs {with_error(found)} nats per token; up to {max(beyond):.0%} of a head's kept "
        f"pairs and {max(read):.0%} of its attention lie beyond a sliding window"
    )
    gain = found["difference"]
    interval = (
        Interval(gain, math.nan, math.nan) if error is None else Interval(gain, gain - 2 * error, gain + 2 * error)
    )
    verdict = judge(interval, LOSS_INTEREST, seeds=1)
    name = str(figures.get("name", "a model"))
    setting = {"seeds": "1", "size": name.split(",")[0]}
    role = "plain" if "paper's form" in name else "best"
    interest, difference = f"{LOSS_INTEREST} nats", f"{interval} nats"
    finding = Finding("content", name, measured, verdict, ["loss"], role, setting, interest, difference)
    rows_by_key = {key: value for key, value in figures.items() if isinstance(value, (dict, list))}
    return Section(text, exhibits, [finding]), rows_by_key, measured_on(figures)


def measured_on(figures: dict[str, Any]) -> str:
    """Device, versions and commit of a line that `dynamask report masks` wrote."""
    environment = dict(figures.get("environment", {}))
    if environment.get("commit"):
        environment["commit"] = short_commit(environment["commit"])
    return ", ".join(f"{name} {value}" for name, value in environment.items())


def with_error(found: dict[str, Any]) -> str:
    """A control's difference in loss, ± its standard error where there is one."""
    error = found["standard_error"]
    return f"{found['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def span(low: int, high: int) -> str:
    """Numbers from one to another, both included."""
    return str(low) if low == high else f"{low}–{high}"


def _height(rows: int) -> float:
    return max(1.5, (0.26 if rows <= _MANY else 0.09) * rows)


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    step = 1 if len(names) <= 4 * _MANY else 8
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=8 if len(names) <= _MANY else 5)


def _numbers(axes: Any, rows: Sequence[Sequence[Any]], text: Callable[[Any], str], ink: Callable[[Any], str]) -> None:
    """Write the figures into the cells of a heat map that is small enough."""
    if len(rows) > _MANY + 1:
        return
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if value is not None:
                axes.text(x, y, text(value), ha="center", va="center", fontsize=7, color=ink(value))
