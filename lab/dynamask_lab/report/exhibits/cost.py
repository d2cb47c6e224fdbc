"""Exhibit 5: what attention, training and decoding cost beside dense attention."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from dynamask.inspect.style import BLACK, BLUE
from dynamask_lab.report.exhibits.common import Drawn, Sweeps, panels_of
from dynamask_lab.report.pictures import save_small
from dynamask_lab.report.speed_table import every_timing
from dynamask_lab.sweeps.section import Exhibit

_WINDOW = 2048
"""Keys that a query sees in the first panel."""


def cost(results: Path, sweeps: Sweeps, folder: Path) -> Drawn | None:
    """Time and memory against dense attention: one attention with its mask, training, decoding, cache."""
    models = results / "h100-model" / "model.json"
    timings = [timing for timing in every_timing(results) if timing.window == _WINDOW]
    if not timings or not models.exists():
        return None
    model = json.loads(models.read_text(encoding="utf-8"))
    figure, panels = panels_of(13, 3.4, 4)
    newest = {(timing.device, timing.length): timing for timing in timings}
    for device, marker in zip(dict.fromkeys(device for device, _ in newest), "os^", strict=False):
        own = sorted((timing for at, timing in newest.items() if at[0] == device), key=lambda each: each.length)
        lengths, name = [timing.length for timing in own], device.split()[1]
        for times, label, colour in (
            ([timing.ours[1] for timing in own], "dynamask, mask included", BLUE),
            ([timing.dense[1] for timing in own], "dense, fastest kernel", BLACK),
        ):
            panels[0].plot(lengths, times, f"{marker}-", color=colour, label=f"{label}, {name}", markersize=4)
    panels[0].set(title="attention, forward + backward, ms", xlabel="tokens", yscale="log")
    for axes, rows, place, value, title in (
        (panels[1], model["training"], "N", "tokens_per_s", "training, tokens/s (wall clock)"),
        (
            panels[2],
            [row for row in model["generation"] if row["batch"] == 1],
            "context",
            "tokens_per_s",
            "decoding, tokens/s",
        ),
        (
            panels[3],
            [row for row in model["generation"] if row["batch"] == 1],
            "context",
            "cache_mib",
            "cache, MiB a sequence",
        ),
    ):
        best_of = min if value == "cache_mib" else max
        for is_dense, label, colour in ((False, "dynamask", BLUE), (True, "dense", BLACK)):
            points: dict[int, float] = {}
            for row in rows:
                if row["attention"].startswith("mha") is is_dense and row.get(value) is not None:
                    points[row[place]] = best_of(row[value], points.get(row[place], row[value]))
            axes.plot(*zip(*sorted(points.items()), strict=True), "o-", color=colour, label=label, markersize=4)
        axes.set(title=title, xlabel="tokens")
        if value == "cache_mib":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    latest = {timing.length: timing for timing in timings}
    gains = {length: timing.dense[1] / timing.ours[1] for length, timing in sorted(latest.items())}
    first, last = min(gains), max(gains)
    rising = all(before < after for before, after in itertools.pairwise(gains.values()))
    text = (
        f"With a window of {_WINDOW:,} keys, one attention with its mask, forward and backward, is "
        f"{'faster than the fastest dense kernels' if min(gains.values()) > 1 else 'faster in long texts'}"
        f"{', and its lead grows with the length of the text' if rising else ''}. Whole training steps gain less, "
        "because the rest of the model costs the same; decoding time and cache stop growing with the context."
    )
    table = [
        {
            "tokens": f"{length:,}",
            "times as fast as dense attention": f"{gains[length]:.{2 if length == first else 0}f}",
        }
        for length in dict.fromkeys((first, last))
    ]
    caption = (
        f"Attention: a window of {_WINDOW:,} keys, forward and backward with the mask, against the fastest dense "
        f"kernel ({latest[last].device}; table). Training, decoding and cache: a model of dynamask "
        f"{model['environment'].get('dynamask', '')}, {model['environment']['device']}."
    )
    rows_by_key: dict[str, tuple[str, Any]] = {
        f"{timing.device.split()[1]}, {timing.length} tokens": (f"lab/results/{timing.file}", dict(timing.row))
        for timing in newest.values()
    }
    for part in ("training", "generation"):
        for number, row in enumerate(model[part]):
            rows_by_key[f"{part}[{number}]"] = ("lab/results/h100-model/model.json", row)
    picture = save_small(figure, folder / "cost.svg")
    alt = "time of attention, training speed, decoding speed and cache against tokens, beside dense attention"
    exhibit = Exhibit("cost", "Cost", list(rows_by_key), text, table, picture, alt, caption)
    return exhibit, rows_by_key, "dynamask benchmark gpu; lab/scripts/kernel_times.py; dynamask benchmark model"
