"""The table of what a converted model takes: time and cache, beside its dense peer in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask_lab.report.conversion import read_conversion
from dynamask_lab.report.page_tables import named_commits, read_lines, table_with_note
from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.sweeps.section import Row

MODELS = {"smollm2-135m": "SmolLM2-135M", "qwen3-0.6b": "Qwen3-0.6B"}
DECODE_RUNS = ("h200-decode.jsonl", "h200-graph.jsonl", "h200-compiled.jsonl", "h200-step.jsonl", "h200-recorded.jsonl")
"""Files of `lab/scripts/decode_gpu.py`, the oldest first; files that are not named here are newer than all of them."""
_COMPILED = "compiled norms and MLP"
_HOW = ("", ", recorded", ", compiled", ", compiled, recorded")
"""How a form may run: as it is, as a CUDA graph, with compiled layers, or both."""


@dataclass(frozen=True)
class Pair:
    """The converted form and its fastest dense peer, as one run timed both.

    Attributes:
        ours, dense: their lines.
    """

    ours: Mapping[str, Any]
    dense: Mapping[str, Any]


@dataclass(frozen=True)
class _Figure:
    """A row of the table.

    Attributes:
        title: of the row.
        measure: field of the lines.
        settings: of the lines.
        ours: form of the converted model.
        dense: what the forms of the peer hold in their names.
        without: what they do not hold.
        faster: whether more is better.
    """

    title: str
    measure: str
    settings: Mapping[str, Any]
    ours: str
    dense: str = "dense"
    without: str = "\0"
    faster: bool = False


def _step(title: str, length: int, kind: str = "train", ours: str = "converted") -> _Figure:
    return _Figure(f"{title}, ms", "ms", {"part": "train", "B": 1, "N": length, "kind": kind}, ours)


def _decoding(title: str, batch: int, **more: Any) -> _Figure:
    settings = {"part": "decode", "B": batch, "context": 32768}
    return _Figure(f"{title}, tokens/s", "tokens_per_s", settings, "ragged, graph", faster=True, **more)


_GRAPH: dict[str, Any] = {"dense": "graph", "without": _COMPILED}
FIGURES = (
    _step("training step at 8K", 8192),
    _step("the same, ranks learn too", 8192, ours="converted, ranks learn too"),
    _step("training step at 32K", 32768),
    _step("step of distillation at 8K", 8192, "distil", "converted, ranks learn too"),
    _Figure("prefill of 32K, ms", "ms", {"part": "prefill", "N": 32768}, "converted"),
    _decoding("decoding at 32K, batch 1", 1, **_GRAPH),
    _decoding("the same, dense with compiled norms and MLP", 1, dense=_COMPILED),
    _decoding("decoding at 32K, batch 32", 32, **_GRAPH),
    _Figure(
        "cache of a sequence at 32K, MiB",
        "cache_mib",
        {"part": "decode", "B": 1, "context": 32768},
        "ragged, graph",
        dense="keys in place, graph",
    ),
)
"""The rows, in order."""


def newest_pair(runs: Sequence[Mapping[str, Any]], model: str, figure: Any) -> Pair | None:
    """Find the newest run that timed a converted model and a dense peer.

    Args:
        runs: lines of `decode_gpu.py`, the oldest first. A run ends where a form is timed again, or the commit changes.
        model: name in the lines.
        figure: one of `FIGURES`.

    Returns:
        The faster line of each side of that run; recorded and compiled ones (`_HOW`) are forms of the same. None: no
        run timed both.
    """
    wanted = {"model": model, **figure.settings}
    found: Pair | None = None
    forms: dict[str, Mapping[str, Any]] = {}
    commit = None
    for line in runs:
        if any(line.get(name, 1) != value for name, value in wanted.items()) or line.get(figure.measure) is None:
            continue
        if line["form"] in forms or line["commit"] != commit:
            forms, commit = {}, line["commit"]
        forms[line["form"]] = line
        own = [each for form, each in forms.items() if form in [figure.ours + how for how in _HOW]]
        dense = [
            each
            for form, each in forms.items()
            if form.startswith("dense") and figure.dense in form and figure.without not in form
        ]
        if own and dense:
            found = Pair(_best(own, figure), _best(dense, figure))
    return found


def _best(lines: Sequence[Mapping[str, Any]], figure: _Figure) -> Mapping[str, Any]:
    return (max if figure.faster else min)(lines, key=lambda line: line[figure.measure])


def read_runs(results: Path) -> list[dict[str, Any]]:
    """Return the lines of `lab/results/decode`, the oldest file first."""
    folder = results / "decode"
    files = [folder / name for name in DECODE_RUNS]
    files += sorted(set(folder.glob("*.jsonl")) - set(files))
    return [line for file in files for line in read_lines(file)]


def cost_table(results: Path) -> str:
    """Draw what converted models take: training, prefill, decoding, cache and the conversion itself."""
    runs = read_runs(results)
    rows: list[Row] = []
    used: list[Mapping[str, Any]] = []
    for figure in FIGURES:
        row = {"": figure.title}
        for model, name in MODELS.items():
            pair = newest_pair(runs, model, figure)
            row |= _cells(name, figure, pair)
            used += [] if pair is None else [pair.ours, pair.dense]
        if any(cell for title, cell in row.items() if title):
            rows.append(row)
    stages = _stages(read_conversion(results))
    if stages:
        title = f"conversion beside another training, {' + '.join(stages)}, s"
        rows.append({"": title, MODELS["smollm2-135m"]: " + ".join(f"{each:,.0f}" for each in stages.values())})
    if not rows:
        return table_with_note([], "")
    devices = dict.fromkeys(str(line["device"]) for line in used)
    versions = dict.fromkeys(str(line["torch"]) for line in used)
    note = (
        "Steps: forward and backward, batch 1. Recorded as a CUDA graph, compiled or neither, whichever is fastest, on "
        "both sides. `ratio`: above one, the converted model is faster or smaller. Dense: in the same run, by flash or "
        "cuDNN attention; prompts not recorded, since the device is busy all the time; decoding by CUDA graph from a "
        "full cache written in place. Windows differ by head, on "
        f"average a sixteenth of the context. {_distillation(runs)}{', '.join(devices)}, torch {', '.join(versions)}, "
        f"other jobs on the host; {named_commits(line['commit'] for line in used)}."
    )
    return table_with_note(rows, note)


def _cells(name: str, figure: _Figure, pair: Pair | None) -> dict[str, str]:
    titles = (name, f"{name}, dense", f"ratio{' ' * list(MODELS.values()).index(name)}")
    if pair is None:
        return dict.fromkeys(titles, "")
    ours, dense = pair.ours[figure.measure], pair.dense[figure.measure]
    ratio = ours / dense if figure.faster else dense / ours
    return dict(zip(titles, (_short(ours), _short(dense), f"{ratio:.2f}"), strict=True))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _distillation(runs: Sequence[Mapping[str, Any]]) -> str:
    """How fast the newest distillation ran that had a GPU alone."""
    rates = [line["tokens_per_s"] for line in runs if line["part"] == "distillation" and not line.get("beside")]
    return f"Distillation alone on a GPU: {rates[-1] / 1e3:.0f} thousand tokens/s. " if rates else ""


def _stages(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each stage of the default conversion, compilation included, means over the seeds that ran them all."""
    # Only here: the study's modules take long to import.
    from dynamask_lab.studies.conversion.levers import converted
    from dynamask_lab.studies.conversion.settle import LAST

    found: list[dict[str, float]] = []
    for seed, trained in LAST.items():
        forms = {
            "ranks": (Spec("converted", None, seed=seed).name, "learn_ranks"),
            "windows": (converted(steps=0, seed=seed).name, "allocate_windows"),
            "distillation": (trained.name, "train"),
        }
        own = {
            stage: [
                line["result"]["seconds"]
                for line in lines
                if (line["form"], line["measure"]) == wanted and not line["result"].get("warm")
            ]
            for stage, wanted in forms.items()
        }
        if all(own.values()):
            found.append({stage: seconds[-1] for stage, seconds in own.items()})
    return {stage: sum(each[stage] for each in found) / len(found) for stage in found[0]} if found else {}
