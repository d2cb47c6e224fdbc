"""Check and time variants of the mask on a GPU: runs and chunks of expiry, lists by runs and by scans.

    PYTHONPATH=.:lab python lab/scripts/kernel_variants.py --out variants.json
    PYTHONPATH=.:lab python lab/scripts/kernel_variants.py --check 60

With --check: fresh random inputs, memory poisoned before, the tuning that is in use against the morning's and the
tensor operations, for so many seconds. Times are those of a CUDA graph's replays; a variant that gives another mask
is named WRONG. With --prepare K/N every N-th variant is compiled, from the K-th on (K from 0), and nothing timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamask import key_expiry
from dynamask.ops.triton.lists import KeyLists, build_lists
from dynamask_lab.benchmarks.gpu.constants import constants
from dynamask_lab.benchmarks.gpu.timing import graph_milliseconds, kernel_microseconds

ONCE: dict[str, Any] = {
    "triton.expiry._RUNS": ((1 << 15, 1024, 4), (1 << 22, 2048, 8)),
    "triton.expiry._FILTERED_RUNS": ((1 << 22, 1024, 4),),
    "triton.expiry._FILTERED_CHUNKS": ((1 << 15, 256, 4), (1 << 17, 256, 4), (1 << 22, 512, 4)),
}
"""The runs and chunks of the morning."""

RUNS: dict[str, Any] = {"triton.lists.SCAN": 0}


def _runs(run: int, warps: int) -> dict[str, Any]:
    """Sort runs of so many keys by so many warps."""
    table = ((1 << 22, run, warps),)
    return {"triton.expiry._RUNS": table, "triton.expiry._FILTERED_RUNS": table}


def _chunks(chunk: int, warps: int) -> dict[str, Any]:
    """Resolve chunks of so many positions of filtered rows by so many warps."""
    return {"triton.expiry._FILTERED_CHUNKS": ((1 << 22, chunk, warps),)}


EXPIRY: dict[str, dict[str, Any]] = {
    "morning": ONCE,
    "default": {},
    "runs 512, 4 warps": _runs(512, 4),
    "runs 256, 2 warps": _runs(256, 2),
    "chunks 128": _chunks(128, 2),
    "chunks 128, 4 warps": _chunks(128, 4),
    "chunks 256": _chunks(256, 4),
}
LISTS: dict[str, dict[str, Any]] = {"runs": RUNS, "default": {}}


def poison() -> None:
    """Fill what the allocator hands out next."""
    blocks = [torch.full((1 << size,), -(1 << 30), dtype=torch.int32, device="cuda") for size in (24, 22, 20, 16, 12)]
    del blocks


def scores_of(kind: str, groups: int, length: int) -> Tensor:
    scores = torch.randn(1, groups, length, device="cuda")
    if kind == "ties":
        return (scores * 2).round()
    if kind == "equal":
        return torch.zeros_like(scores)
    if kind in ("rising", "falling"):
        return scores + torch.arange(length, device="cuda") * (0.002 if kind == "rising" else -0.002)
    if kind == "odd":
        scores[torch.rand_like(scores) < 0.3] = float("nan")
        scores[torch.rand_like(scores) < 0.1] = float("inf")
        scores[torch.rand_like(scores) < 0.1] = float("-inf")
    return scores


def as_sets(lists: KeyLists, rows: int) -> list[Tensor]:
    """Each list's keys in order, whatever their order was."""
    found = []
    for row in range(rows):
        for block in range(lists.blocks):
            entries = lists.of(row, block)
            whole, partial = int(lists.whole[row, block]), int(lists.partial[row, block])
            found.append(torch.cat([entries[:whole], entries[len(entries) - partial :]]).sort().values)
    return found


