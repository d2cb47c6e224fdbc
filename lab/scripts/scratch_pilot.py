"""Measure how fast the runs of a sweep of study `scratch` are, alone and all at a time, on one GPU.

    python lab/scripts/scratch_pilot.py --more tables/*.jsonl.xz --size 10M-tables --out pilot.jsonl

A small corpus is made of the first documents of one table. One process per form compiles; then each form trains alone
for some steps, then the first two at once, then the first three, then all. Lines: form, runs at a time, tokens per
second. Then loss and norm of the gradients of one batch, as training computes them and as the pass gives them. A file
per form tells what the GPU did in a step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import time
import traceback
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from local_corpus import build

WARM_UP, TIMED = 16, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--more", type=Path, nargs="+", required=True, help="tables of documents, .jsonl.xz")
    parser.add_argument("--folder", type=Path, default=Path("pilot"), help="of the corpus")
    parser.add_argument("--size", nargs="+", default=["10M-tables"])
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the forms' names, SIZE=NAME=")
    parser.add_argument("--most", type=int, default=99, help="runs at a time")
    parser.add_argument("--characters", type=float, default=6e6)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not (arguments.folder / "tables" / "index.json").exists():
        most = int(arguments.characters)
        build(arguments.folder, more=arguments.more[:1], characters=most, sample=2_000_000, parts=4, name="tables")
    os.environ["DYNAMASK_CORPORA"] = str(arguments.folder.absolute())
    from dynamask_lab.studies import SCRATCH
    from dynamask_lab.studies.scratch.study import scratch_name

    configs = [
        config | {"corpus": "tables"}
        for size in arguments.size
        for config in SCRATCH.configs(size)
        if config["seed"] == 0 and any(part in f"{size}={scratch_name(config)}=" for part in arguments.only)
    ]
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(len(configs))
    processes = [
        spawn.Process(target=_measure, args=(config, place, (len(configs), arguments.most), barrier, arguments.out))
        for place, config in enumerate(configs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _measure(config: dict[str, Any], place: int, runs: tuple[int, int], barrier: Barrier, out: Path) -> None:
    try:
        _timed(config, place, runs, barrier, out)
    except BaseException:
        barrier.abort()
        raise


def _timed(config: dict[str, Any], place: int, runs: tuple[int, int], barrier: Barrier, out: Path) -> None:
    from dynamask_lab.language.engine import Batches, LanguageConfig, _Run
    from dynamask_lab.studies.scratch.study import scratch_name

    run = _Run(LanguageConfig.of(config), out.parent / f"{out.stem}-state")
    run.prepare()
    batches = Batches(run.settings, run.streams.train, run.device)

    def seconds(steps: int) -> float:
        run._synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            run._train_step(batches)
        run._synchronize()
        return time.perf_counter() - start

    def tell(at_a_time: int, took: float, steps: int) -> None:
        rate = steps * run.settings.batch_tokens / took
        line = {"form": scratch_name(config), "width": config["width"], "runs": at_a_time, "tokens_per_second": rate}
        _append(out, line | {"ms": 1000 * took / steps})

    with run.generators:
        fails = False
        try:
            seconds(WARM_UP)
        except Exception:  # the other forms are timed all the same
            traceback.print_exc()
            fails = True
        for turn in range(runs[0]):
            barrier.wait(300)
            if turn == place and not fails:
                tell(1, seconds(TIMED), TIMED)
        for at_a_time in range(2, min(runs) + 1):
            barrier.wait(300)
            if place < at_a_time and not fails:
                tell(at_a_time, seconds(2 * TIMED), 2 * TIMED)
        if not fails:
            _compare(run, batches, scratch_name(config), out)
        for turn in range(runs[0]):
            barrier.wait(300)
            if turn == place and not fails and run.device.type == "cuda":
                with contextlib.suppress(Exception):  # a look, not the measurement
                    _profile(run, batches, out.with_name(f"{out.stem}-profile-{place}.txt"))


def _compare(run: Any, batches: Any, form: str, out: Path) -> None:
    """Write loss and norm of the gradients of a batch as training computes them, and as the pass gives them."""
    from dynamask.training.recorded_gradients import clear_gradients, loss_and_norm

    tokens, parameters = batches(run.step), list(run.model.parameters())
    line: dict[str, Any] = {"form": form, "step": run.step, "recorded": bool(run.gradients._recorded)}
    line["losses"] = [round(float(each), 4) for each in run.losses[: run.step : 8]]
    for name, compute in (("training", run.gradients), ("as it is", run.gradients._as_it_is)):
        line[name] = loss_and_norm(compute(tokens), parameters).tolist()
        clear_gradients(parameters)
    _append(out, line)


def _append(out: Path, line: dict[str, Any]) -> None:
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _profile(run: Any, batches: Any, out: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            run._train_step(batches)
        run._synchronize()
    table = seen.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=70)
    out.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
