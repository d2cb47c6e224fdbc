"""Run cells of the exhibits once more, from the settings of their raw lines, where only dynamask's sources are.

    python lab/scripts/again_gpu.py --out again.jsonl --seconds 400 lab/results/mqar-quick.jsonl:a2f9c4570d5678c2

A cell is a file of raw lines and the start of a key. Runs share the GPU, so their times do not compare. Corpora that a
cell reads and the machine lacks are made: `local`, of its sources and of the tables in `--more`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from local_corpus import build
from sweep_gpu import Shown

from dynamask_lab.studies import get_experiment, run_sweep

CELLS = {
    "chosen": "lab/results/mqar-quick.jsonl:a2f9c4570d5678c2",
    "newest": "lab/results/mqar-quick.jsonl:80ec91b9c2a8de72",
    "needle": "lab/results/needle-seeds.jsonl:799b4cfa1fd2ef18",
    "leak": "lab/results/ablation-leak.jsonl:d6dcdd1cfc1fadf8",
    "loss": "lab/results/scratch.jsonl:e535b2238b4f2ef5",
}
"""Of recall (chosen keys and newest keys), needles (dense attention), loss by window (the paper's form, 1M parameters),
and loss by window and by step (newest keys, 4M)."""


def line_of(cell: str) -> dict[str, Any]:
    """The raw line of a cell.

    Raises:
        SystemExit: no such line.
    """
    file, _, start = cell.rpartition(":")
    with open(file, encoding="utf-8") as lines:
        found = [line for line in map(json.loads, lines) if line["key"].startswith(start)]
    if not found:
        raise SystemExit(f"{file} has no line whose key starts with {start!r}")
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=[*CELLS], help=f"FILE:KEY, or {', '.join(CELLS)}")
    parser.add_argument("--out", type=Path, required=True, help="results file, appended to")
    parser.add_argument("--seconds", type=float, required=True, help="stop after so long")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="tables of documents, .jsonl.xz")
    parser.add_argument("--characters", type=float, default=300e6, help="of the corpus, at most")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    lines = [line_of(CELLS.get(cell, cell)) for cell in arguments.cells]
    # Those without a corpus first: it takes as long to make as they run.
    for name in dict.fromkeys(sorted((line["experiment"] for line in lines), key="scratch".__eq__)):
        configs = [line["config"] for line in lines if line["experiment"] == name]
        corpora = Path(os.environ.get("DYNAMASK_CORPORA", "corpora"))
        if any(config.get("corpus") == "local" for config in configs) and not (corpora / "local/index.json").exists():
            build(corpora, more=arguments.more, characters=arguments.characters, processes=16)
        left = deadline - time.monotonic()
        experiment = get_experiment(name)
        run_sweep(experiment, configs, arguments.out, left, workers=max(2, min(arguments.workers, 8)), observer=Shown())
    for old in lines:
        known = [json.loads(line) for line in arguments.out.read_text().splitlines()]
        for new in (line for line in known if line["key"] == old["key"]):
            print(old["experiment"], old["key"], *(_figure(line["result"]) for line in (old, new)), flush=True)


def _figure(result: dict[str, Any]) -> Any:
    return next(result[name] for name in ("accuracy", "exact", "test", "loss") if result.get(name) is not None)


if __name__ == "__main__":
    main()
