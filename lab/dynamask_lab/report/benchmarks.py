"""The benchmarks' JSON files as sections of the report: attention on a GPU and a CPU, and whole models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask.inspect.style import BLACK, BLUE, GREEN, ORANGE, RED, SKY
from dynamask_lab.report.conversion import PATTERN, conversion_section
from dynamask_lab.report.masks import masks_section
from dynamask_lab.report.masks_over_training import masks_over_training_section
from dynamask_lab.report.pictures import save_small
from dynamask_lab.report.scale import PATTERN as SCALE
from dynamask_lab.report.scale import scale_section
from dynamask_lab.report.speed_table import every_timing
from dynamask_lab.report.tasks import tasks_section
from dynamask_lab.studies.ceiling.report import PATTERN as CEILING
from dynamask_lab.studies.ceiling.report import ceiling_section
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section
from dynamask_lab.sweeps.verdicts import NOT_TESTED, REFUTED, REPRODUCED

Sectioned = tuple[Section, dict[str, Any], str]
"""The section, the raw rows it may name by key, and where they were measured."""


@dataclass(frozen=True)
class Benchmark:
    """A kind of file in the results folder that no sweep wrote.

    Attributes:
        title, text: of its page.
        pattern: which files, below the results folder.
        command: what writes such a file.
        section: the file's JSON and a folder for pictures -> its section.
        together: whether the lines of a file make one section, and are given to it as a list.
    """

    title: str
    text: str
    pattern: str
    command: str
    section: Callable[[Any, Path], Sectioned]
    together: bool = False


_DENSE = ("flash", "cudnn", "fa3")


def attention_section(raw: Any, folder: Path) -> Sectioned:
    """`dynamask benchmark gpu`."""
    rows = _keyed(raw, ("attention", "peers", "decode", "prefill", "errors"))
    own = {key: row for key, row in rows.items() if key.startswith("attention")}
    timed = {key: row for key, row in own.items() if "forward_ms" in row}
    main = {key: row for key, row in timed.items() if row["scores"] == "random"}
    table = [_attention_row(row, raw["attention"]) for row in timed.values()]
    exhibits = [
        Exhibit(
            "forward-backward",
            "Attention, forward and backward",
            list(own),
            "Milliseconds; `dense` is the fastest dense kernel measured for that pass and length (FlashAttention-2 and "
            "cuDNN through SDPA, FlashAttention-3), `x` how many times as long it takes. Empty cells were not timed.",
            table,
            _draw_attention(list(main.values()), folder / "attention.svg"),
            "milliseconds of a forward and a backward pass against the sequence length, interval attention and dense",
        )
    ]
    decode = {key: row for key, row in rows.items() if key.startswith("decode[") and "dense_us" in row}
    if decode:
        cells: list[Row] = [
            {
                "context": f"{row['context']:,}",
                "window": str(row["w"]),
                "batch": str(row["B"]),
                "bounded cache, µs": f"{row['bounded_us']:.1f}",
                "dense SDPA, µs": f"{row['dense_us']:.1f}",
                "x": f"{row['dense_us'] / row['bounded_us']:.1f}",
            }
            for row in decode.values()
        ]
        exhibits.append(Exhibit("decode", "One decoding step's attention", list(decode), table=cells))
    errors = {key: row for key, row in rows.items() if key.startswith("errors")}
    if errors:
        cells = [_plain_row(row, ".2e") for row in errors.values()]
        text = "Relative error against float64, of what was timed; FlashAttention's own beside it."
        exhibits.append(Exhibit("errors", "Correct first", list(errors), text, cells))
    for part, title in (("peers", "Sparse peers, each beside ours at one shape"), ("prefill", "Prefill")):
        keys = [key for key in rows if key.startswith(f"{part}[")]
        if keys:
            exhibits.append(Exhibit(part, title, keys, table=[_plain_row(rows[key]) for key in keys]))
    return Section("", exhibits), rows, _environment(raw["environment"])


def newest_speeds(results: Path) -> Sectioned | None:
    """The newest timing of each shape beside dense attention, which the claim about speed and the README's table read.

    Args:
        results: folder of raw lines.

    Returns:
        One row per length and window, at the heads of the README's table; the raw rows' keys are "6144 tokens, window
        2048". None where nothing was timed beside dense attention.
    """
    newest = {(timing.length, timing.window): timing for timing in every_timing(results)}
    if not newest:
        return None
    table: list[Row] = []
    ratios, shapes, devices, rows = {}, {}, {}, {}
    for (length, window), timing in sorted(newest.items()):
        key = f"{length} tokens, window {window}"
        device = _gpu(timing.device)
        ours, dense = timing.ours[1], timing.dense[1]
        cells = {"GPU": device, "N": f"{length:,}", "window": f"{window:,}", "ours": f"{ours:.3g}"}
        table.append(cells | {"dense": f"{dense:.3g}", "x": f"{dense / ours:.3g}", "file": timing.file})
        ratios[key], shapes[key], devices[key] = dense / ours, {"N": length, "w": window}, device
        rows[key] = {"file": timing.file, "device": timing.device, "commit": timing.commit, **timing.row}
    text = (
        "Milliseconds of one forward and backward pass, the mask included; `dense` is the fastest dense kernel of the "
        "same run, `x` how many times as long it takes. The newest run of each shape counts."
    )
    exhibit = Exhibit("speeds", "Newest timing of each shape", list(rows), text, table)
    subject = "attention with its mask, forward and backward, against the fastest dense kernels of the same run"
    finding = _speed_finding(subject, ratios, shapes, devices)
    files = sorted({(timing.file, timing.device, timing.commit or "?") for timing in newest.values()})
    sources = "; ".join(f"{device}, commit {commit[:7]} (`{file}`)" for file, device, commit in files)
    return Section("", [exhibit], finding), rows, sources


def cpu_section(raw: Any, folder: Path) -> Sectioned:
    """`dynamask benchmark cpu`."""
    rows = _keyed(raw, ("rows",))
    table: list[Row] = []
    for row in rows.values():
        for kind, name in (("forward", "forward"), ("train", "forward and backward")):
            ours, masked, dense = (row[f"{peer}_{kind}_s"] for peer in ("interval", "masked_sdpa", "dense_sdpa"))
            cells = {"N": str(row["length"]), "window": str(row["window"]), "pass": name}
            cells |= {
                f"{label}, ms": f"{1e3 * s:.0f}"
                for label, s in zip(("interval", "masked", "dense"), (ours, masked, dense), strict=True)
            }
            table.append(cells | {"x masked": f"{masked / ours:.1f}", "x dense": f"{dense / ours:.1f}"})
    text = "Interval attention, the same mask through SDPA, and dense causal SDPA."
    exhibits = [Exhibit("attention", "Attention on a CPU", list(rows), text, table)]
    return Section("", exhibits), rows, _environment(raw["environment"])


def model_section(raw: Any, folder: Path) -> Sectioned:
    """`dynamask benchmark model`."""
    from dynamask_lab.benchmarks.model import TABLES, table_rows

    rows = _keyed(raw, tuple(TABLES))
    exhibits = []
    for part, (title, columns) in TABLES.items():
        if raw[part]:
            cells = [dict(zip((*columns, "remark"), line, strict=False)) for line in table_rows(raw, part)]
            keys = [key for key in rows if key.startswith(f"{part}[")]
            exhibits.append(Exhibit(part, title, keys, table=cells))
    steps: dict[int, dict[str, tuple[str, float]]] = {}
    for key, row in rows.items():
        if key.startswith("training[") and row.get("step_s"):
            own = steps.setdefault(row["N"], {})
            if row["attention"] not in own or row["step_s"] < own[row["attention"]][1]:
                own[row["attention"]] = (key, row["step_s"])
    ratios, lengths = {}, {}
    for length, found in steps.items():
        dense = [seconds for name, (_, seconds) in found.items() if name.startswith("mha")]
        if dense and "dma" in found:
            key, ours = found["dma"]
            ratios[key], lengths[key] = min(dense) / ours, {"N": length, "w": rows[key].get("window")}
    preset = raw.get("settings", {}).get("preset", "a model")
    subject = f"training step of {preset}, against the fastest dense one"
    device = _gpu(raw["environment"].get("device", ""))
    finding = _speed_finding(subject, ratios, lengths, dict.fromkeys(ratios, device))
    notes = "\n".join(f"- {note}" for note in raw.get("notes", ()))
    return Section(notes, exhibits, finding), rows, _environment(raw["environment"])


def _keyed(raw: Any, parts: Sequence[str]) -> dict[str, Any]:
    """ "part[index]" -> row."""
    return {f"{part}[{index}]": row for part in parts for index, row in enumerate(raw.get(part, ()))}


def _environment(environment: Mapping[str, Any]) -> str:
    told = {
        name: "; ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else value
        for name, value in environment.items()
    }
    return ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)


def _plain_row(row: Mapping[str, Any], form: str = ".3g") -> Row:
    return {name: f"{value:{form}}" if isinstance(value, float) else str(value) for name, value in row.items()}


def _dense(row: Mapping[str, Any], kind: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The fastest dense kernel's milliseconds at the row's N, D and G, None where none was timed.

    Dense kernels see every key whatever the window, so that any row of that shape may hold their time.
    """
    alike = [each for each in rows if all(each[size] == row[size] for size in ("N", "D", "G"))]
    times = [each.get(f"{peer}_{kind}_ms") for each in alike for peer in _DENSE]
    return min((time for time in times if time is not None), default=None)


