"""Run the sweep `tiny` of the study `scratch` on a machine without a registry, the forms that decide most first.

    python lab/scripts/scratch_gpu.py --corpora CORPORA --state STATE --out scratch-tiny.jsonl --seconds 300

The corpus is made of the Python sources of that machine where it is missing. Runs share the GPU, so their times do not
compare. The same command continues what the time did not suffice for.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from local_corpus import build

FIRST = ("dense", "paper, w = N", "sliding + sinks", "learned, head windows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--state", type=Path, required=True, help="folder of unfinished runs")
    parser.add_argument("--out", type=Path, required=True, help="results file, appended to")
    parser.add_argument("--seconds", type=float, required=True, help="stop after so long")
    parser.add_argument("--workers", type=int, default=12, help="runs at a time")
    parser.add_argument("--size", default="tiny", help="which sweep")
    arguments = parser.parse_args()
    start = time.monotonic()
    if not (arguments.corpora / "local" / "index.json").exists():
        print(f"{build(arguments.corpora):,} tokens to train on, after {time.monotonic() - start:.0f} s", flush=True)
    os.environ["DYNAMASK_CORPORA"] = str(arguments.corpora.absolute())
    os.environ["DYNAMASK_STATE"] = str(arguments.state.absolute())
    from dynamask_lab.studies import SCRATCH, run_sweep
    from dynamask_lab.studies.scratch.study import scratch_name

    configs = SCRATCH.configs(arguments.size)
    first = [config for config in configs if scratch_name(config) in FIRST]
    rest = [config for config in configs if config not in first]
    for part in (first, rest):
        left = arguments.seconds - (time.monotonic() - start)
        if left > 0:
            report = run_sweep(SCRATCH, part, arguments.out, left, workers=min(arguments.workers, len(part)))
            for row in SCRATCH.summary(report.records):
                print(row, flush=True)
            for failure in report.failed:
                print("failed:", failure, flush=True)


if __name__ == "__main__":
    main()
