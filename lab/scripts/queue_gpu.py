"""Do runs of several studies on one GPU, in one order, by workers that take run after run.

    CUDA_VISIBLE_DEVICES=2 python lab/scripts/queue_gpu.py --out out --seconds 700 --workers 7 \\
        mqar:patient@120 needle:levers+:0:9@250 lab/results/scratch-tables.jsonl:cae43da43e956824@150

A job is STUDY:SIZE[:SKIP[:COUNT]], or FILE:KEY, a raw line whose run is repeated; behind @ the seconds that a run is
expected to take, behind ~ the digest of the build of the corpus without which it is left out. Runs that a file of
--known has are left out, but for a size with a plus behind it. Several queues with one --claims share their jobs. A run
waits for its corpus, and lets others pass; --prepare makes the mixtures of needles. Every finished run is a line of
OUT/queue-NAME-WORKER.jsonl at once. Runs share the GPU: their times do not compare.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FITS = 0.85
"""Share of the expected seconds that must be left: runs are quicker when others have ended."""
_TRIES = 3
"""Starts of a worker whose process ends after an error on the GPU."""
_END = r"(@(?P<s>\d+))?(~(?P<content>[0-9a-f]+))?"
_JOB = re.compile(r"(?P<study>[a-z]+):(?P<size>[\w-]+)(?P<again>\+?)(:(?P<skip>\d+))?(:(?P<count>\d+))?" + _END)
_CELL = re.compile(r"(?P<file>.+\.jsonl):(?P<key>[0-9a-f]+)" + _END)


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        study: its name.
        key: see `run_key`.
        config: the settings.
        seconds: expected.
        content: first digits of the corpus' digest that it wants, if any.
    """

    study: str
    key: str
    config: dict[str, Any]
    seconds: float
    content: str = ""


def jobs_of(texts: list[str], known: list[Path]) -> list[Job]:
    """The runs of the jobs in their order, each once.

    Raises:
        SystemExit: a job of another form, or a line that is not there.
    """
    from dynamask_lab.studies import get_experiment, run_key

    done = {json.loads(line).get("key") for file in known for line in file.read_text().splitlines()}
    found: dict[str, Job] = {}
    for text in texts:
        if cell := _CELL.fullmatch(text):
            lines = [json.loads(line) for line in Path(cell["file"]).read_text().splitlines()]
            line = next((line for line in lines if line["key"].startswith(cell["key"])), None)
            if line is None:
                raise SystemExit(f"{cell['file']} has no line whose key starts with {cell['key']}")
            runs = [(line["experiment"], line["config"])]
        elif job := _JOB.fullmatch(text):
            experiment = get_experiment(job["study"])
            runs = [(experiment.name, config) for config in experiment.configs(job["size"])]
            if not job["again"]:
                runs = [run for run in runs if run_key(*run) not in done]
            start = int(job["skip"] or 0)
            runs = runs[start : None if job["count"] is None else start + int(job["count"])]
        else:
            raise SystemExit(f"{text!r} is not a job: write STUDY:SIZE[:SKIP[:COUNT]][@SECONDS] or FILE:KEY[@SECONDS]")
        form: Any = cell or job
        seconds, content = float(form["s"] or 0), form["content"] or ""
        for study, config in runs:
            key = run_key(study, config)
            found.setdefault(key, Job(study, key, config, seconds, content))
    return list(found.values())


def corpus_of(job: Job) -> str | None:
    """Name of the prepared corpus that a run reads, if any."""
    if job.study == "needle":
        from dynamask_lab.studies.needle.study import NeedleConfig

        return NeedleConfig.of(job.config).mixture.name
    name = job.config.get("corpus")
    return None if name in (None, "bytes") else str(name)


def ready(job: Job) -> bool:
    """Whether the corpus of a run is there."""
    index = _index(job)
    return index is None or index.exists()


def fitting(job: Job) -> bool:
    """Whether the corpus that is there is of the build that the run wants."""
    index = _index(job)
    return index is None or not job.content or json.loads(index.read_text())["content"].startswith(job.content)