def _attention_row(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Row:
    cells = {"N": f"{row['N']:,}", "D": str(row["D"]), "H/G": f"{row['H']}/{row['G']}", "window": str(row["w"])}
    cells |= {"scores": row["scores"], "expiry": f"{row['expiry_ms']:.3g}"}
    for kind in ("forward", "backward"):
        dense, own = _dense(row, kind, rows), row.get(f"{kind}_ms")
        cells[kind] = "" if own is None else f"{own:.3g}"
        cells[f"dense {kind}"] = "" if dense is None else f"{dense:.3g}"
        cells[f"x {kind}"] = "" if dense is None or own is None else f"{dense / own:.1f}"
    return cells


def _gpu(device: str) -> str:
    """The model of a GPU: "H100" of "NVIDIA H100 80GB HBM3"."""
    return device.removeprefix("NVIDIA ").partition(" ")[0] or "a device without a name"


def _speed_finding(
    subject: str,
    ratios: Mapping[str, float],
    rows: Mapping[str, Mapping[str, Any]],
    devices: Mapping[str, str],
) -> list[Finding]:
    """Against "up to 10 times": the greatest ratio counts, and the least is told, each with its GPU."""
    if not ratios:
        return [Finding("speed", subject, "no dense kernel timed beside ours", NOT_TESTED, ())]
    best, worst = max(ratios, key=lambda key: ratios[key]), min(ratios, key=lambda key: ratios[key])

    def told(key: str) -> str:
        return f"{ratios[key]:.2g} times at N = {rows[key]['N']:,}, window {rows[key]['w']} on {devices[key]}"

    measured = f"at most {told(best)}; at least {told(worst)}"
    verdict = REPRODUCED if ratios[best] >= 10 else REFUTED
    gpus = " and ".join(dict.fromkeys((devices[worst], devices[best])))
    lengths = f"{rows[worst]['N']:,} to {rows[best]['N']:,} tokens"
    difference = f"{ratios[worst]:.2g} to {ratios[best]:.2g} times, {lengths}, {gpus}"
    return [Finding("speed", subject, measured, verdict, list(ratios), interest="10 times", difference=difference)]


def _draw_attention(rows: Sequence[Mapping[str, Any]], picture: Path) -> Path | None:
    """One panel per head shape and window that has more than one length, and peers where any has."""
    from matplotlib.figure import Figure

    groups: dict[tuple[int, int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["D"], row["G"], row["w"]), []).append(row)
    groups = {shape: sorted(own, key=lambda row: row["N"]) for shape, own in groups.items() if len(own) > 1}
    groups = {
        shape: own for shape, own in groups.items() if any(_dense(row, "forward", own) is not None for row in own)
    } or groups
    if not groups:
        return None
    kinds: dict[str, dict[str, Any]] = {
        "dynamask": {"color": BLUE, "marker": "o", "linewidth": 2.2},
        "fa3": {"color": RED, "marker": "P", "linestyle": ":"},
        "cudnn": {"color": BLACK, "marker": "s", "linestyle": "--"},
        "flash": {"color": ORANGE, "marker": "^", "linestyle": "--"},
        "flex": {"color": GREEN, "marker": "v", "linestyle": "-."},
    }
    # Expiry and lists are inside the forward; drawn alone they say what choosing costs.
    figure = Figure(figsize=(3.1 * len(groups) + 1.4, 6.2), layout="constrained")
    panels = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row")
    for column, ((dim, groups_count, window), own) in enumerate(groups.items()):
        for line, kind in enumerate(("forward", "backward")):
            axes = panels[line][column]
            for name, style in kinds.items():
                field = f"{kind}_ms" if name == "dynamask" else f"{name}_{kind}_ms"
                points = [(row["N"], row[field]) for row in own if row.get(field) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name, markersize=5, **style)
            if kind == "forward":
                choosing = [(row["N"], row["expiry_ms"]) for row in own]
                axes.plot(*zip(*choosing, strict=True), label="expiry alone", color=SKY, marker="D", markersize=4)
                axes.set_title(f"D {dim}, {groups_count} KV heads, w {window}", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(f"{kind}, ms")
            if line == 1:
                axes.set_xlabel("sequence length N")
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    return save_small(figure, picture)


BENCHMARKS: dict[str, Benchmark] = {
    "attention": Benchmark(
        "Attention on a GPU",
        "One layer's attention, each kernel correct first, then timed against its peers.",
        "*attention.json",
        "dynamask benchmark gpu --output lab/results/h100-attention",
        attention_section,
    ),
    "cpu": Benchmark(
        "Attention on a CPU",
        "The blocked path that needs no GPU.",
        "cpu.json",
        "dynamask benchmark cpu --output lab/results/cpu.json",
        cpu_section,
    ),
    "model": Benchmark(
        "Whole models",
        "Training steps and decoding of a whole model, dynamic mask against dense attention.",
        "*/model.json",
        "dynamask benchmark model --output lab/results/h100-model",
        model_section,
    ),
    "masks": Benchmark(
        "Does the mask learn?",
        "Trained models: how long keys live, which of them, how far back heads read.",
        "masks/*.jsonl",
        "dynamask report masks RUN --line lab/results/masks/RUN.jsonl",
        masks_section,
    ),
    "masks-over-training": Benchmark(
        "Masks over training",
        "The checkpoints of a run: when a model begins to choose, and whether it comes to need the choice.",
        "masks-over-training/*.jsonl",
        "dynamask report masks RUN --over-training --line lab/results/masks-over-training/RUN.jsonl",
        masks_over_training_section,
    ),
    "tasks": Benchmark(
        "Benchmark tasks over local data",
        "lm-evaluation-harness on small models of every mechanism, with data that every machine has or the corpora "
        "hold out: that all of them run through it, and what models of this size get.",
        "tasks/*.jsonl",
        "python lab/scripts/local_tasks.py; python lab/scripts/sweep_tasks.py MODELS --output "
        "lab/results/tasks/scaling.jsonl",
        tasks_section,
        together=True,
    ),
    "scale": Benchmark(
        "Several GPUs and long texts",
        "Sequences split over GPUs, models split over GPUs, and long texts read in chunks.",
        SCALE,
        "torchrun --standalone --nproc-per-node 2 lab/scripts/context_parallel_gpu.py --out "
        "lab/results/scale/context-parallel.jsonl; python lab/scripts/million_tokens_gpu.py --out "
        "lab/results/scale/million-tokens.jsonl",
        scale_section,
        together=True,
    ),
    "ceiling": Benchmark(
        "The ceiling of choosing",
        "A pretrained dense model whose attention sees the newest keys, the keys of learned ranks, the best static "
        "keys by true future attention, or the best keys of each query.",
        CEILING,
        "python -m dynamask_lab.studies.ceiling.study --model MODEL --data DATA --out lab/results/ceiling.jsonl",
        ceiling_section,
        together=True,
    ),
    "conversion": Benchmark(
        "Converting a pretrained model",
        "A pretrained dense model with a bounded cache: what it keeps of its losses, of retrieval and of benchmarks, "
        "beside methods that compress the cache of the dense model.",
        PATTERN,
        "python -m dynamask_lab.studies.conversion.study --model MODEL --data DATA --state STATE --out "
        "lab/results/conversion.jsonl",
        conversion_section,
        together=True,
    ),
}
"""By the name of their page."""
