"""What the GPU benchmark measures, the most important first, until its time is spent."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dynamask.errors import UsageError
from dynamask_lab.benchmarks.gpu import check, peers
from dynamask_lab.benchmarks.gpu.apart import Task, run_apart
from dynamask_lab.benchmarks.gpu.measure import attempt, time_attention, time_decode, time_peer, time_prefill, whole
from dynamask_lab.benchmarks.gpu.problem import Shape
from dynamask_lab.benchmarks.gpu.report import markdown
from dynamask_lab.sweeps import provenance

PARTS = ("attention", "peers", "decode", "prefill")
LONGEST_BACKWARD = 1 << 17
"""Rows of more positions have their backward timed last, apart: it has never finished on a million."""
_OTHERS = ((16, 128), (4, 64))  # (G, D) beside the main shape's
Row = tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        lengths: N timed for both windows; 131072 is the longest at which dense peers are timed.
        scaling: further N, timed for the larger window, up to a million.
        windows: w; the last one is the one most figures are about.
        scores: files of trained scores, see `dynamask_lab.benchmarks.scores`.
        peers: those of `PEERS` beside the dense ones, each timed next to ours at one shape.
        budget_seconds: nothing starts after it.
        checks: compare with float64 first.
    """

    lengths: tuple[int, ...] = (32768, 131072)
    scaling: tuple[int, ...] = (16384, 65536, 1048576, 262144, 524288)
    windows: tuple[int, ...] = (1024, 2048)
    scores: tuple[Path, ...] = ()
    peers: tuple[str, ...] = ("flex", "nsa", "fsa1", "fsa2", "fsa2_gated")
    budget_seconds: float = 300.0
    checks: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.peers if name not in peers.PEERS or name in peers.DENSE]
        if unknown:
            known = ", ".join(name for name in peers.PEERS if name not in peers.DENSE)
            raise UsageError(f"unknown peer {unknown[0]!r}: there are {known}")
        if not self.windows or min(*self.windows, *self.lengths, *self.scaling) < 1:
            raise UsageError("windows and lengths must be at least 1, and one window at least is needed")


