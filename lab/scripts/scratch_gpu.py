"""Run a sweep of the study `scratch` on a machine without a registry, the forms that decide most first.

    python lab/scripts/scratch_gpu.py --corpora CORPORA --state STATE --out scratch.jsonl --size 4M --seconds 700

The corpus is made of the sources of that machine, and of those in `--more`, where it is missing. Runs share the GPU, so
their times do not compare. The same command continues what the time did not suffice for.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from local_corpus import PARTS, VALIDATION, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="tables of documents, .jsonl.xz")
    parser.add_argument("--characters", type=float, default=300e6, help="of the corpus, at most")
    parser.add_argument("--state", type=Path, required=True, help="folder of unfinished runs")
    parser.add_argument("--out", type=Path, required=True, help="results file, appended to")
    parser.add_argument("--copy", type=Path, help="where to copy the results file after every run")
    parser.add_argument("--seconds", type=float, required=True, help="stop after so long")
    parser.add_argument("--workers", type=int, default=10, help="runs at a time")
    parser.add_argument("--size", nargs="+", default=["4M"], help="which sweeps, one after another")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[""],
        help="parts of the names of the forms to run, in the order of their worth; =NAME=: the whole name",
    )
    parser.add_argument(
        "--wait", action="store_true", help="for a corpus that another process makes; meanwhile the workers compile"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds to run")
    parser.add_argument(
        "--first", type=int, default=4, help="so many forms are run with all seeds before the next so many"
    )
    parser.add_argument("--tokens", type=float, help="per parameter, instead of the sweep's 20")
    parser.add_argument("--held-out", type=float, default=VALIDATION, help="share of the documents")
    parser.add_argument("--parts", type=int, default=PARTS, help="of the corpus, which decide what is held out")
    parser.add_argument("--late", type=Path, nargs="*", default=[], help="made one after another while runs are late")
    parser.add_argument("--until", type=Path, help="end without a result once this file is there")
    parser.add_argument("--corpus-only", action="store_true", help="make the corpus and end")
    parser.add_argument("--steps", type=int, help="steps of every run instead of the sweep's: a trial")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    name = "long" if "reading" in arguments.size else "tables" if "tables" in arguments.size[0] else "local"
    large = {"20M-tables": "tables-400M", **dict.fromkeys(("10M-choice", "45M-tables", "60M-tables"), "tables-1200M")}
    name = large.get(arguments.size[0], name)
    if not arguments.wait and not (arguments.corpora / name / "index.json").exists():
        tokens = build(
            arguments.corpora,
            more=arguments.more,
            characters=int(arguments.characters),
            parts=arguments.parts,
            validation=arguments.held_out,
            name=name,
        )
        print(f"{tokens:,} tokens to train on, {deadline - time.monotonic():.0f} s left", flush=True)
    if arguments.corpus_only:
        return
    os.environ["DYNAMASK_CORPORA"] = str(arguments.corpora.absolute())
    os.environ["DYNAMASK_STATE"] = str(arguments.state.absolute())
    from dynamask_lab.studies import ABLATION, SCRATCH

    for size in arguments.size:
        experiment = ABLATION if size == "leak" else SCRATCH
        configs = [
            config
            | ({"steps": arguments.steps} if arguments.steps else {})
            | ({"tokens_per_parameter": arguments.tokens} if arguments.tokens else {})
            for config in experiment.configs(size)
            if config["seed"] in arguments.seeds and any(part in f"={_name(config)}=" for part in arguments.only)
        ]
        worth = {part: place for place, part in reversed([*enumerate(arguments.only)])}
        configs.sort(key=lambda config: min(worth[part] for part in worth if part in f"={_name(config)}="))
        # A form that fails is tried again without torch.compile.
        for compiled in (True, False) if experiment is SCRATCH else (False,):
            configs = _run(experiment, configs, arguments, deadline, compiled)


def run_when_there(config: dict[str, Any], progress: Any) -> dict[str, Any]:
    """`run_language`, once the corpus is there; until then the form compiles on another one."""
    from dynamask_lab.language.engine import run_language
    from dynamask_lab.sweeps.schedule import OutOfBudget

    index = Path(os.environ["DYNAMASK_CORPORA"]) / config["corpus"] / "index.json"
    if not index.exists():
        try:
            run_language(config | {"corpus": "bytes", "steps": 12}, progress)
        except OutOfBudget:
            raise
        except Exception as error:  # the run itself tells what is wrong
            print(f"{_name(config)} did not compile beforehand: {type(error).__name__}: {str(error)[:300]}", flush=True)
        while not index.exists():
            progress(0.0, "waits for the corpus")
            time.sleep(0.2)
    return run_language(config, progress)


def _name(config: dict[str, Any]) -> str:
    """What tables call a run's form."""
    from dynamask_lab.studies.ablation.study import ablation_name
    from dynamask_lab.studies.scratch.study import scratch_name

    return f"{ablation_name(config)}, {config['window']}" if "dense_share" in config else scratch_name(config)


