"""Run a sweep of a study on a machine that has dynamask's sources alone, seed by seed in the sweep's order.

    python lab/scripts/sweep_gpu.py mqar published --out mqar.jsonl --seconds 400 --workers 5

Runs share the GPU, so their times do not compare. No run starts that would not end in time, as those that ended show.
The same command does what the time did not suffice for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from dynamask_lab.studies import Observer, Record, get_experiment, run_key, run_sweep


class Shown(Observer):
    """Prints what begins, ends and fails."""

    def started(self, config: dict[str, Any], estimate: float | None) -> None:
        print(time.strftime("%X"), "begin", _short(config), flush=True)

    def finished(self, record: Record) -> None:
        figures = {name: record.result[name] for name in ("accuracy", "loss", "test", "exact") if name in record.result}
        print(time.strftime("%X"), _short(record.config), figures, f"{record.seconds:.0f} s", flush=True)

    def failed(self, config: dict[str, Any], error: Exception) -> None:
        print(_short(config), f"failed: {type(error).__name__}: {str(error)[:1500]}", flush=True)


def _short(config: dict[str, Any]) -> str:
    names = ("attention", "ranking", "layer_attention", "calibrate_at", "window", "width", "seed")
    return " ".join(str(config[name]) for name in names if config.get(name) is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="name of the study")
    parser.add_argument("size", help="which of its sweeps")
    parser.add_argument("--out", type=Path, required=True, help="results file, appended to")
    parser.add_argument("--seconds", type=float, required=True, help="stop after so long")
    parser.add_argument("--workers", type=int, default=4, help="runs at a time")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many runs of the sweep, the first ones")
    parser.add_argument("--count", type=int, help="only so many runs behind those, the first ones")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="results files whose runs are left out first")
    arguments = parser.parse_args()
    experiment = get_experiment(arguments.experiment)
    known = {json.loads(line)["key"] for file in arguments.known for line in file.read_text().splitlines()}
    configs = [run for run in experiment.configs(arguments.size) if run_key(experiment.name, run) not in known]
    configs = configs[arguments.skip :][: arguments.count]
    # Estimates go by the runs that ended, whatever their settings, and the order stays.
    places = {run_key(experiment.name, config): 1.0 + 1e-6 * place for place, config in enumerate(configs)}
    ordered = dataclasses.replace(
        experiment, cost=lambda config: places[run_key(experiment.name, config)], kind=lambda config: "run"
    )
    report = run_sweep(
        ordered,
        configs,
        arguments.out,
        arguments.seconds,
        workers=max(2, arguments.workers),
        observer=Shown(),
        whole=True,
    )
    for row in experiment.summary(report.records):
        print(row, flush=True)


if __name__ == "__main__":
    main()