def benchmark_gpu(
    settings: Settings,
    *,
    commit: str | None = None,
    save: Callable[[dict[str, Any]], None] = lambda results: None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Check, then time, the operator at H = 16, its peers, decoding and prefill.

    Args:
        settings: what to measure.
        commit: of the code; default: asked of git.
        save: called with the results after every row.
        progress: called with a line about every row.

    Returns:
        "environment", "settings", "errors" (against float64), "rehearsals", the rows of `PARTS`, "not_measured" (what
        the budget left out) and "seconds".

    Raises:
        AssertionError: what is to be timed gives wrong results, so that no time is worth anything.
    """
    started = time.perf_counter()
    results: dict[str, Any] = {
        "environment": environment(commit),
        "settings": {**asdict(settings), "scores": [str(path) for path in settings.scores]},
        "errors": [],
        "rehearsals": [],
        **{part: [] for part in PARTS},
        "not_measured": [],
    }
    _prepare(settings, results, progress)
    save(results)
    wrong = check.failures([row for row in results["errors"] if "worst" in row])
    progress(f"wrong: {json.dumps(wrong)}" if wrong else "no case is wrong")
    timed = {(case["dtype"], case["dim"], case["groups"]) for case in check.TIMED}
    fatal = [row for row in wrong if (row["dtype"], row["D"], row["G"]) in timed]
    if fatal:
        raise AssertionError(f"wrong results, so no time is worth anything: {json.dumps(fatal[:3])}")
    run_rows(plan(settings, results["rehearsals"]), results, settings.budget_seconds, started, save, progress)
    return results


def environment(commit: str | None = None) -> dict[str, Any]:
    """Device, versions (peers' too) and commit."""
    return {
        "device": torch.cuda.get_device_name(),
        **provenance.versions(),
        "cuda": torch.version.cuda,
        "peers": {name: ", ".join(found) or "not installed" for name, found in peers.versions().items()},
        "commit": commit or provenance.commit(),
    }


def _prepare(settings: Settings, results: dict[str, Any], progress: Callable[[str], None]) -> None:
    """Checks against float64 and rehearsals of peers, all at once in processes of their own.

    What is timed is checked first, and compiled by that; what is not done after half of the budget is given up.
    """
    cases = check.cases() if settings.checks else []
    timed = len(check.TIMED) if settings.checks else 0
    rehearsals = [Task("peer", {"peer": name, **asdict(peer_shape(name, settings))}) for name in settings.peers]
    checks = [Task("check", case) for case in cases]
    tasks = checks[:timed] + rehearsals + checks[timed:]
    began = time.perf_counter()
    for task, found in zip(tasks, run_apart(tasks, deadline=settings.budget_seconds / 2), strict=True):
        if task.kind == "peer":
            found.pop("result", None)
            results["rehearsals"].append({**task.arguments, **found})
        elif "error" in found:
            given = task.arguments
            case = {"dtype": given["dtype"], "N": given.get("length"), "D": given["dim"], "G": given["groups"]}
            results["errors"].append({**case, "error": found["error"]})
        else:
            results["errors"].extend(found["result"])
    results["preparation_seconds"] = time.perf_counter() - began
    progress(
        f"{results['preparation_seconds']:6.1f} s  checked {len(results['errors'])} cases, "
        f"rehearsed {len(rehearsals)} peers"
    )


def peer_shape(name: str, settings: Settings) -> Shape:
    """Where a peer meets ours: 32K; NSA with one key/value head, as its kernels want 16 query heads for one."""
    return Shape(32768, settings.windows[-1], groups=1 if name == "nsa" else 4)


def plan(settings: Settings, rehearsals: list[dict[str, Any]]) -> Iterator[Row]:
    """Every row, the most important first."""
    dense, fast = peers.DENSE, peers.DENSE[:2]  # PyTorch's flash backend, the slowest, is timed for G = 4 only
    wide = settings.windows[-1]
    done: set[Shape] = set()

    def attention(shape: Shape, contestants: tuple[str, ...] = (), scores: Path | None = None, **options: Any) -> Row:
        done.add(shape)
        return "attention", shape.row, partial(time_attention, shape, contestants, scores=scores, **options)

    def new(shape: Shape) -> bool:
        return shape not in done and shape.window < shape.length

    for length in settings.lengths:
        if new(shape := Shape(length, wide)):
            yield attention(shape, dense, deterministic=True)
    for length in settings.lengths:
        for groups, dim in _OTHERS:
            if new(shape := Shape(length, wide, dim, groups=groups)):
                yield attention(shape, fast)
    for window in settings.windows[::-1]:
        for length in (4 * window, 3 * window):
            if new(shape := Shape(length, window)):
                yield attention(shape, dense)
    later = []
    for length in settings.scaling:
        if new(shape := Shape(length, wide)):
            short = length <= LONGEST_BACKWARD
            later += [] if short else [shape]
            yield attention(shape, fast if length <= 65536 else (), backward=short)
    for batch in (1, 32):
        for context in (wide, 524288, 32768):
            step = {"context": context, "w": wide, "B": batch}
            yield "decode", step, partial(time_decode, context, wide, batch)
    for file in settings.scores:
        shape = Shape(32768, wide, scores=f"trained {file.stem}")
        yield attention(shape, scores=file)
    for kind in ("rising", "falling"):
        yield attention(Shape(32768, wide, scores=kind))
    failed = {row["peer"]: row["error"] for row in rehearsals if "error" in row}
    for name in settings.peers:
        shape = peer_shape(name, settings)
        identity = {"peer": name, **shape.row, "mask": peers.PEERS[name].mask, "note": peers.PEERS[name].note}
        if name in failed:
            yield "peers", identity, partial(_rehearsed_in_vain, identity, failed[name])
        else:
            yield "peers", identity, partial(time_peer, name, shape)
    for length in settings.lengths:
        yield "prefill", {"N": length, "w": wide}, partial(time_prefill, length, wide)
    for window in settings.windows[:-1]:
        for groups, dim in ((4, 128), *_OTHERS):
            for length in settings.lengths:
                if new(shape := Shape(length, window, dim, groups=groups)):
                    yield attention(shape)
    for groups, dim in _OTHERS:
        if new(shape := Shape(4 * wide, wide, dim, groups=groups)):
            yield attention(shape, fast)
    for shape in sorted(later, key=lambda shape: shape.length):
        yield "attention", shape.row, partial(backward_apart, shape)


def backward_apart(shape: Shape, timeout: float = 60.0, **options: Any) -> dict[str, Any]:
    """The backward's part of a row, in a process that can be killed: "backward_error" if it fails or hangs."""
    (found,) = run_apart([Task("backward", asdict(shape))], timeout=timeout, **options)
    return {**shape.row, "backward_error": found["error"]} if "error" in found else found["result"]


def _rehearsed_in_vain(identity: dict[str, Any], error: str) -> dict[str, Any]:
    return {**identity, "error": error}


def run_rows(
    rows: Iterator[Row],
    results: dict[str, Any],
    budget: float,
    started: float,
    save: Callable[[dict[str, Any]], None],
    progress: Callable[[str], None],
) -> None:
    """Measure rows until `budget` seconds after `started`; the rest, and all after a lost GPU context, are listed."""
    lost = ""
    for part, identity, measure in rows:
        left_out = lost or ("" if time.perf_counter() - started <= budget else f"the budget of {budget:g} s was spent")
        if left_out:
            results["not_measured"].append({"part": part, **identity, "reason": left_out})
            continue
        begin = time.perf_counter()
        row = attempt(measure, identity)
        lost = _lost_context(identity)
        row["seconds"] = time.perf_counter() - begin
        place(results[part], row, identity)
        results["seconds"] = time.perf_counter() - started
        progress(f"{results['seconds']:6.1f} s  {part} {_brief(identity)}{_outcome(row)}")
        save(results)
    results["seconds"] = time.perf_counter() - started
    save(results)


def place(rows: list[dict[str, Any]], row: dict[str, Any], identity: dict[str, Any]) -> None:
    """Add a row, or its figures to the row that has this identity already."""
    for earlier in rows:
        if all(earlier.get(key) == value for key, value in identity.items()):
            earlier.update(row | {"seconds": earlier["seconds"] + row["seconds"]})
            return
    rows.append(row)


def _outcome(row: dict[str, Any]) -> str:
    """What a watcher of the log would like to know of a row."""
    failed = [key for key in row if key == "error" or key.endswith("_error")]
    figures = ("forward_ms", "backward_ms", "bounded_us", "prefill_ms")
    told = [f"{key} {row[key]:.4g}" for key in figures if key in row] + [f"failed: {key}" for key in failed]
    return "".join(f"  {text}" for text in told)


def _lost_context(identity: dict[str, Any]) -> str:
    """Free what the row held; why nothing more can run in this process, if so."""
    if not torch.cuda.is_available():
        return ""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return f"the GPU was lost in {_brief(identity)}: {error}"
    return ""


def _brief(identity: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in identity.items() if key != "note")


def write(results: dict[str, Any], stem: Path) -> None:
    """STEM.json and STEM.md, each replaced whole, so that a killed run leaves its last results."""
    write_rendered(results, stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.md"), markdown)


def write_rendered(
    results: dict[str, Any], figures: Path, tables: Path, render: Callable[[dict[str, Any]], str]
) -> None:
    """Results as JSON and, after that, as `render` shows them; their folder is made.

    A run goes on whose tables cannot be drawn yet: the figures are what it is for.
    """
    figures.parent.mkdir(parents=True, exist_ok=True)
    _replace_text(figures, json.dumps(results, indent=1) + "\n")
    try:
        text = render(results)
    except Exception as error:
        text = f"The tables could not be drawn:\n\n```\n{whole(error)}\n```\n"
    _replace_text(tables, text)


def _replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def stderr_progress(line: str) -> None:
    """A line on standard error."""
    print(line, file=sys.stderr, flush=True)
