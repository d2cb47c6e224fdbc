"""Which run of a sweep comes next, what became of the others, and what the budget still allows."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dynamask.errors import InvalidInputError
from dynamask_lab.sweeps import provenance
from dynamask_lab.sweeps.registry import Config, Experiment
from dynamask_lab.sweeps.results import Record, ResultsFile, run_key

FollowUp = Callable[[Sequence[Record]], Sequence[Config]]
"""Told the finished runs, the configs that they decide; those known already may be among them."""


class OutOfBudget(Exception):
    """Raised by a run's `progress` when it must stop, for an interruptible run to save its state."""


_WHOLE = 0.75
_SHORTEST_PART = 5.0
"""Seconds of budget below which it is not worth to go on with a run that will not be finished."""


class Observer:
    """Told how a sweep goes. Does nothing; override what you want to show."""

    def resumed(self, finished: int, pending: int, dropped: int) -> None:
        """Before the first run: runs already in the file, runs to do, bytes of an unfinished line cut off."""

    def started(self, config: Config, estimate: float | None) -> None:
        """A run begins; estimate in seconds, None while nothing has been measured."""

    def advanced(self, config: Config, share: float, note: str) -> None:
        """A run in progress has done this share of its work, from 0 to 1."""

    def finished(self, record: Record) -> None:
        """A run is over and on the disk."""

    def failed(self, config: Config, error: Exception) -> None:
        """A run raised; the sweep goes on with the others."""

    def interrupted(self, config: Config) -> None:
        """A run was stopped, by the budget for one, and has saved its state."""

    def added(self, configs: Sequence[Config]) -> None:
        """Finished runs have decided on these."""


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


@dataclass(frozen=True)
class Run:
    """A run that has been handed out.

    Attributes:
        key: `run_key` of experiment and config.
        config: its settings.
        device: name of what it runs on.
    """

    key: str
    config: Config
    device: str


class Schedule:
    """The runs of a sweep. Hands them out shortest first, and writes down what comes back.

    Args:
        experiment: whose runs.
        configs: the runs; one that is listed twice runs once.
        file: the results, open; runs that stand in it are not handed out.
        deadline: on the clock of `time.monotonic`, or None.
        follow_up: asked whenever a run is over, and at the beginning.
        observer: told how it goes.
        whole: hand out no run that would not end in the time left, also where runs can be interrupted. Three quarters
            of the estimate count: runs that share a device are quicker when others have ended.

    Attributes:
        ran: runs finished so far.
        failed: runs that raised, with the error.

    Raises:
        InvalidInputError: a config that is not plain JSON or has no integer "seed".
    """

    def __init__(
        self,
        experiment: Experiment,
        configs: Sequence[Config],
        file: ResultsFile,
        deadline: float | None,
        follow_up: FollowUp | None,
        observer: Observer,
        *,
        whole: bool = False,
    ) -> None:
        self.experiment, self.deadline, self._whole = experiment, deadline, whole
        self.ran = 0
        self.failed: list[tuple[Config, Exception]] = []
        self._file, self._follow_up, self._observer = file, follow_up, observer
        self._versions, self._commit = provenance.versions(), provenance.commit()
        self._estimators: dict[str, Estimator] = {}
        self._wanted: dict[str, Config] = {}
        self._pending: dict[str, Config] = {}
        self._want([*configs, *(follow_up(file.records) if follow_up else ())])
        observer.resumed(len(self._wanted) - len(self._pending), len(self._pending), file.dropped)

    @property
    def waiting(self) -> int:
        """Runs to hand out, as far as can be said without a device; none once time is up."""
        return len(self._pending) if self._fits(0.0) else 0

    @property
    def stop_at(self) -> float | None:
        """When runs in progress are to be stopped, on the clock of `time.monotonic`; None: they are left to end."""
        return self.deadline if self.experiment.interruptible else None

    def next(self, device: str) -> Run | None:
        """The shortest run to do, or None where the budget has no room for it, and so for none."""
        # Every run sharpens the estimates, so the order is settled one run at a time.
        estimator = self._estimator(device)
        for config in estimator.shortest_first(self._pending.values())[:1]:
            estimate = estimator.seconds(config)
            if not self._fits(estimate or 0.0):
                return None
            run = Run(run_key(self.experiment.name, config), config, device)
            del self._pending[run.key]
            self._observer.started(config, estimate)
            return run
        return None

    def advanced(self, run: Run, share: float, note: str) -> None:
        """The run has done this share of its work."""
        self._observer.advanced(run.config, share, note)

    def finished(self, run: Run, result: dict[str, object], seconds: float) -> None:
        """Write the result down, and take up what it decides."""
        if self.experiment.interruptible:
            seconds = result.pop("seconds")  # type: ignore[assignment]  # of earlier calls, too
        record = Record(
            *(self.experiment.name, run.key, run.config, run.config["seed"], result, seconds),
            *(run.device, self._versions, self._commit),
        )
        self._file.append(record)
        self.ran += 1
        for estimator in self._estimators.values():
            estimator.add(record)
        self._observer.finished(record)
        if self._follow_up:
            more = self._want(self._follow_up(self._file.records))
            if more:
                self._observer.added(more)

    def failed_with(self, run: Run, error: Exception) -> None:
        """Nothing is written, so that the next call tries again."""
        self._observer.failed(run.config, error)
        self.failed.append((run.config, error.with_traceback(None)))  # its frames would keep the run's tensors alive

    def interrupted(self, run: Run) -> None:
        """The run has saved its state, and is to be continued."""
        self._pending[run.key] = run.config
        self._observer.interrupted(run.config)

    def records(self) -> list[Record]:
        """The finished runs, earlier ones included, in the file's order."""
        return [record for record in self._file.records if record.key in self._wanted]

    def left(self) -> list[Config]:
        """Runs not done, shortest first."""
        estimator = next(iter(self._estimators.values()), None) or self._estimator("")
        return estimator.shortest_first(self._pending.values())

    def _fits(self, seconds: float) -> bool:
        """Whether a run that takes so long may start."""
        if self.deadline is None:
            return True
        left = self.deadline - time.monotonic()
        if self._whole:
            return left > 0 and left >= _WHOLE * seconds
        return left > 0 and left >= (_SHORTEST_PART if self.experiment.interruptible else seconds)

    def _want(self, configs: Sequence[Config]) -> list[Config]:
        """Add those that are new; return them."""
        done = {record.key for record in self._file.records}
        keyed = {run_key(self.experiment.name, config): config for config in configs}
        new = {key: config for key, config in keyed.items() if key not in self._wanted}
        self._wanted |= new
        self._pending |= {key: config for key, config in new.items() if key not in done}
        return list(new.values())

    def _estimator(self, device: str) -> Estimator:
        if device not in self._estimators:
            self._estimators[device] = Estimator(self.experiment, self._file.records, device)
        return self._estimators[device]
