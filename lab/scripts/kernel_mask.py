"""Times of the mask's kernels one by one on a GPU: expiry with and without its filter, and the lists.

    PYTHONPATH=.:lab python lab/scripts/kernel_mask.py --out mask.json

Every variant's expiry is compared with that of the unfiltered kernels, and with the tensor operations on short rows,
before it is timed. Totals are those of a CUDA graph's replays; times of single kernels are the profiler's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamask import key_expiry
from dynamask.ops.triton.lists import build_lists
from dynamask_lab.benchmarks.gpu.constants import constants
from dynamask_lab.benchmarks.gpu.timing import graph_milliseconds, kernel_microseconds

OFF: dict[str, Any] = {"triton.expiry._FILTER": (1 << 30, 1)}
VARIANTS: dict[str, dict[str, Any]] = {
    "off": OFF,
    "default": {},
    "on": {"triton.expiry._FILTER": (1 << 13, 3)},
    "on, short floors": {"triton.expiry._FILTER": (1 << 13, 3), "triton.expiry._FLOORS": (1024, 4096)},
    "on, programs 1024": {"triton.expiry._FILTER": (1 << 13, 3), "triton.expiry._PROGRAMS": 1024},
}

LENGTHS = (32768, 131072, 8192, 1 << 20)
CASES = (
    (4, 512, "random"),
    (16, 512, "random"),
    (4, 2048, "random"),
    (16, 2048, "random"),
    (4, 512, "rising"),
)
"""Key/value heads, window, kind of scores."""

LISTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("lists", 0, {}),
    ("lists direct", 1 << 20, {}),
    ("lists direct, 4 warps", 1 << 20, {"triton.lists._DIRECT_WARPS": 4}),
    ("lists direct, step 512, 4 warps", 1 << 20, {"triton.lists._DIRECT_STEP": 512, "triton.lists._DIRECT_WARPS": 4}),
    ("lists direct, 1 warp", 1 << 20, {"triton.lists._DIRECT_WARPS": 1}),
)
"""Name, keys up to which lists are direct, other constants."""


def scores_of(kind: str, groups: int, length: int) -> Tensor:
    """Random scores, or scores that rise with the position as those of a head with a slope do."""
    scores = torch.randn(1, groups, length, device="cuda")
    return scores if kind == "random" else scores + torch.arange(length, device="cuda") * (4.0 / 2048)


def measure(length: int, groups: int, window: int, kind: str, only_once: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    variants = list(VARIANTS) if length in (32768, 131072) and kind == "random" else ["off", "default", "on"]
    scores = scores_of(kind, groups, length)
    row: dict[str, Any] = {"name": f"{kind} g{groups} w {window} N {length}"}
    with constants(OFF):
        expected = key_expiry(scores, window)
    block = 192 // max(1, 16 // groups)
    for name in variants:
        with constants(VARIANTS[name]):
            good = torch.equal(key_expiry(scores, window), expected)
            if not good:
                row[f"{name} WRONG"] = True
            if not only_once:
                row[name] = round(1000 * graph_milliseconds(lambda: key_expiry(scores, window)), 1)
                row[f"{name}, kernels"] = kernel_microseconds(lambda: key_expiry(scores, window))
    limits = [window] * groups
    for name, direct, others in LISTS:
        if direct and length > 1 << 17:
            continue
        with constants({"triton.lists.DIRECT": direct, "triton.lists.SCAN": 0, **others}):
            build_lists(expected, length, block, limits)
            if only_once or kind != "random":
                continue
            row[name] = round(1000 * graph_milliseconds(lambda: build_lists(expected, length, block, limits)), 1)
            row[f"{name}, kernels"] = kernel_microseconds(lambda: build_lists(expected, length, block, limits))
    return row


def checked() -> list[str]:
    """Compare the kernels with the tensor operations, with padding, sinks, local keys and windows per head."""
    wrong = []
    for length, windows, local, sinks in ((20000, (300, 700), 40, 4), (70000, (1000, 80000), 0, 0)):
        generator = torch.Generator().manual_seed(length)
        for kind in ("random", "ties", "rising"):
            scores = torch.randn(1, 2, length, generator=generator)
            if kind == "ties":
                scores = (scores * 2).round()
            if kind == "rising":
                scores += torch.arange(length) / 500
            for mask in (None, torch.rand(1, length, generator=generator) < 0.9):
                facts: dict[str, Any] = {"local": local, "sinks": sinks}
                wanted = key_expiry(scores, windows, **facts, key_mask=mask)
                with constants(VARIANTS["on"]):
                    on_device = None if mask is None else mask.cuda()
                    found = key_expiry(scores.cuda(), windows, **facts, key_mask=on_device)
                if not torch.equal(found.cpu(), wanted):
                    wrong.append(f"{length} {kind} mask {mask is not None}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prepare", action="store_true", help="compile and check, and time nothing")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no case after this long")
    arguments = parser.parse_args()
    began = time.perf_counter()
    if arguments.prepare:
        print("wrong:", checked() or "none", flush=True)
        for length in LENGTHS:
            for window in (512, 2048):
                print(measure(length, 4, window, "random", only_once=True), flush=True)
        return
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        for groups, window, kind in CASES:
            if time.perf_counter() - began > arguments.seconds:
                continue
            try:
                row = measure(length, groups, window, kind, only_once=False)
            except Exception as error:
                row = {"name": f"{length} {groups} {window}", "error": f"{type(error).__name__}: {error}"[:400]}
            rows.append(row)
            print(" | ".join(f"{k} {v}" for k, v in row.items() if "kernels" not in k), flush=True)
            if arguments.out:
                device = torch.cuda.get_device_name()
                arguments.out.write_text(json.dumps({"device": device, "rows": rows}))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
