"""What an experiment is, and the registry the sweep runner and the command line find it in."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamask.errors import InvalidInputError, UsageError, did_you_mean
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Section

Config = dict[str, Any]
"""A run's settings: plain JSON with string keys, "seed" among them."""

Progress = Callable[[float, str], None]
"""Told the share of a run that is done, from 0 to 1, and how it stands."""


@dataclass(frozen=True)
class Experiment:
    """One kind of run, and the sweeps over it that are worth a name.

    Attributes:
        name: what `dynamask experiment NAME` calls it.
        description: one line for people.
        run: does one run; given its config and whom to tell about progress, returns a JSON-able result.
        sizes: name of a sweep -> its configs.
        cost: a run's cost relative to the others', in any unit; times of finished runs turn it into seconds.
        kind: names the runs whose seconds per cost are alike, such as those that differ in learning rate alone.
        summary: rows (column -> cell) that say what the finished runs found.
        interruptible: when `progress` raises, a run saves its state before it passes the error on, and the next call
            with the same config continues it; its result then tells its "seconds" over all calls. A budget stops such a
            run where it is.
        trains_language_models: its runs are `run_language`'s, whose models `kept_models` can keep.
        follow_up: runs of a sweep that earlier ones decide: given its name and what is finished, the configs known by
            now, none as long as something is missing.
        lenders: name of a sweep of one seed -> the sweep whose spread its intervals borrow.
    """

    name: str
    description: str
    run: Callable[[Config, Progress], dict[str, Any]]
    sizes: Mapping[str, Callable[[], list[Config]]]
    cost: Callable[[Config], float]
    kind: Callable[[Config], str]
    summary: Callable[[Sequence[Record]], list[dict[str, str]]]
    interruptible: bool = False
    trains_language_models: bool = False
    follow_up: Callable[[str, Sequence[Record]], list[Config]] | None = None
    lenders: Mapping[str, str] = field(default_factory=dict)

    def configs(self, size: str, finished: Sequence[Record] = ()) -> list[Config]:
        """The configs of a named sweep, as far as the finished runs decide them.

        Raises UsageError for an unknown name, with the nearest known one.
        """
        if size not in self.sizes:
            raise UsageError(
                f"{self.name} has no size {size!r}{did_you_mean(size, self.sizes)}; there are {', '.join(self.sizes)}"
            )
        own = self.sizes[size]()
        return own if self.follow_up is None else own + self.follow_up(size, finished)


EXPERIMENTS: dict[str, Experiment] = {}
"""Those that were registered: the announced ones after `load_announced`."""

_ANNOUNCED: dict[str, str] = {}


def announce(name: str, module: str) -> None:
    """Make the name of an experiment known before its module is imported, which takes seconds.

    Args:
        name: the experiment's.
        module: full name of the module that registers it.
    """
    _ANNOUNCED[name] = module


def load_announced() -> None:
    """Import the modules of all experiments that were announced."""
    for module in _ANNOUNCED.values():
        importlib.import_module(module)


def check_experiment(name: str) -> None:
    """Raise UsageError for an unknown experiment, naming those there are. Imports none of them."""
    known = sorted({*EXPERIMENTS, *_ANNOUNCED})
    if name not in known:
        raise UsageError(f"unknown experiment {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")


def register(experiment: Experiment) -> None:
    """Make the experiment known by its name. Raises InvalidInputError if another one has it."""
    if experiment.name in _ANNOUNCED:
        importlib.import_module(_ANNOUNCED[experiment.name])  # where it is this module, it is being imported already
    if EXPERIMENTS.get(experiment.name, experiment) is not experiment:
        raise InvalidInputError(f"an experiment named {experiment.name!r} exists already; choose another name")
    EXPERIMENTS[experiment.name] = experiment


def get_experiment(name: str) -> Experiment:
    """The experiment of that name. Raises UsageError for an unknown one, naming those there are."""
    check_experiment(name)
    if name not in EXPERIMENTS:
        load_announced()
    return EXPERIMENTS[name]


@dataclass(frozen=True)
class Lender:
    """The sweep whose spread another sweep borrows.

    Attributes:
        size: its name.
        records: its finished runs.
    """

    size: str
    records: Sequence[Record]


Report = Callable[..., Section]
"""Turns the finished runs of one sweep, at least one, and the folder of its pictures into their section of `dynamask
report results`; for a sweep in `Experiment.lenders` it is given the argument `lender` as well, a `Lender`."""

REPORTS: dict[str, Report] = {}
"""Experiment -> its report. An experiment without one is shown as the table of its summary."""


def reports(name: str) -> Callable[[Report], Report]:
    """Register the decorated function as the report of experiment `name`. It writes its pictures to the folder."""

    def register_report(report: Report) -> Report:
        REPORTS[name] = report
        return report

    return register_report
