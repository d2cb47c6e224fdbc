"""Tables and pictures of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynamask.models import preset
from dynamask_lab.benchmarks.gpu.run import write_rendered

TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "training": (
        "Training step",
        (
            "attention",
            "N",
            "weights",
            "compiled",
            "step_s",
            "tokens_per_s",
            "peak_gib",
            "useful_tflops",
            "mfu",
            "mfu_with_output",
        ),
    ),
    "generation": (
        "Decoding",
        ("attention", "cache", "batch", "context", "ms_per_token", "tokens_per_s", "cache_mib", "peak_gib"),
    ),
    "prefill": ("Prefill", ("attention", "cache", "N", "seconds", "tokens_per_s", "cache_mib", "peak_gib")),
    "longest": ("Longest trainable length (one step, untimed)", ("attention", "N", "step_s", "peak_gib", "longest")),
}


def table_rows(results: dict[str, Any], part: str) -> list[list[str]]:
    """The cells of a table of `TABLES`; the last one says why a row has no figures."""
    columns = TABLES[part][1]
    rows = []
    for row in results[part]:
        remark = row.get("error") or row.get("skipped") or (f"ended by: {row['ended']}" if "ended" in row else "")
        if "compile_error" in row:
            remark = f"not compiled: {row['compile_error'].splitlines()[-1][:200]}"
        rows.append([*(cell(row.get(column)) for column in columns), remark])
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The results as tables for people."""
    settings = results["settings"]
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    window = preset(settings["preset"]).windows
    lines = [environment, "", f"Preset {settings['preset']}, dma's window {window}, gates {settings['gates']}.", ""]
    lines += [f"- {note}" for note in results["notes"]]
    for part, (title, columns) in TABLES.items():
        if not results[part]:
            continue
        lines += ["", f"## {title}", ""]
        header = [*columns, "remark"]
        for cells in (header, ["---"] * len(header), *table_rows(results, part)):
            lines.append("| " + " | ".join(cells) + " |")
    if results["not_measured"]:
        lines += ["", f"Not measured within {settings['budget_seconds']:g} s:", ""]
        lines += ["- " + ", ".join(str(value) for value in row.values()) for row in results["not_measured"]]
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], folder: Path) -> None:
    """model.json and model.md in `folder`, each replaced whole, so that a killed run leaves its last results."""
    write_rendered(results, folder / "model.json", folder / "model.md", markdown)


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """training.png (tokens/s against length) and generation.png (tokens/s against context), where there are rows."""
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {"training": {}, "generation": {}}
    for row in results["training"]:
        if "tokens_per_s" in row:
            curves["training"].setdefault(row["attention"], []).append((row["N"], row["tokens_per_s"]))
    for row in results["generation"]:
        if "tokens_per_s" in row:
            label = f"{row['attention']}, {row['cache']} cache, batch {row['batch']}"
            curves["generation"].setdefault(label, []).append((row["context"], row["tokens_per_s"]))
    written = []
    for part, axis in (("training", "tokens per sequence"), ("generation", "tokens of context")):
        if not curves[part]:
            continue
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for label, points in curves[part].items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.set_xscale("log", base=2)
        if part == "generation":
            axes.set_yscale("log")
        axes.set(xlabel=axis, ylabel="tokens/s", title=f"{results['settings']['preset']}, {part}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        path = folder / f"{part}.png"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
