"""The sweep runner: many runs, one results file, a budget of time; killed and started again, it goes on."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamask.errors import InvalidInputError
from dynamask.experiments import provenance
from dynamask.experiments.registry import Config, Experiment, Progress, get_experiment
from dynamask.experiments.results import Record, ResultsFile, run_key


class OutOfBudget(Exception):
    """Raised by a run's `progress` when the budget is spent, for an interruptible run to save its state."""


_SHORTEST_PART = 5.0
"""Seconds of budget below which it is not worth to go on with a run that will not be finished."""


class Observer:
    """Told how a sweep goes. Does nothing; override what you want to show."""

    def resumed(self, finished: int, pending: int, dropped: int) -> None:
        """Before the first run: runs already in the file, runs to do, bytes of an unfinished line cut off."""

    def started(self, config: Config, estimate: float | None) -> None:
        """A run begins; estimate in seconds, None while nothing has been measured."""

    def advanced(self, share: float, note: str) -> None:
        """The run now in progress has done this share of its work, from 0 to 1."""

    def finished(self, record: Record) -> None:
        """A run is over and on the disk."""

    def failed(self, config: Config, error: Exception) -> None:
        """A run raised; the sweep goes on with the others."""


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


class Estimator:
    """Seconds of runs to come, from the times of those measured on the same device.

    Seconds are taken as proportional to `experiment.cost` among runs of one `experiment.kind`: their median rate
    counts. A kind not measured yet gets the slowest kind's rate, so that a budget is kept rather than overdrawn.

    Args:
        experiment: whose runs.
        records: finished runs; those of other experiments or devices are passed over.
        device: name of this device.
    """

    def __init__(self, experiment: Experiment, records: Iterable[Record], device: str) -> None:
        self.experiment = experiment
        self.device = device
        self._rates: dict[str, list[float]] = defaultdict(list)
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Learn from a finished run."""
        if (record.experiment, record.device) != (self.experiment.name, self.device):
            return
        try:
            kind, cost = self.experiment.kind(record.config), self.experiment.cost(record.config)
        except InvalidInputError:
            return  # settings of an earlier version: a result worth keeping, but no measure for today's runs
        self._rates[kind].append(record.seconds / cost)

    def seconds(self, config: Config) -> float | None:
        """The estimate, or None while nothing has been measured."""
        if not self._rates:
            return None
        known = self._rates.get(self.experiment.kind(config))
        rate = statistics.median(known) if known else max(map(statistics.median, self._rates.values()))
        return rate * self.experiment.cost(config)

    def shortest_first(self, configs: Iterable[Config]) -> list[Config]:
        """By estimate, or by cost while nothing has been measured."""
        return sorted(configs, key=lambda config: self.seconds(config) or self.experiment.cost(config))


def _progress(observer: Observer, deadline: float | None) -> Progress:
    """Tells the observer, and raises `OutOfBudget` once the deadline has passed."""

    def progress(share: float, note: str) -> None:
        observer.advanced(share, note)
        if deadline is not None and share < 1 and time.monotonic() >= deadline:
            raise OutOfBudget

    return progress


def run_sweep(
    experiment: Experiment | str,
    configs: Sequence[Config],
    results: Path,
    budget_seconds: float | None = None,
    *,
    observer: Observer | None = None,
) -> SweepReport:
    """Do the runs that are not in the results file yet, shortest first, while the budget lasts.

    Each finished run is on the disk before the next begins, so that a kill at any moment costs the run in
    progress and nothing else: the same call goes on from there.

    Args:
        experiment: the experiment, or its registered name.
        configs: the runs; one that is listed twice runs once.
        results: JSON lines, one per finished run (`results.Record`). Created where it does not exist.
        budget_seconds: wall time. No run starts whose estimate exceeds what is left of it, and a run that takes longer
            than estimated is not interrupted, unless the experiment is interruptible: then the last run is stopped
            where it is, and continued by the next call. While nothing has been measured, the cheapest run starts
            without an estimate. None: no limit.
        observer: told how it goes.

    Returns:
        What was done, and what is left.

    Raises:
        InvalidInputError: a config that is not plain JSON or has no integer "seed", or a negative budget.
        UsageError: an unknown experiment; a results file that cannot be written, is not one, or is in use.
    """
    began = time.monotonic()
    if budget_seconds is not None and not budget_seconds >= 0:
        raise InvalidInputError(f"budget_seconds must be at least 0, or None for no limit; got {budget_seconds}")
    if isinstance(experiment, str):
        experiment = get_experiment(experiment)
    observer = observer or Observer()
    wanted = {run_key(experiment.name, config): config for config in configs}
    device, versions, commit = provenance.device_name(), provenance.versions(), provenance.commit()
    failed: list[tuple[Config, Exception]] = []
    ran = 0
    with ResultsFile(results) as file:
        done = {record.key for record in file.records}
        pending = {key: config for key, config in wanted.items() if key not in done}
        estimator = Estimator(experiment, file.records, device)
        observer.resumed(len(wanted) - len(pending), len(pending), file.dropped)
        while pending:
            # Every run sharpens the estimates, so the order is settled one run at a time.
            config = estimator.shortest_first(pending.values())[0]
            estimate = estimator.seconds(config)
            left = None if budget_seconds is None else budget_seconds - (time.monotonic() - began)
            least = _SHORTEST_PART if experiment.interruptible else (estimate or 0.0)
            if left is not None and (left <= 0 or least > left):
                break  # the shortest does not fit, so none does
            key = run_key(experiment.name, config)
            del pending[key]
            observer.started(config, estimate)
            start = time.perf_counter()
            deadline = None if left is None or not experiment.interruptible else time.monotonic() + left
            try:
                result = experiment.run(config, _progress(observer, deadline))
            except OutOfBudget:
                pending[key] = config
                break
            except Exception as error:  # one run out of memory must not cost a night of the others
                observer.failed(config, error)
                failed.append((config, error.with_traceback(None)))  # its frames would keep the run's tensors alive
                continue
            seconds = time.perf_counter() - start
            if experiment.interruptible:
                seconds = result.pop("seconds")  # of earlier calls, too
            record = Record(experiment.name, key, config, config["seed"], result, seconds, device, versions, commit)
            file.append(record)
            ran += 1
            estimator.add(record)
            observer.finished(record)
        records = [record for record in file.records if record.key in wanted]
    return SweepReport(records, ran, failed, estimator.shortest_first(pending.values()))
