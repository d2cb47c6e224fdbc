"""Time a converted model's decoding step under other sizes of its kernels, one change at a time, the better one kept.

    PYTHONPATH=.:lab python lab/scripts/decode_sweep_gpu.py --out OUT [--seconds 60] [--batch 32]

The step of SmolLM2-135M's shape from a cache of 2048 keys a head in the mean, as a CUDA graph: milliseconds on the
device. Logits of every variant are compared with those of the first. `OUT/decode-sweep.jsonl` gets a line for each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from decode_gpu import DEVICE, GPU, SHAPES, free, models, seconds_of
from torch import Tensor
from transformers.utils import logging

from dynamask.models import cuda_graph
from dynamask_lab.benchmarks.model import filled_cache

DECODE, STEP = "ragged_decode", "decode_step"
CHANGES: list[dict[str, Any]] = [
    {f"{STEP}._CHUNK": 64},
    {f"{STEP}._CHUNK": 256, f"{STEP}._STAGES": 2},
    {f"{STEP}._WARPS": 8},
    {f"{STEP}._STAGES": 2},
    {f"{STEP}._STAGES": 6},
    {f"{STEP}._WARPS": 2},
    {f"{DECODE}._STAGES": 3},
    {f"{DECODE}._PROGRAMS": 396},
    {f"{DECODE}._PROGRAMS": 792},
    {f"{STEP}._SCANNED": 2048},
    {f"{STEP}._ROWS": 32},
    {f"{DECODE}._SLOTS": 128, f"{DECODE}._LEAST": 128},
    {f"{DECODE}._WARPS": 8},
]
_MOST_ERROR = 0.05
"""Largest relative difference of a variant's logits. Sums in another order, of 30 layers of random weights over random
keys in bfloat16, differ by 3%."""


def put(settings: dict[str, Any]) -> dict[str, Any]:
    """Set constants of the kernels' modules; return those before."""
    before = {}
    for name, value in settings.items():
        module, field = name.split(".")
        place = importlib.import_module(f"dynamask.ops.triton.{module}")
        before[name] = getattr(place, field)
        setattr(place, field, value)
    for module, function in ((DECODE, "_starts"), (STEP, "_parts")):
        getattr(importlib.import_module(f"dynamask.ops.triton.{module}"), function).cache_clear()
    return before


@torch.no_grad()
def timed(model: Any, batch: int, context: int, repeats: int) -> tuple[Tensor, float]:
    """Logits of a fixed token after a fixed past, and milliseconds of a step on the device."""
    torch.manual_seed(0)
    held = filled_cache(model.config, "bounded", context, batch, 0)
    token = torch.arange(batch, device=DEVICE)[:, None] % model.config.vocab_size
    logits = model(token, past_key_values=held, use_cache=True).logits
    for _ in range(4):
        model(token, past_key_values=held, use_cache=True)
    if not GPU:
        return logits, 0.0
    graph = cuda_graph._GRAPHS[held].graph

    def replay() -> None:
        for _ in range(repeats):
            graph.replay()

    taken = seconds_of(replay, 5)
    return logits, 1e3 * taken / repeats


def main() -> int:
    """Time what fits into the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=60.0, help="begin nothing after this long")
    parser.add_argument("--model", default="smollm2-135m" if GPU else "tiny")
    parser.add_argument("--batch", type=int, default=32 if GPU else 2)
    parser.add_argument("--context", type=int, default=32768 if GPU else 300)
    parser.add_argument("--one-layer", action="store_true", help="to fill the compilers' caches")
    arguments = parser.parse_args()
    if arguments.one_layer:
        SHAPES[arguments.model] = SHAPES[arguments.model]._replace(layers=1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    began = time.perf_counter()
    _, model = models(arguments.model, arguments.context // 16, arguments.context)
    expected, best = timed(model, arguments.batch, arguments.context, 16)
    rows: list[dict[str, Any]] = [{"changed": {}, "ms": best}]

    def write(row: dict[str, Any]) -> None:
        row |= {"model": arguments.model, "B": arguments.batch, "seconds": time.perf_counter() - began}
        with (arguments.out / "decode-sweep.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    write(rows[0])
    for change in CHANGES:
        if time.perf_counter() - began > arguments.seconds:
            break
        before = put(change)
        row: dict[str, Any] = {"changed": change}
        try:
            logits, taken = timed(model, arguments.batch, arguments.context, 16)
            error = float((logits.float() - expected.float()).norm() / expected.float().norm())
            row |= {"ms": taken, "error": error, "kept": error < _MOST_ERROR and taken < best}
        except Exception as error:
            row |= {"error": f"{type(error).__name__}: {error}"[:200], "kept": False}
        write(row)
        if row["kept"]:
            best = row["ms"]
        else:
            put(before)
        free()
    return 0


if __name__ == "__main__":
    sys.exit(main())