def check(seconds: float) -> tuple[int, list[str]]:
    """Random problems until the time is up: how many, and those with wrong results."""
    wrong, count = [], 0
    began = time.perf_counter()
    torch.manual_seed(time.time_ns() % (1 << 31))
    while time.perf_counter() - began < seconds:
        pick = [int(number) for number in torch.randint(0, 1 << 20, (8,))]
        kind = ("random", "ties", "rising", "falling", "odd", "equal")[pick[0] % 6]
        length = 8192 + pick[1] % 12000 if pick[2] % 3 else (8192, 32768, 3072, 131072)[pick[1] % 4]
        groups = 2
        sinks, local = pick[3] % 5, (0, 1, 128, 700)[pick[4] % 4]
        windows = [1 + number % 2048 + local + sinks for number in pick[5:7]]
        windows[1] = (windows[1], length, windows[0], local + sinks or 1)[pick[7] % 4]
        mask = torch.rand(1, length, device="cuda") < 0.8 if pick[2] % 5 == 0 else None
        facts: dict[str, Any] = {"local": local, "sinks": sinks, "key_mask": mask}
        scores = scores_of(kind, groups, length)
        with constants(ONCE):
            wanted = key_expiry(scores, windows, **facts)
        poison()
        found = key_expiry(scores, windows, **facts)
        name = f"{kind} N {length} windows {windows} {local} {sinks} mask {mask is not None}"
        if not torch.equal(found, wanted):
            wrong.append(f"expiry {name}: {int((found != wanted).sum())} keys")
        if count % 4 == 0 and length < 20000:
            cpu = {**facts, "key_mask": None if mask is None else mask.cpu()}
            if not torch.equal(found.cpu(), key_expiry(scores.cpu(), windows, **cpu)):
                wrong.append(f"definition {name}")
        if count % 8 == 0 and length < 20000:
            queries, block = int(torch.randint(1, length + 1, ()).item()), (48, 192, 16)[count // 8 % 3]
            limits = [window + sinks for window in windows]
            with constants(RUNS):
                right = build_lists(wanted, queries, block, limits)
            poison()
            ours = build_lists(wanted, queries, block, limits)
            if not all(torch.equal(a, b) for a, b in zip(as_sets(ours, 2), as_sets(right, 2), strict=True)):
                wrong.append(f"lists {name} queries {queries} block {block}")
        count += 1
    return count, wrong


CASES = (
    (32768, 4, 512, "random"),
    (32768, 16, 512, "random"),
    (8192, 4, 512, "random"),
    (131072, 4, 512, "random"),
    (32768, 4, 2048, "random"),
    (32768, 4, 512, "rising"),
    (32768, 16, 2048, "random"),
    (131072, 16, 512, "random"),
    (3072, 4, 1024, "random"),
    (6144, 4, 2048, "random"),
    (8192, 16, 512, "random"),
    (8192, 4, 2048, "random"),
    (131072, 4, 2048, "random"),
    (16384, 4, 1024, "random"),
)
"""Keys, key/value heads, window and kind of scores."""

PROFILED = ("default",)
"""Variants of which the times of each kernel are kept."""


def measure(length: int, groups: int, window: int, kind: str, only_once: Sequence[str] = ()) -> dict[str, Any]:
    """Microseconds of every variant at one shape, or one run of those named."""
    torch.manual_seed(0)
    scores = scores_of(kind, groups, length)
    row: dict[str, Any] = {"name": f"{kind} g{groups} w {window} N {length}"}
    with constants(ONCE):
        wanted = key_expiry(scores, window)
    limits, block = [window] * groups, 192 // max(1, 16 // groups)
    runs: list[tuple[str, dict[str, dict[str, Any]], Any]] = [("expiry", EXPIRY, lambda: key_expiry(scores, window))]
    if kind == "random":
        runs.append(("lists", LISTS, lambda: build_lists(wanted, length, block, limits)))
    for prefix, variants, run in runs:
        for name, values in variants.items():
            if only_once and name not in only_once:
                continue
            try:
                with constants(values):
                    if prefix == "expiry" and not torch.equal(run(), wanted):
                        row[f"{prefix} {name} WRONG"] = True
                    run()
                    if not only_once:
                        row[f"{prefix} {name}"] = round(1000 * graph_milliseconds(run), 1)
                    if name in PROFILED and not only_once:
                        row[f"{prefix} {name}, kernels"] = kernel_microseconds(run)
            except Exception as error:
                row[f"{prefix} {name}"] = f"{type(error).__name__}: {error}"[:200]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", type=float, default=0.0, help="check for so many seconds, and time nothing")
    parser.add_argument("--prepare", metavar="K/N")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no case after this long")
    arguments = parser.parse_args()
    if arguments.check:
        count, wrong = check(arguments.check)
        print(f"{count} masks, wrong: {wrong[:10] or 'none'}", flush=True)
        return
    part, parts = (int(number) for number in (arguments.prepare or "0/1").split("/"))
    chosen = [*EXPIRY, *LISTS][part::parts] if arguments.prepare else ()
    began = time.perf_counter()
    rows = []
    for length, groups, window, kind in CASES:
        if time.perf_counter() - began > arguments.seconds:
            continue
        rows.append(measure(length, groups, window, kind, chosen))
        print(" | ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}))


if __name__ == "__main__":
    main()
