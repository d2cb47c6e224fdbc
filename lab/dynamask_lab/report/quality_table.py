"""The table of models trained from scratch, by recipe: test losses against dense attention, and needles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynamask_lab.report.page_tables import named_commits, table_with_note
from dynamask_lab.studies.judged import layer_windows, share_of_pairs
from dynamask_lab.sweeps.results import Record, read_results
from dynamask_lab.sweeps.section import Row
from dynamask_lab.sweeps.verdicts import FEW_SEEDS_INTEREST, mean_interval


@dataclass(frozen=True)
class Measured:
    """A row of the table, and the runs that it shows.

    Attributes:
        recipe: names in `dynamask.recipes`; "" for a form that is none.
        attention: what the row shows, in words.
        forms: names of its runs in the study `scratch`.
        needle: name of its runs in the study `needle`; "": not run there.
    """

    recipe: str
    attention: str
    forms: tuple[str, ...]
    needle: str = ""


_WIDE = "one wide layer, w = N/16"
_BASE = (f"sliding + sinks, half rate, {_WIDE}", f"sliding + sinks, {_WIDE}")
"""Forms of the recipe `default`, which the differences are taken from."""
QUALITY = (
    Measured("dense", "every key", ("dense, half rate", "dense"), "mha"),
    Measured("default, sliding", "newest keys, one layer of six wide", _BASE, "swa, sinks, windows 16/352"),
    Measured("recall", "learned ranks, the same windows", (f"learned, {_WIDE}",), "dma, learned, windows 16/352"),
    Measured(
        "",
        "the same, ranks with slopes",
        (f"learned, half rate, slopes, {_WIDE}", f"learned, slopes, {_WIDE}"),
        "dma, learned, slopes, windows 16/352",
    ),
    Measured("", "the same, scores and slopes on logits (0.1)", (f"scored, half rate, {_WIDE}",)),
    Measured("", "newest keys, the same logits", (f"scored, no choice, half rate, {_WIDE}",)),
    Measured("", "every key, slopes on logits", ("dense, slopes, half rate",)),
    Measured("even", "learned ranks, even windows", ("learned, even, w = N/16",)),
    Measured("paper", "the paper's scores, even windows", ("paper, w = N/16",)),
)
"""Rows in order."""
_SWEEPS = (
    ("scratch-tables", 256, 3),
    ("scratch", 256, 4),
    ("scratch-tables-10M", 384, 2),
    ("scratch-tables-20M", 512, 1),
    ("scratch-tables-60M", 896, 0),
)
"""Files and width of the runs of a column; a difference is taken from the column of least third number."""
_NEEDLE = "needle-far"


def quality_table(results: Path) -> str:
    """Draw test losses of models from scratch, and what they find beyond their widest window."""
    from dynamask_lab.studies.scratch.study import scratch_name

    columns: dict[str, dict[str, list[Record]]] = {}
    order: dict[str, int] = {}
    for file, width, place in _SWEEPS:
        files = sorted(results.glob(f"{file}.jsonl"))
        runs = [run for each in files for run in read_results(each) if run.config["width"] == width]
        named: dict[str, list[Record]] = {}
        for run in runs:
            if run.result.get("test") is not None:
                named.setdefault(scratch_name(run.config), []).append(run)
        if named:
            columns[_title(runs)] = named
            order[_title(runs)] = place
    seeds = {title: _shared_seeds(named) for title, named in columns.items()}
    needles = read_results(results / f"{_NEEDLE}.jsonl")
    used: list[Record] = []
    rows: list[Row] = []
    for measured in QUALITY:
        row = {"recipe": ", ".join(f"`{name}`" for name in measured.recipe.split(", ") if name)}
        row["attention"] = measured.attention
        own: list[Record] = []
        above: dict[int, str] = {}
        for title, named in columns.items():
            runs = next((named[form] for form in measured.forms if form in named), [])
            base = next((named[form] for form in _BASE if form in named), [])
            row[title] = _loss(runs, seeds[title])
            difference = _above(runs, base)
            above[order[title]] = f"{difference} ({title.partition(',')[0]})" if difference else ""
            own += runs
        found = [above[place] for place in sorted(above) if above[place]]
        row["above `default`"] = "" if measured.forms is _BASE or not found else found[0]
        searching = [run for run in needles if measured.needle in run.result["loss"]]
        row["needles beyond the window"] = _beyond(searching, measured.needle)
        own += searching
        if own:
            row["pairs"] = _range([share_of_pairs(run.config) for run in own])
            row["widest layer"] = _range([_widest(run) for run in own])
            rows.append(row)
            used += own
    lengths = " and ".join(f"{length:,}" for length in sorted({_length(run) for run in used}))
    size = f"{min(run.result['parameters'] for run in needles) / 1e6:.0f}M parameters, " if needles else ""
    note = (
        f"Contexts of {lengths} tokens. Columns of size and tokens: mean test loss in nats, in brackets the seeds, "
        "those that dense attention and `default` share; forms of a column read the same fresh tokens, columns do not "
        "compare. The rate at 88M tokens is too high for dense "
        "attention. `above default`: seed by seed over all seeds of both, with 95% interval, in brackets the size: the "
        "largest that ran both. Needles "
        f"({size}trained at 1,024 tokens): found between the reach of the widest sparse layer and the trained length. "
        "`pairs`: query-key pairs as a share of dense attention's. Empty: not run on the column's tokens. "
        f"{_few_seeds(columns)}"
        f"{', '.join(dict.fromkeys(_device(run) for run in used))}; "
        f"{named_commits(run.commit for run in used)}."
    )
    return table_with_note(rows, note)


def _title(runs: Sequence[Record]) -> str:
    """Parameters of a sweep's runs, the tokens that they read, and whether they have one seed."""
    size = runs[0].result["parameters"]["non_embedding"] / 1e6
    few = " (one seed)" if len({run.seed for run in runs}) == 1 else ""
    return f"{size:.1f}M, {runs[0].result['curve'][-1]['tokens'] / 1e6:,.0f}M tokens{few}"


