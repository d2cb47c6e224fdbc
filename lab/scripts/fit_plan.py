"""Fit the constants of `dynamask plan` to measured training steps, and write them where the command reads them.

    python lab/scripts/fit_plan.py lab/results/h100-model/model.json --scale lab/results/scale/h200-context-parallel-2.jsonl lab/results/scale/h200-fsdp2.jsonl

It writes dynamask/training/measured.json. The steps of the first file are those of `dynamask benchmark model` on one
GPU: compiled layers, every layer recomputed, no ranks that learn. Four constants: the shares of the GPU's peak that
matrix products, interval attention and dense attention reach, and the seconds that every step takes besides. Of the
files of `context_parallel_gpu.py`, in which layers are not compiled, the first gives three more: the share of what
ranks learn from (its longest step), the seconds that a layer's launches take at least (its shortest), and bytes of
buffers per parameter. All other steps of these files are checks: their errors and the largest of all go into the file.
Steps that the launches bound are no check where the host was busy, as it was in the second file: they are left out and
counted.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from dynamask.models import preset
from dynamask.training.plan import MEASURED, PEAK_FLOPS, Plan, Work, plan, work_of

RESIDUAL_BYTES = 4
"""Of each number that a recomputed layer keeps: autocast leaves the residual stream in float32."""


def fit(file: Path) -> dict[str, Any]:
    """Fit the constants to the steps of one file of results."""
    found = json.loads(file.read_text(encoding="utf-8"))
    steps = found["training"]
    rows, seconds, bytes_per_token = [], [], []
    for step in steps:
        attention = "mha" if step["attention"].startswith("mha") else "dma"
        config = preset(step["preset"], attention=attention, max_position_embeddings=step["N"])
        if step["window"]:
            config = preset(step["preset"], windows=step["window"], max_position_embeddings=step["N"])
        work: Work = work_of(config, step["N"], sequences=1, recompute=True, learns=False)
        rows.append([work.products / PEAK_FLOPS, work.interval / PEAK_FLOPS, work.dense / PEAK_FLOPS, 1.0])
        seconds.append(step["step_s"])
    table, times = np.array(rows), np.array(seconds)
    constants = np.linalg.lstsq(table / times[:, None], np.ones(len(times)), rcond=None)[0]
    errors = table @ constants / times - 1
    # Peak memory of the two longest steps: what each further token takes, beyond the inputs of all layers.
    longest = sorted((s for s in steps if s["attention"] == "dma"), key=lambda s: s["N"])[-2:]
    more = (longest[1]["peak_gib"] - longest[0]["peak_gib"]) * 2**30 / (longest[1]["N"] - longest[0]["N"])
    config = preset(longest[0]["preset"])
    bytes_per_token.append(more - config.num_hidden_layers * config.hidden_size * RESIDUAL_BYTES)
    return {
        "source": str(file),
        "device": found["environment"]["device"],
        "commit": found["environment"]["commit"],
        "steps": len(steps),
        "share_of_peak": {
            "products": 1 / constants[0],
            "interval_attention": 1 / constants[1],
            "dense_attention": 1 / constants[2],
            "learning": 1.0,
        },
        "seconds_per_step": constants[3],
        "working_bytes_per_token_and_width": bytes_per_token[0] / config.hidden_size,
        "largest_error": float(np.abs(errors).max()),
    }


def fit_scale(constants: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    """Fit what the steps of one and two GPUs tell, and check the model against the others of them."""
    tables = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    steps = [[row for row in table if row["kind"] == "training_step"] for table in tables]
    first = [row for row in steps[0] if row["sharded_over"] == 1]
    longest = max(first, key=lambda row: row["context"])
    shortest = min(first, key=lambda row: row["context"] * row["batch"])
    shares = constants["share_of_peak"]
    work = _work(longest)
    rest = longest["step"]["ms"] / 1e3 - constants["seconds_per_step"]
    rest -= (work.products / shares["products"] + work.interval / shares["interval_attention"]) / PEAK_FLOPS
    shares["learning"] = work.learning / PEAK_FLOPS / rest
    layers = preset(shortest["preset"]).num_hidden_layers
    constants |= {
        "launch_seconds_per_layer": shortest["step"]["ms"] / 1e3 / layers,
        "buffer_bytes_per_parameter": 0.0,
        "checked": [],
        "checked_device": longest["device"],
        "checked_sources": [str(file) for file in files],
    }
    MEASURED.write_text(json.dumps(constants, indent=1) + "\n", encoding="utf-8")
    rows = [row for table in steps for row in table]
    missing = [row["peak_bytes"] - _planned(row).memory["peak"] for row in rows]
    constants["buffer_bytes_per_parameter"] = (max(missing) + min(missing)) / 2 / rows[0]["parameters"]
    MEASURED.write_text(json.dumps(constants, indent=1) + "\n", encoding="utf-8")
    busy = 0
    for row in rows:
        if row is longest or row is shortest:
            continue
        found = _planned(row)
        if row["context"] * row["batch"] == shortest["context"] * shortest["batch"]:
            busy += 1
            continue
        error = found.step_seconds / (row["step"]["ms"] / 1e3) - 1
        names = ("sharded_over", "context", "batch", "reduce", "prefetch")
        memory = found.memory["peak"] / row["peak_bytes"] - 1
        checked = {name: row[name] for name in names} | {"measured_ms": row["step"]["ms"]}
        constants["checked"].append(checked | {"error": round(error, 4), "memory_error": round(memory, 4)})
    errors = [abs(row["error"]) for row in constants["checked"]]
    constants["left_out_busy_host"] = busy
    constants["largest_error"] = max(constants["largest_error"], *errors)
    constants["largest_memory_error"] = max(abs(row["memory_error"]) for row in constants["checked"])
    return constants


def _work(row: dict[str, Any]) -> Work:
    config = preset(row["preset"], max_position_embeddings=row["context"])
    return work_of(config, row["context"], sequences=row["batch"], recompute=True, learns=True)


def _planned(row: dict[str, Any]) -> Plan:
    config = preset(row["preset"], max_position_embeddings=row["context"])
    shape = {"context": row["context"], "sequences": row["batch"], "gpus": row["sharded_over"]}
    return plan(config, tokens=1e9, compiled=False, **shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--scale", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    constants = fit_scale(fit(arguments.results), arguments.scale)
    MEASURED.write_text(json.dumps(constants, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(constants, indent=1))


if __name__ == "__main__":
    main()
