"""Measure how fast processes that share a run are, alone and beside the other forms, and that they learn as one does.

    DYNAMASK_PROCESSES=2 python lab/scripts/shared_pilot.py --form "=dense, half rate=" --turns T --out F.jsonl

Every form is a call of its own, on the same cards. Each compiles and trains up to step 50, waits for its turn alone
from there to step 100, then for all others, and trains beside them up to step 200. The line says tokens per second in
both stretches, and the losses of the first steps, which a call with one process repeats (`--steps 50`).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60M-tables")
    parser.add_argument("--form", required=True, help="part of the form's name, as in scratch_gpu.py")
    parser.add_argument("--turns", type=Path, required=True, help="folder through which the calls take turns")
    parser.add_argument("--all", type=int, default=1, help="calls that train together at the end")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0, help="to wait for a turn or for the others, at most")
    parser.add_argument("--set", type=json.loads, default={}, help="settings to change, as JSON: a trial")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.turns.mkdir(parents=True, exist_ok=True)
    from dynamask_lab.language.data_parallel import processes
    from dynamask_lab.language.engine import run_language
    from dynamask_lab.studies import SCRATCH
    from dynamask_lab.studies.scratch.study import scratch_name

    config = next(each for each in SCRATCH.configs(arguments.size) if arguments.form in f"={scratch_name(each)}=")
    config |= {"steps": arguments.steps, "validation_tokens": 8192} | arguments.set
    os.environ.setdefault("DYNAMASK_STATE", str(arguments.turns / "state"))
    turn = open(arguments.turns / "turn", "w")  # noqa: SIM115 held over many calls of `progress`
    began: dict[int, float] = {}
    ended: dict[int, float] = {}

    def wait(ready: object) -> None:
        end = time.monotonic() + arguments.seconds
        while not ready() and time.monotonic() < end:  # type: ignore[operator]
            time.sleep(0.02)

    def alone() -> bool:
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def progress(share: float, note: str) -> None:
        step = round(share * arguments.steps)
        ended[step] = time.perf_counter()  # the leader has just looked at the validation split: nothing is pending
        if step == 50 and arguments.steps > 50:
            wait(alone)
        if step == 100 and arguments.steps > 100:
            fcntl.flock(turn, fcntl.LOCK_UN)
            (arguments.turns / f"ready-{scratch_name(config)[:6]}").touch()
            wait(lambda: len(list(arguments.turns.glob("ready-*"))) >= arguments.all)
        began[step] = time.perf_counter()
        if step in (10, 20, 50, 100, 150):
            print(f"{time.strftime('%X')} {scratch_name(config)}: step {step} {note}", flush=True)

    result = run_language(config, progress)
    line = {"form": scratch_name(config), "processes": processes(), "peak_memory": result["peak_memory"]}
    for name, first, last in (("alone", 50, 100), ("together", 100, 200)):
        if first in began and last in ended:
            line[name] = (last - first) * config["batch_tokens"] / (ended[last] - began[first])
    line |= {"curve": [round(look["loss"], 5) for look in result["curve"]]}
    line |= {"training": [round(loss, 5) for loss in result["training"][:40]]}
    with open(arguments.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
