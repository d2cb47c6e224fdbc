"""Run the study: jobs in the order of their worth, each line of results on the disk as soon as it exists.

    python -m dynamask_lab.studies.conversion.study --model MODEL --data DATA --state STATE --out results.jsonl

A job is a form and a measure. Whatever is in the results files already (`--out`, `--done`) is not run again, and what
has been trained stays in STATE, so the same command continues a run that was killed or ran out of time. `--lane`
splits the jobs between processes that share a GPU: decoding at small batches leaves most of it idle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from dynamask_lab.studies.conversion import close, final, gemma, levers, longer, measure, settle
from dynamask_lab.studies.conversion.forms import STEPS, OutOfTime, Schedule, Spec, Workshop
from dynamask_lab.studies.conversion.jobs import Job, jobs, key_of, lane_of
from dynamask_lab.studies.conversion.tasks import Example, Tasks
from dynamask_lab.sweeps.provenance import commit, device_name, versions

WAIT = 150.0
"""Seconds that `--after` waits at most."""
MEASURING = 45.0
"""Seconds that a training leaves for the losses of what it trained."""
SHARED: dict[str, Any] = {"final": final, "gemma": gemma, "close": close, "settle": settle, "longer": longer}
"""Lists that processes share."""
LANES = ("all", "converted", "dense", "speed")


class Results:
    """The results file, appended to; and what earlier files hold.

    Args:
        out: the file; every line is on the disk when `append` returns.
        done: files of earlier runs.
        facts: what every line says beside its own: commit, device, versions, digests.
        copies: other files that receive the same lines.
    """

    def __init__(self, out: Path, done: Iterable[Path], facts: dict[str, Any], copies: Iterable[Path] = ()) -> None:
        self.out, self.facts, self.copies = out, facts, tuple(copies)
        out.parent.mkdir(parents=True, exist_ok=True)
        self.keys = {row["key"] for row in read_rows([out, *done])}

    def append(self, key: str, row: dict[str, Any]) -> None:
        """Write one line."""
        line = json.dumps({"study": "conversion", "key": key, **row, **self.facts}) + "\n"
        for path in (self.out, *self.copies):
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self.keys.add(key)


def read_rows(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The rows of results files; a last line that a kill cut off is left out, missing files are empty."""
    for path in files:
        if not path.exists():
            continue
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.get("study") == "conversion":
                yield row


class Examples:
    """Makes the examples in processes of its own, ahead of the jobs that need them."""

    def __init__(self, model: Path, data: Path, wanted: Iterable[dict[str, Any]], processes: int) -> None:
        # Processes are forked before CUDA is initialised.
        context = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(processes, context, initializer=_prepare, initargs=(model, data))
        self._made: dict[str, Future[list[Example]]] = {}
        for settings in wanted:
            key = key_of(settings)
            if key not in self._made:
                self._made[key] = self._pool.submit(_make, settings)

    def get(self, settings: dict[str, Any]) -> list[Example]:
        """The examples of a job's settings."""
        return self._made[key_of(settings)].result()

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)


_tasks_of_process: Tasks | None = None