def _few_seeds(columns: Mapping[str, Mapping[str, Sequence[Record]]]) -> str:
    """What a column of one seed decides, a sentence; "" where there is none."""
    found = [
        title.partition(",")[0]
        for title, named in columns.items()
        if len({run.seed for runs in named.values() for run in runs}) == 1
    ]
    if not found:
        return ""
    return f"{', '.join(found)}: one seed, which decides nothing below {FEW_SEEDS_INTEREST} nats. "


def _length(run: Record) -> int:
    return int(run.config.get("length") or run.config["context"])


def _device(run: Record) -> str:
    return run.device.partition(" (")[0]


def _shared_seeds(named: Mapping[str, Sequence[Record]]) -> set[int]:
    """Seeds that dense attention and `default` both have: means over other seeds would not compare."""
    found = [{run.seed for form in row.forms for run in named.get(form, ())} for row in QUALITY[:2]]
    return found[0] & found[1]


def _loss(runs: Sequence[Record], seeds: set[int]) -> str:
    """Mean test loss over the shared seeds, where the form has some, and how many they are."""
    shown = [run for run in runs if run.seed in seeds] or list(runs)
    return f"{np.mean([run.result['test'] for run in shown]):.3f} ({len(shown)})" if shown else ""


def _above(runs: Sequence[Record], base: Sequence[Record]) -> str:
    """How far the test losses lie above the base's, seed by seed, with the interval."""
    losses, other = ({run.seed: float(run.result["test"]) for run in each} for each in (runs, base))
    shared = sorted(losses.keys() & other.keys())
    if not shared:
        return ""
    found = mean_interval([losses[seed] - other[seed] for seed in shared])
    return f"{found.mean:+.3f}" + (f" [{found.low:+.3f}, {found.high:+.3f}]" if len(shared) > 1 else "")


def _beyond(runs: Sequence[Record], model: str) -> str:
    """The share of needles found beyond the widest sparse window and within the trained length, mean of the seeds."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for score in run.result["scores"]:
            far = score["length"] * (1 - score["depth"])
            if score["model"] == model and score["length"] <= run.config["context"] and far > NEEDLE_WINDOW:
                found.setdefault(run.seed, []).append(score["exact"])
    if not found:
        return ""
    return f"{np.mean([np.mean(cells) for cells in found.values()]):.0%} ({len(found)})"


NEEDLE_WINDOW = 352
"""Keys of the widest layer of the sparse forms in the needle sweep."""


def _widest(run: Record) -> float:
    """The widest layer's query-key pairs as a share of dense attention's."""
    widest = max(layer_windows(dict(run.config)))
    return share_of_pairs({"length": _length(run), "layers": 1, "attention": "swa", "window": widest})


def _range(shares: Sequence[float]) -> str:
    cells = list(dict.fromkeys(f"{100 * share:.0f}%" for share in sorted(shares)))
    return "" if not cells else cells[0] if len(cells) == 1 else f"{cells[0]} to {cells[-1]}"