def _run(
    experiment: Any, configs: Sequence[dict[str, Any]], arguments: argparse.Namespace, deadline: float, compiled: bool
) -> list:
    """Run what is left of them in the order of their worth; returns the settings of those that failed."""
    from dynamask_lab.studies import SCRATCH, Observer, Record, run_sweep
    from dynamask_lab.studies.scratch.study import newest_in_head_windows

    order = list(dict.fromkeys(_name(config) for config in configs))

    def place(config: dict[str, Any]) -> float:
        name = _name(config)
        index: float = order.index(name) if name in order else len(order)
        if name.startswith("newest"):  # right behind the form whose windows it has
            index = next((place + 0.5 for place, other in enumerate(order) if "head windows" in other), index)
        return 1.0 + 1000 * (index // arguments.first) + 100 * config["seed"] + index

    def follow_up(records: Sequence[Record]) -> list[dict[str, Any]]:
        wanted = [record for record in records if record.config in configs]
        return newest_in_head_windows(wanted)

    class Shown(Observer):
        def __init__(self) -> None:
            self.told: dict[str, tuple[float, float]] = {}
            self.late_since = time.monotonic() + 75

        def advanced(self, config: dict[str, Any], share: float, note: str) -> None:
            name = f"{_name(config)} {config['width']} seed {config['seed']}"
            now = time.monotonic()
            before, share_before = self.told.get(name, (now - 60, 0.0))
            if now - before >= 60:
                self.told[name] = (now, share)
                print(f"{time.strftime('%X')} {name}: {share:.1%} {note}", flush=True)
                if share_before:
                    self.check(now + (1 - share) * (now - before) / max(share - share_before, 1e-6))
            if arguments.until is not None and arguments.until.exists():
                raise TimeoutError(f"{arguments.until} ends this sweep")

        def check(self, end: float) -> None:
            """Give the signal to a sweep beside this one to end, where a run here would end too late."""
            missing = [file for file in arguments.late if not file.exists()]
            if missing and end > deadline + 15 and time.monotonic() - self.late_since > 75:
                self.late_since = time.monotonic()
                print(f"{time.strftime('%X')} {end - deadline:.0f} s late: {missing[0]}", flush=True)
                missing[0].touch()

        def started(self, config: dict[str, Any], estimate: float | None) -> None:
            print(
                f"{time.strftime('%X')} begin {_name(config)} {config['width']} seed {config['seed']}",
                flush=True,
            )

        def finished(self, record: Record) -> None:
            result, name = record.result, _name(record.config)
            rate = (result["tokens_per_second"] or 0) / 1e3
            print(
                f"{time.strftime('%X')} {name} {record.config['width']} seed {record.seed}: loss {result['loss']:.4f} "
                f"test {result.get('test', float('nan')):.4f}, {rate:.0f} thousand tokens/s, {record.seconds:.0f} s",
                flush=True,
            )
            if arguments.copy:
                shutil.copy(arguments.out, arguments.copy)

        def failed(self, config: dict[str, Any], error: Exception) -> None:
            print(f"{_name(config)} failed: {type(error).__name__}: {str(error)[:1500]}", flush=True)

    left = deadline - time.monotonic()
    if left < 10 or not configs:
        return []
    configs = [config | {"compile": compiled} for config in configs]
    # Handed out by worth, not by length: the last ones may find no time.
    run = run_when_there if arguments.wait else experiment.run
    ordered = dataclasses.replace(experiment, run=run, cost=place, kind=lambda config: "run")
    workers = max(2, arguments.workers)
    try:
        report = run_sweep(
            ordered,
            configs,
            arguments.out,
            left,
            workers=workers,
            follow_up=follow_up if experiment is SCRATCH else None,
            observer=Shown(),
        )
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return []
    for row in experiment.summary(report.records):
        print(row, flush=True)
    return [config for config, _ in report.failed]


if __name__ == "__main__":
    main()
