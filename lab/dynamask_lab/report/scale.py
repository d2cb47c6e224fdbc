"""What `lab/scripts/context_parallel_gpu.py` and `million_tokens_gpu.py` measured, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamask.models.presets import PRESETS, preset
from dynamask.training.plan import plan
from dynamask_lab.sweeps.section import Exhibit, Row, Section

PATTERN = "scale/*.jsonl"
Rows = Mapping[str, Mapping[str, Any]]


def scale_section(lines: Sequence[Any], folder: Path) -> tuple[Section, dict[str, Any], str]:
    """One file of measurements. See `dynamask_lab.report.benchmarks.Benchmark.section`."""
    keyed = {f"line[{number}]": line for number, line in enumerate(lines)}

    def of(*kinds: str) -> dict[str, Any]:
        return {key: line for key, line in keyed.items() if line["kind"] in kinds}

    exhibits = []
    for name, title, text, rows, table in (
        (
            "exact",
            "A split sequence against the whole one",
            "Relative error of outputs and gradients, each against the whole sequence on one GPU.",
            of("context_parallel_exact"),
            _exact,
        ),
        (
            "attention",
            "One layer of a split sequence",
            "Forward and backward. One GPU computes the same attention of the whole sequence; ring attention is "
            "torch's own, dense. Megabytes are those that a GPU sends in the forward pass; ring attention's are of the "
            "key/value heads as they are, though torch repeats them for the query heads first.",
            of("context_parallel_attention", "ring_attention"),
            _attention,
        ),
        (
            "training",
            "Training steps of a whole model",
            "Layers are not compiled, and ranks learn. The share is that of the median speeds in one run, both GPUs "
            "busy in both cases.",
            of("training_step", "split_model_step", "training_scaling"),
            _training,
        ),
        ("prefill", "One long text in chunks", "", of("prefill", "decode"), _prefill),
        (
            "needles",
            "What a converted model still finds",
            "Share of needles found, by their distance from the end of the text.",
            of("needles"),
            _needles,
        ),
    ):
        if rows:
            exhibits.append(Exhibit(name, title, list(rows), text, table(rows)))
    devices = ", ".join(dict.fromkeys(f"{line.get('gpus', 1)} x {line['device']}" for line in lines))
    return Section("", exhibits), keyed, devices


def _exact(rows: Rows) -> list[Row]:
    return [
        {
            "tokens": f"{row['length']:,}",
            "windows": _windows(row["windows"]),
            "packed": "yes" if row["packed"] else "",
            "dtype": row["dtype"],
            **{name: f"{row[name]:.0e}" for name in ("output", "dq", "dk", "dv")},
        }
        for row in rows.values()
    ]


def _windows(windows: Sequence[int]) -> str:
    return str(windows[0]) if len(set(windows)) == 1 else f"{min(windows)} to {max(windows)}"


def _attention(rows: Rows) -> list[Row]:
    rings = {row["length"]: row for row in rows.values() if row["kind"] == "ring_attention"}
    table: list[Row] = []
    for row in rows.values():
        if row["kind"] == "ring_attention":
            continue
        cells: dict[str, str] = {
            "tokens": f"{row['length']:,}",
            "windows": row["windows"],
            "layers in a row": str(row.get("layers_in_a_row", 1)),
            "one GPU, ms": f"{row['one_gpu']['ms']:.1f}",
            "split, ms": f"{row['split']['ms']:.1f}",
            "x": f"{row['speedup']:.2f}",
            "MB sent": f"{row['bytes_forward'] / 1e6:.1f}",
        }
        if (ring := rings.get(row["length"])) is not None:
            sent = ring["bytes_forward_without_repeated_heads"]
            cells |= {
                "ring, ms": f"{ring['split']['ms']:.1f}",
                "ring, MB sent": f"{sent / 1e6:.1f}",
                "% of ring's": f"{100 * row['bytes_forward'] / sent:.1f}",
                "both passes, %": f"{100 * _both(row, '') / _both(ring, '_without_repeated_heads'):.1f}",
            }
        table.append(cells)
    return table


def _both(row: Mapping[str, Any], of: str) -> float:
    return float(row[f"bytes_forward{of}"] + row[f"bytes_backward{of}"])


def _planned(row: Mapping[str, Any]) -> str:
    """Milliseconds that `dynamask plan` gives the step; "" where layers are not recomputed: it was fitted to those."""
    if not row.get("recomputes_layers") or row["kind"] != "training_step" or row["preset"] not in PRESETS:
        return ""
    config = preset(row["preset"], max_position_embeddings=row["context"])
    shape = {"context": row["context"], "sequences": row["batch"]}
    planned = plan(config, gpus=row["sharded_over"], tokens=1e9, compiled=False, **shape).step_seconds
    return f"{1e3 * planned:.0f} ({1e5 * planned / row['step']['ms'] - 100:+.0f}%)"


def _training(rows: Rows) -> list[Row]:
    table: list[Row] = []
    for row in rows.values():
        if row["kind"] == "training_scaling":
            share = f"{row['share_of_one_gpu']:.2f} of one GPU's"
            cells = {"what": "FSDP2 over all", "tokens/s and GPU": share}
            if "context" in row:
                cells |= {"tokens of a sequence": f"{row['context']:,}", "sequences of a GPU": str(row["batch"])}
                cells |= {"reduced in": row["reduce"], "gathers ahead": "yes" if row["prefetch"] else ""}
            table.append(cells)
            continue
        split = row["kind"] == "split_model_step"
        over = row["gpus"] if split else row["sharded_over"]
        table.append(
            {
                "what": "one sequence over all GPUs, FSDP2" if split else f"FSDP2 over {over}",
                "tokens of a sequence": f"{row['context']:,}",
                "step, ms": f"{row['step']['ms']:.0f}",
                "sequences of a GPU": str(row.get("batch", "")),
                "planned, ms": _planned(row),
                "least to most": f"{row['step']['ms_least']:.0f} to {row['step']['ms_most']:.0f}",
                "tokens/s and GPU": f"{row['tokens_per_second_and_gpu']:,.0f}",
                "peak, GB": f"{row['peak_bytes'] / 1e9:.1f}",
                "layers recomputed": "yes" if row.get("recomputes_layers") else "",
                "reduced in": row.get("reduce", ""),
                "gathers ahead": "yes" if row.get("prefetch") else "",
            }
        )
    return table


def _prefill(rows: Rows) -> list[Row]:
    decode = {(_model(row), row["tokens"]): row for row in rows.values() if row["kind"] == "decode"}
    return [
        {
            "model": _model(row),
            "weights": row.get("weights", "random"),
            "tokens": f"{row['tokens']:,}",
            "seconds": f"{row['seconds']:.1f}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "tokens/s since the line before": f"{row['tokens_per_second_since_last']:,.0f}",
            "cache, MB": f"{row['cache_bytes'] / 1e6:.1f}",
            "peak, GB": f"{row['peak_bytes'] / 1e9:.2f}",
            "decoding, ms a token": f"{decode[_model(row), row['tokens']]['ms_per_token']:.1f}"
            if (_model(row), row["tokens"]) in decode
            else "",
        }
        for row in rows.values()
        if row["kind"] == "prefill"
    ]


def _model(row: Mapping[str, Any]) -> str:
    return str(row.get("model") or row.get("preset") or "1.7b")


def _needles(rows: Rows) -> list[Row]:
    return [
        {
            "tokens": f"{row['tokens']:,}",
            "rotary angles": row.get("rotary_scaling", "none").replace("none", "as trained"),
            "texts": str(row["texts"]),
            "cache of a text, MB": f"{row['cache_bytes_per_text'] / 1e6:.1f}",
            **{f"{int(d):,}": f"{share:.2f}" for d, share in row["found_by_distance_from_the_end"].items()},
        }
        for row in rows.values()
    ]
