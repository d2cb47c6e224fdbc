"""The sweep runner: many runs, one results file, a budget of time; killed and started again, it goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamask.errors import InvalidInputError
from dynamask_lab.sweeps import provenance
from dynamask_lab.sweeps.registry import Config, Experiment, Progress, get_experiment
from dynamask_lab.sweeps.results import Record, ResultsFile, run_key
from dynamask_lab.sweeps.schedule import FollowUp, Observer, OutOfBudget, Run, Schedule
from dynamask_lab.sweeps.workers import check_portable, run_in_workers


@dataclass(frozen=True)
class SweepReport:
    """What a sweep did.

    Attributes:
        records: the finished runs of this sweep's configs, earlier ones included, in the file's order.
        ran: how many of them this call ran.
        failed: runs that raised, with the error; nothing is written about them, so the next call tries again.
        left: runs that the budget had no room for, shortest first.
    """

    records: list[Record]
    ran: int
    failed: list[tuple[Config, Exception]]
    left: list[Config]


def run_sweep(
    experiment: Experiment | str,
    configs: Sequence[Config],
    results: Path,
    budget_seconds: float | None = None,
    *,
    workers: int = 1,
    follow_up: FollowUp | None = None,
    observer: Observer | None = None,
    whole: bool = False,
) -> SweepReport:
    """Do the runs that are not in the results file yet, shortest first, while the budget lasts.

    Each finished run is on the disk as soon as it ends, so that a kill at any moment costs the runs in progress and
    nothing else: the same call goes on from there.

    Args:
        experiment: the experiment, or its registered name.
        configs: the runs; one that is listed twice runs once.
        results: JSON lines, one per finished run (`results.Record`). Created where it does not exist.
        budget_seconds: wall time. No run starts whose estimate exceeds what is left of it, and a run that takes longer
            than estimated is not interrupted, unless the experiment is interruptible: then runs in progress are stopped
            where they are, and continued by the next call. While nothing has been measured, the cheapest runs start
            without an estimate. None: no limit.
        workers: runs at a time. With one, runs are done in this process, on the first visible GPU; more are processes
            of their own, spread over the visible GPUs, and the experiment's `run` must be a function of a module. A
            process that dies fails its run and is replaced. Where several share a device, its name in the records says
            how many: their times are not those of a run alone.
        follow_up: runs that the finished ones decide; asked at the beginning and whenever a run has ended.
        observer: told how it goes.
        whole: start no run whose estimate exceeds what is left, also where runs can be continued by the next call.

    Returns:
        What was done, and what is left.

    Raises:
        InvalidInputError: a config that is not plain JSON or has no integer "seed", a negative budget, no workers.
        UsageError: an unknown experiment; a results file that cannot be written, is not one, or is in use; workers
            that cannot be started.
    """
    deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
    if budget_seconds is not None and not budget_seconds >= 0:
        raise InvalidInputError(f"budget_seconds must be at least 0, or None for no limit; got {budget_seconds}")
    if workers < 1:
        raise InvalidInputError(f"workers must be at least 1; got {workers}")
    if isinstance(experiment, str):
        experiment = get_experiment(experiment)
    for config in configs:
        run_key(experiment.name, config)  # names a mistake before the file is created
    if workers > 1:
        check_portable(experiment.run)
    with ResultsFile(results) as file:
        schedule = Schedule(experiment, configs, file, deadline, follow_up, observer or Observer(), whole=whole)
        if workers > 1:
            run_in_workers(schedule, workers)
        else:
            _run_here(schedule)
        return SweepReport(schedule.records(), schedule.ran, schedule.failed, schedule.left())


def _run_here(schedule: Schedule) -> None:
    """Do the runs in this process, one after another."""
    device = provenance.device_name()
    while run := schedule.next(device):
        start = time.perf_counter()
        try:
            result = schedule.experiment.run(run.config, _progress(schedule, run))
        except OutOfBudget:
            schedule.interrupted(run)
        except Exception as error:  # one run out of memory must not cost a night of the others
            schedule.failed_with(run, error)
        else:
            schedule.finished(run, result, time.perf_counter() - start)


def _progress(schedule: Schedule, run: Run) -> Progress:
    """Tells the schedule, and raises `OutOfBudget` when the run is to be stopped."""

    def progress(share: float, note: str) -> None:
        schedule.advanced(run, share, note)
        if schedule.stop_at is not None and share < 1 and time.monotonic() >= schedule.stop_at:
            raise OutOfBudget

    return progress
