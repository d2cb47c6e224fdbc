"""The table of one attention call with its mask, against the fastest dense kernel timed beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask_lab.report.page_tables import named_commits, read_json, table_with_note
from dynamask_lab.sweeps.section import Row

GPU_ROWS = ((3072, 1024), (8192, 2048), (8192, 512), (32768, 2048), (131072, 2048))
"""Length and window of the GPU's rows; heads as in `_SHAPE`."""
KERNEL_RUNS = (
    "h100-kernels-head-windows-before.json",
    "h100-kernels-head-windows.json",
    "h100-kernels-evening.json",
    "h200-kernels-evening.json",
    "h200-kernels-night.json",
    "h200-kernels-morning.json",
    "h200-kernels-forenoon.json",
    "h200-kernels-afternoon.json",
)
"""Files of `lab/scripts/kernel_times.py`, the oldest first; files that are not named here are newer."""
_SHAPE = {"D": 128, "H": 16, "G": 4}
_PEERS = {"cudnn": "cuDNN", "flash": "FlashAttention 2", "fa3": "FlashAttention 3 (forward alone)"}


@dataclass(frozen=True)
class Timing:
    """One shape on a GPU: milliseconds of a call with its mask, and of the fastest dense call of the same run.

    Attributes:
        length, window: tokens, and keys that a query sees.
        ours: forward; forward and backward. The mask (expiry, lists) is part of both.
        dense: the same of dense causal attention.
        peers: dense kernels that were timed.
        device, commit: where, and of which code.
        file, row: the raw row it comes from.
    """

    length: int
    window: int
    ours: tuple[float, float]
    dense: tuple[float, float]
    peers: tuple[str, ...]
    device: str
    commit: str | None
    file: str
    row: Mapping[str, Any]


def gpu_timings(results: Path) -> list[Timing]:
    """Return the newest timing of each of `GPU_ROWS` that has a dense peer of the same run.

    Args:
        results: folder of raw lines.

    Returns:
        In the order of `GPU_ROWS`; shapes that were never timed beside dense attention are left out.
    """
    found = {(timing.length, timing.window): timing for timing in every_timing(results)}
    return [found[row] for row in GPU_ROWS if row in found]


def every_timing(results: Path) -> Iterator[Timing]:
    """Every timing of the speed table's heads beside dense attention, the oldest first.

    Args:
        results: folder of raw lines.
    """
    yield from _of_grid(results)
    yield from _of_kernel_runs(results)


def _of_grid(results: Path) -> Iterator[Timing]:
    """The rows of `dynamask benchmark gpu`, which timed FlashAttention 3, too."""
    grid = read_json(results / "h100-attention.json")
    for row in grid["attention"] if grid else ():
        if all(row[name] == value for name, value in {**_SHAPE, "scores": "random"}.items()):
            peers = tuple(peer for peer in _PEERS if row.get(f"{peer}_forward_ms") is not None)
            forward, backward = (_least(row[f"{peer}_{kind}_ms"] for peer in peers if row.get(f"{peer}_{kind}_ms"))
                                 for kind in ("forward", "backward"))  # fmt: skip
            if forward is None or backward is None:
                continue
            own = row["expiry_ms"] + row["forward_ms"]
            environment = grid["environment"]
            yield Timing(
                row["N"], row["w"], (own, own + row["backward_ms"]), (forward, forward + backward), peers,
                environment["device"], environment["commit"], "h100-attention.json", row,
            )  # fmt: skip


def _of_kernel_runs(results: Path) -> Iterator[Timing]:
    """The rows of `kernel_times.py --dense`, the oldest first."""
    files = [results / name for name in KERNEL_RUNS]
    files += sorted(set(results.glob("h*-kernels-*.json")) - set(files))
    for file in files:
        run = read_json(file)
        for commit, row in _rows(run, run.get("commit")) if run else ():
            windows = set(row["windows"])
            shape = {"D": row["D"], "H": row["H"], "G": len(row["windows"])}
            if len(windows) != 1 or shape != _SHAPE or "expiry" not in row:
                continue
            peers = tuple(peer for peer in _PEERS if isinstance(row.get(f"dense {peer}"), float))
            forward = _least(row[f"dense {peer}"] for peer in peers)
            backward = _least(row[f"dense {peer} backward"] for peer in peers if f"dense {peer} backward" in row)
            if forward is None or backward is None:
                continue
            own = row["expiry"] + row["forward, a call"]
            yield Timing(
                row["N"], windows.pop(), (own, own + row["backward, a call"]), (forward, forward + backward), peers,
                run["device"], commit, file.name, row,
            )  # fmt: skip


def _rows(node: Any, commit: str | None) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """Every timed row of a file with its commit; a later call of one file names its own in its heading."""
    if isinstance(node, dict):
        if "windows" in node and "N" in node and "forward, a call" in node:
            yield commit, node
            return
        own = node.get("commit", commit)
        for name, value in node.items():
            named = re.search(r"commit.*?\b([0-9a-f]{7,40})\b", name)
            yield from _rows(value, named[1] if named else own)
    elif isinstance(node, list):
        for value in node:
            yield from _rows(value, commit)


def _least(values: Iterator[float]) -> float | None:
    return min(values, default=None)


def speed_table(results: Path) -> str:
    """Draw one attention call against the fastest dense kernel timed beside it, wins and losses alike."""
    rows: list[Row] = []
    notes = []
    timings = gpu_timings(results)
    for timing in timings:
        device = timing.device.split()[1]
        rows.append(_row(device, timing.length, timing.window, timing.ours, timing.dense))
    for device in dict.fromkeys(timing.device for timing in timings):
        own = [timing for timing in timings if timing.device == device]
        peers = dict.fromkeys(peer for timing in own for peer in timing.peers)
        dense = ", ".join(_PEERS[peer] for peer in peers)
        notes.append(f"{device}: dense is the fastest of {dense}; {named_commits(timing.commit for timing in own)}")
    if timings:
        notes.insert(
            0,
            f"GPUs: bfloat16, batch 1, {_SHAPE['H']} query heads, {_SHAPE['G']} KV heads, head dimension "
            f"{_SHAPE['D']}, random scores; the mask is part of the time",
        )
    cpu = read_json(results / "cpu.json")
    if cpu is not None:
        for row in cpu["rows"]:
            times, rival = (
                [1e3 * row[f"{peer}_{kind}_s"] for kind in ("forward", "train")] for peer in ("interval", "dense_sdpa")
            )
            rows.append(_row("CPU", row["length"], row["window"], times, rival))
        environment = cpu["environment"]
        first = cpu["rows"][0]
        notes.append(
            f"CPU: {environment['device']}, {environment['threads']} threads, float32, {first['heads']} query heads, "
            f"{first['groups']} KV heads, head dimension {first['dim']}; dense is PyTorch's causal SDPA; commit "
            f"{environment['commit']}"
        )
    return table_with_note(rows, "Milliseconds. " + ". ".join(notes) + ".")


def _row(device: str, length: int, window: int, ours: Sequence[float], dense: Sequence[float]) -> Row:
    cells = {"": device, "N": f"{length:,}", "window": f"{window:,}"}
    for name, own, other in zip(("forward", "forward + backward"), ours, dense, strict=True):
        cells |= {name: f"{own:.3g}", f"dense {name}": f"{other:.3g}", f"x {name}": f"{other / own:.2g}"}
    titles = {"x forward": "ratio", "x forward + backward": "ratio "}
    return {titles.get(name, name): cell for name, cell in cells.items()}