def _index(job: Job) -> Path | None:
    name = corpus_of(job)
    return None if name is None else Path(os.environ.get("DYNAMASK_CORPORA", "corpora")) / name / "index.json"


class Claims:
    """Which runs have been taken, and how long runs took, in a folder that all workers share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def taken(self, job: Job) -> bool:
        """Whether a worker has taken the run."""
        return (self.folder / job.key).exists()

    def take(self, job: Job) -> bool:
        """Take the run, unless another worker has."""
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.folder / job.key, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return True
        return False

    def note(self, job: Job, kind: str, seconds: float) -> None:
        """Note how long a run took."""
        with open(self.folder / "seconds.jsonl", "a") as file:
            file.write(json.dumps([kind, seconds, seconds / job.seconds if job.seconds else 1.0]) + "\n")

    def expected(self, job: Job, kind: str) -> float:
        """Seconds: of the last run of the kind that ended; else what the job says, as far as others kept to it."""
        with contextlib.suppress(FileNotFoundError):
            noted = [json.loads(line) for line in (self.folder / "seconds.jsonl").read_text().splitlines()]
            own = [seconds for name, seconds, _ in noted if name == kind]
            return float(own[-1]) if own else job.seconds * statistics.median(factor for *_, factor in noted)
        return job.seconds

    def next(self, jobs: list[Job], left: float, kinds: dict[str, str]) -> Job | None:
        """Take the first run that is ready and ends in the seconds left; None: none is, or may be later."""
        for job in jobs:
            if not self.taken(job) and self.fits(job, left, kinds) and ready(job) and self.take(job):
                if fitting(job):
                    return job
                _say(f"{job.study} {job.key} is left out: {_index(job)} is of another build")
        return None

    def fits(self, job: Job, left: float, kinds: dict[str, str]) -> bool:
        """Whether a run that begins now ends in time."""
        return left > _FITS * self.expected(job, kinds[job.key])


def kinds_of(jobs: list[Job]) -> dict[str, str]:
    """Key of each run -> what runs of one duration share."""
    from dynamask_lab.studies import get_experiment

    return {job.key: f"{job.study} {get_experiment(job.study).kind(job.config)}" for job in jobs}


def work(arguments: argparse.Namespace, ends: float) -> int:
    """Take run after run until none is left that would end in time.

    Returns:
        The exit code: 0, or 3 after an error that leaves the process unfit for another run.
    """
    from dynamask.errors import InvalidInputError, UsageError
    from dynamask_lab.studies import Record, get_experiment
    from dynamask_lab.sweeps import provenance
    from dynamask_lab.sweeps.results import ResultsFile

    jobs = jobs_of(arguments.jobs, arguments.known)
    kinds, claims = kinds_of(jobs), Claims(arguments.claims)
    _say(f"{len(jobs)} runs")
    # The GPU belongs to others until then.
    while time.time() < arguments.begin or (arguments.after and not arguments.after.exists()):
        time.sleep(0.2)
    device = provenance.device_name(arguments.workers)
    versions, commit = provenance.versions(), provenance.commit()
    with ResultsFile(arguments.out / f"queue-{arguments.name}-{arguments.worker}.jsonl") as file:
        while True:
            left = ends - time.time()
            job = claims.next(jobs, left, kinds)
            if job is None:
                if not any(not claims.taken(each) and claims.fits(each, left, kinds) for each in jobs):
                    return 0
                time.sleep(1.0)
                continue
            experiment, start = get_experiment(job.study), time.time()
            what = f"{job.study} {job.key} {_short(job.config)}"
            _say(f"begin {what}")
            try:
                result = experiment.run(job.config, _progress(what))
            except Exception as error:
                _say(f"{what} failed: {type(error).__name__}: {str(error)[:1500]}")
                if not isinstance(error, (InvalidInputError, UsageError)):
                    return 3
                continue
            seconds = time.time() - start
            claims.note(job, kinds[job.key], seconds)
            if experiment.interruptible:
                seconds = result.pop("seconds")
            record = (job.study, job.key, job.config, job.config["seed"], result, seconds)
            file.append(Record(*record, device, versions, commit))
            figures = {
                name: result[name] for name in ("accuracy", "test", "exact_loss", "leaky_loss") if name in result
            }
            _say(f"{what} {figures or result.get('exact') or result.get('loss')} {seconds:.0f} s")
            del result
            gc.collect()
            _empty_cache()


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _progress(what: str) -> Any:
    """Says every half a minute how far a run is."""
    said = time.monotonic()

    def progress(share: float, note: str) -> None:
        nonlocal said
        if time.monotonic() - said > 30:
            said = time.monotonic()
            _say(f"  {share:.0%} {what} {note}")

    return progress


def _short(config: dict[str, Any]) -> str:
    names = ("attention", "ranking", "lever", "context", "layer_windows", "calibrate_at", "window", "width", "seed")
    return " ".join(str(config[name]) for name in names if config.get(name) is not None)


def _say(text: str) -> None:
    print(time.strftime("%X"), text, flush=True)


def prepare(jobs: list[Job], number: int, parts: int) -> None:
    """Make every so many-th of the mixtures that runs of needles read, in the order of the runs."""
    from dynamask_lab.studies.needle.data import prepare_mixture
    from dynamask_lab.studies.needle.study import NeedleConfig

    mixtures = dict.fromkeys(NeedleConfig.of(job.config).mixture for job in jobs if job.study == "needle")
    for mixture in list(mixtures)[number::parts]:
        _say(f"{prepare_mixture(mixture)} is there")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", help="STUDY:SIZE[+][:SKIP[:COUNT]][@SECONDS] or FILE:KEY[@SECONDS]")
    parser.add_argument("--out", type=Path, required=True, help="folder of lines and logs")
    parser.add_argument("--name", default="a", help="of this queue, in the names of its files")
    parser.add_argument("--claims", type=Path, help="folder that queues with the same jobs share; default: OUT/claims")
    parser.add_argument("--seconds", type=float, required=True, help="end after so long")
    parser.add_argument("--wait", type=float, default=0.0, help="leave the GPU to others for so long first")
    parser.add_argument("--after", type=Path, help="leave the GPU to others until this file is there, too")
    parser.add_argument("--workers", type=int, default=7, help="runs at a time")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="results files whose runs are left out")
    parser.add_argument("--prepare", type=int, default=0, help="processes that make the mixtures of needles")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--preparer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    arguments.claims = arguments.claims or arguments.out / "claims"
    if arguments.preparer is not None:
        prepare(jobs_of(arguments.jobs, arguments.known), arguments.preparer, arguments.prepare)
    elif arguments.worker is not None:
        sys.exit(work(arguments, arguments.end))
    else:
        began = time.time()
        _watch(arguments, began + arguments.wait, began + arguments.seconds)


def _watch(arguments: argparse.Namespace, begin: float, end: float) -> None:
    """Start the workers, again after errors on the GPU, and end them by their time."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    times = ["--begin", str(begin), "--end", str(end)]
    nobody = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    tries = dict.fromkeys(range(arguments.workers), 1)

    def start(kind: str, number: int) -> None:
        own = ["nice", "-n", "5", sys.executable] if kind == "preparer" else [sys.executable]
        with open(arguments.out / f"log-{arguments.name}-{kind}-{number}.txt", "ab") as log:
            command = [*own, __file__, *sys.argv[1:], f"--{kind}", str(number), *times]
            environment = nobody if kind == "preparer" else None
            running[kind, number] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    for number in range(arguments.prepare):
        start("preparer", number)
    for number in range(arguments.workers):
        start("worker", number)
    try:
        while running and time.time() < end:
            time.sleep(0.5)
            for (kind, number), process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[kind, number]
                if kind == "worker" and process.returncode and tries[number] < _TRIES:
                    tries[number] += 1
                    start(kind, number)
    finally:
        for process in running.values():
            process.kill()


if __name__ == "__main__":
    main()