def _prepare(model: Path, data: Path) -> None:
    global _tasks_of_process
    torch.set_num_threads(1)
    essays = (data / "essays.txt").read_text(encoding="utf-8")
    documents = np.load(data / "test-text.npy").reshape(-1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = tokenizer.chat_template is not None  # a model that was not trained to chat gets the bare question
    _tasks_of_process = Tasks(tokenizer, essays, documents.tolist(), chat=chat)


def _make(settings: dict[str, Any]) -> list[Example]:
    assert _tasks_of_process is not None
    first = settings["first"]
    return [
        _tasks_of_process.make(settings["task"], settings["length"], index, settings["haystack"])
        for index in range(first, first + settings["count"])
    ]


class Runner:
    """Does jobs.

    Args:
        workshop: makes the forms.
        data: folder of the token arrays.
        benchmarks: folder of the benchmarks' JSON lines.
        examples: makes the examples.
        tokenizer: the model's.
        device: of the tensors.
        limit: at most so many blocks, examples and questions; for trials.
    """

    def __init__(
        self,
        workshop: Workshop,
        data: Path,
        benchmarks: Path,
        examples: Examples,
        tokenizer: Any,
        device: str,
        limit: int | None = None,
    ) -> None:
        self.workshop, self.data, self.benchmarks, self.examples = workshop, data, benchmarks, examples
        self.tokenizer, self.device, self.limit = tokenizer, device, limit

    def run(self, job: Job) -> dict[str, Any]:
        """The result of one job."""
        form = self.workshop.form(job.spec)
        settings = job.settings
        if job.measure == "tasks":
            examples = self.examples.get(settings)[: self.limit]
            most = 25 if settings["count"] <= 100 else 100
            batch = max(1, min(len(examples), most, 25 * 8192 // settings["length"]))
            scores: list[list[float]] = []
            texts: list[str] | None = [] if settings["task"] == "tracking" else None
            for first in range(0, len(examples), batch):
                scores += measure.answers(form, self.tokenizer, examples[first : first + batch], texts)
            depths = [None if e.depth is None else round(e.depth, 4) for e in examples]
            return {"scores": scores, "depths": depths} | ({} if texts is None else {"texts": texts})
        if job.measure == "benchmark":
            limit = min(settings["limit"], self.limit or settings["limit"])
            choices = measure.read_benchmark(self.benchmarks, settings["name"], limit)
            return dict(measure.benchmark(form, self.tokenizer, choices))
        if job.measure == "speed":
            context = self._blocks("test-text")[: settings["batch"], : settings["length"]]
            with self.workshop.turn() as turn:
                turn.take()
                return dict(measure.speed(form, context))
        blocks = self._blocks(f"{'long' if job.measure == 'long' else 'test'}-{settings['corpus']}")
        if job.measure == "long":
            return {"losses": measure.loss_by_position(form, blocks[:, : settings["length"]], batch=1)}
        if job.measure == "loss":
            return {"losses": measure.loss_by_position(form, blocks[: settings["blocks"]])}
        if job.measure == "divergence":
            blocks = blocks[: settings["blocks"], : settings["length"]]
            return {"divergences": measure.divergence_by_position(form, self.workshop.dense(), blocks)}
        if job.measure == "continuation":
            losses = measure.continuation_loss(form, blocks[: settings["blocks"]], settings["context"])
            return {"losses": losses}
        raise ValueError(f"unknown measure {job.measure!r}")

    def _blocks(self, name: str) -> torch.Tensor:
        array = np.load(self.data / f"{name}.npy").astype(np.int64)
        return torch.from_numpy(array[: self.limit]).to(self.device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the pretrained model")
    parser.add_argument("--data", type=Path, required=True, help="token arrays, and essays.txt")
    parser.add_argument("--benchmarks", type=Path, help="JSON lines; without it, benchmarks are left out")
    parser.add_argument("--state", type=Path, required=True, help="what is trained is kept here")
    parser.add_argument("--out", type=Path, required=True, help="results file, appended to")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="results of earlier runs")
    parser.add_argument("--copy", type=Path, nargs="*", default=[], help="files that receive the same lines")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing that would end after so long")
    parser.add_argument("--after", type=Path, help="wait for this file before the first job, to leave it the GPU")
    parser.add_argument("--lane", choices=LANES, default="all")
    parser.add_argument("--part", help="I/N: only the forms of part I of N, from 0; with --plan levers")
    parser.add_argument("--only", default="", help="only forms whose name holds this text")
    parser.add_argument("--measure", nargs="*", help="only these measures")
    parser.add_argument("--limit", type=int, help="blocks, examples and questions of each job; for trials")
    parser.add_argument("--processes", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--steps", type=int, default=STEPS, help="batches that forms are trained on")
    parser.add_argument("--plan", choices=("forms", "levers", *SHARED), default="forms", help="which list")
    parser.add_argument("--role", choices=final.ROLES, help="share the list with other processes")
    parser.add_argument("--name", default="", help="of the process in its lines, with --role")
    parser.add_argument("--schedule", default="{}", help="JSON: fields of Schedule that differ")
    parser.add_argument("--list", action="store_true", help="print the jobs instead of running them")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    start = time.monotonic()
    if arguments.part and (arguments.plan != "levers" or not re.fullmatch(r"\d+/\d+", arguments.part)):
        parser.error(f"--part is I/N and needs --plan levers; got {arguments.part!r}")
    if arguments.role and arguments.plan not in SHARED:
        parser.error(f"--role needs --plan {' or '.join(SHARED)}")
    parts = int(arguments.part.partition("/")[2]) if arguments.part else 0
    lane = f"{int(arguments.part.partition('/')[0])}/{parts}" if arguments.part else arguments.lane
    if arguments.plan == "levers":
        listed = levers.jobs()
        names = [f"{part}/{parts}" for part in range(parts)] or ["converted", "dense"]
        places = levers.lanes(listed, names)
    else:
        plan = SHARED.get(arguments.plan)
        listed, places = (plan.jobs() if plan else jobs(arguments.steps)), {}
    chosen = [
        job
        for job in listed
        if lane in ("all", "speed" if job.measure == "speed" else places.get(job.spec, lane_of(job)))
        and arguments.only in job.spec.name
        and (not arguments.measure or job.measure in arguments.measure)
        and (arguments.benchmarks or job.measure != "benchmark")
    ]
    if arguments.list:
        for job in chosen:
            print(job.key, job.spec.name, job.measure, json.dumps(job.settings))
        return 0
    schedule = Schedule(**json.loads(arguments.schedule))
    facts = {
        "commit": commit() or os.environ.get("DYNAMASK_COMMIT"),  # a copied tree may lack its history
        "versions": versions(),
        "model": arguments.model.name,
        "data": json.loads((arguments.data / "data.json").read_text())["arrays"],
        "schedule": asdict(schedule),
    }
    facts["data"] = key_of(facts["data"])
    if arguments.limit:
        facts["limit"] = arguments.limit
    results = Results(arguments.out, arguments.done, facts, arguments.copy)
    left = [job for job in chosen if job.key not in results.keys]
    wanted = [job.settings for job in left if job.measure == "tasks"]
    examples = Examples(arguments.model, arguments.data, wanted, arguments.processes)
    # From here on the GPU may be initialised.
    while arguments.after and not arguments.after.exists() and time.monotonic() - start < WAIT:
        time.sleep(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results.facts["device"] = device_name(1 if lane in ("all", "speed") and not arguments.role else 2)

    def report(spec: Spec, what: str, result: dict[str, Any]) -> None:
        settings: dict[str, Any] = {"lane": arguments.name or lane}
        row = {"form": spec.name, "spec": spec.facts(), "measure": what, "settings": settings, "result": result}
        results.append(key_of(spec.facts(), what, settings), row)
        print(f"  {spec.name} {what}: {result['seconds']:.1f} s", flush=True)

    workshop = Workshop(arguments.model, arguments.data, arguments.state, schedule, device, report)
    # Losses that nobody measures any more would make the last training worthless.
    workshop.deadline = start + arguments.seconds - (MEASURING if arguments.role else 0.0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    runner = Runner(workshop, arguments.data, arguments.benchmarks, examples, tokenizer, device, limit=arguments.limit)
    broken: set[tuple[str, str]] = set()
    done = 0
    queue: Iterable[Job] = left
    if arguments.role:
        keys = {job.key for job in left}
        queue = final.claimed(
            arguments.role,
            arguments.state / "claims",
            done=lambda job: job.key in results.keys or job.key not in keys,
            ready=workshop.ready,
            fits=lambda spec: (
                workshop.founded(spec) and time.monotonic() + workshop.seconds_to_make(spec) < workshop.deadline
            ),
            over=lambda: time.monotonic() - start > arguments.seconds,
            listed=SHARED[arguments.plan].entries(),
            free=workshop.turn().free,
        )
    for job in queue:
        spent = time.monotonic() - start
        if spent > arguments.seconds:
            print(f"out of time: {done} of {len(left)} jobs done", flush=True)
            break
        making = workshop.seconds_to_make(job.spec)
        if making and start + spent + making > workshop.deadline:
            continue  # jobs without a training may still fit
        if (job.spec.name, job.measure) in broken:
            continue
        began = time.monotonic()
        try:
            try:
                result = runner.run(job)
            except torch.OutOfMemoryError:  # the other run of this GPU may have been at its peak
                traceback.clear_frames(sys.exc_info()[2])
                workshop.forget()
                time.sleep(5)
                result = runner.run(job)
        except OutOfTime:  # another lane trained meanwhile
            continue
        except Exception:
            # One form that fails must not cost the others their time on the machine.
            print(f"{job.spec.name} {job.measure} {job.settings} failed:\n{traceback.format_exc()}", flush=True)
            broken.add((job.spec.name, job.measure))
            torch.cuda.empty_cache()
            continue
        seconds = time.monotonic() - began
        row = {
            "form": job.spec.name,
            "spec": job.spec.facts(),
            "measure": job.measure,
            "settings": job.settings,
            "seconds": round(seconds, 3),
            "result": result,
        }
        results.append(job.key, row)
        done += 1
        print(f"{time.monotonic() - start:6.1f} s  {job.spec.name} {job.measure} {_brief(job, result)}", flush=True)
    examples.close()
    return 1 if broken else 0


def _brief(job: Job, result: dict[str, Any]) -> str:
    """The figure of a job in one word, for whoever watches."""
    settings = " ".join(str(value) for value in job.settings.values())
    if "scores" in result:
        flat = list(itertools.chain.from_iterable(result["scores"]))
        return f"{settings}: {np.mean(flat):.3f}"
    if "losses" in result:
        return f"{settings}: {np.nanmean(np.array(result['losses'])):.4f}"
    if "divergences" in result:
        return f"{settings}: {np.mean(result['divergences'], 0).round(5).tolist()}"
    if "acc" in result:
        return f"{settings}: {np.mean(result['acc']):.3f} {np.mean(result['acc_norm']):.3f}"
    return f"{settings}: {json.dumps({name: round(value, 1) for name, value in result.items()})}"


if __name__ == "__main__":
    sys.exit(main())
