"""Fit the constants of `dynamask plan` to measured training steps, and write them where the command reads them.

    python lab/scripts/fit_plan.py lab/results/h100-model/model.json     # writes dynamask/training/measured.json

The steps are those of `dynamask benchmark model` on one GPU: compiled layers, every layer recomputed, no ranks that
learn. Four constants: the shares of the GPU's peak that matrix products, interval attention and dense attention reach,
and the seconds that every step takes besides. The largest relative error over the steps goes into the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dynamask.models import preset
from dynamask.training.plan import MEASURED, PEAK_FLOPS, Work, work_of

RESIDUAL_BYTES = 4
"""Of each number that a recomputed layer keeps: autocast leaves the residual stream in float32."""


def fit(file: Path) -> dict[str, object]:
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
        },
        "seconds_per_step": constants[3],
        "working_bytes_per_token_and_width": bytes_per_token[0] / config.hidden_size,
        "largest_error": float(np.abs(errors).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    constants = fit(arguments.results)
    MEASURED.write_text(json.dumps(constants, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(constants, indent=1))


if __name__ == "__main__":
    main()
