"""Sweeps on a terminal: the progress of one that runs, and tables of what is done, to do, and found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from dynamask_lab.sweeps.budget import format_seconds
from dynamask_lab.sweeps.provenance import device_name
from dynamask_lab.sweeps.registry import Config, Experiment
from dynamask_lab.sweeps.results import Record, run_key
from dynamask_lab.sweeps.schedule import Estimator, Observer
from dynamask_lab.sweeps.workers import places


class SweepDisplay(Observer):
    """A bar for the sweep, one for each run in progress, and a line for each run that ends. Use as a context manager.

    Args:
        console: where to draw.
        configs: the sweep's runs; those settings are shown in which they differ.
    """

    def __init__(self, console: Console, configs: Sequence[Config]) -> None:
        self.console = console
        self.configs = [*configs]
        self.varied = _varied(configs)
        # Names of many settings are longer than a line: they come last, and get what the bars leave.
        name = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = (BarColumn(20), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(), name)
        self.bars = Progress(*columns, console=console, transient=True, expand=True)
        self.sweep = self.bars.add_task("sweep")
        self.total = 0
        self.runs: dict[str, tuple[TaskID, str]] = {}

    def resumed(self, finished: int, pending: int, dropped: int) -> None:
        """See `Observer.resumed`."""
        self.total = finished + pending
        self.bars.update(self.sweep, total=self.total, completed=finished)
        if dropped:
            self._say(f"cut off {dropped} bytes of a run that was being written when the last sweep was killed")
        if finished:
            self._say(f"{finished} of {finished + pending} runs stand in the file already")

    def added(self, configs: Sequence[Config]) -> None:
        """See `Observer.added`."""
        self.configs += configs
        self.varied = _varied(self.configs)
        self.total += len(configs)
        self.bars.update(self.sweep, total=self.total)

    def started(self, config: Config, estimate: float | None) -> None:
        """See `Observer.started`."""
        guess = "" if estimate is None else f", about {format_seconds(estimate)}"
        name = escape(self._name(config) + guess)
        self.runs[_key(config)] = (self.bars.add_task(name, total=1.0), name)

    def advanced(self, config: Config, share: float, note: str) -> None:
        """See `Observer.advanced`."""
        bar, name = self.runs[_key(config)]
        self.bars.update(bar, completed=share, description=f"[dim]{escape(note)}[/] {name}" if note else name)

    def finished(self, record: Record) -> None:
        """See `Observer.finished`."""
        self.interrupted(record.config)
        self.bars.advance(self.sweep)
        plain = {key: value for key, value in record.result.items() if isinstance(value, (int, float))}
        figures = ", ".join(f"{key} {_cell(value)}" for key, value in plain.items())
        self._say(f"{self._name(record.config)}: {figures} in {format_seconds(record.seconds)}")

    def failed(self, config: Config, error: Exception) -> None:
        """See `Observer.failed`."""
        self.interrupted(config)
        self._say(f"{self._name(config)}: {type(error).__name__}: {error}", style="bold red")

    def interrupted(self, config: Config) -> None:
        """See `Observer.interrupted`."""
        bar, _ = self.runs.pop(_key(config))
        self.bars.remove_task(bar)

    def _name(self, config: Config) -> str:
        return " ".join(f"{key}={_cell(config[key])}" for key in self.varied if config.get(key) is not None) or "run"

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(escape(text), style=style, highlight=False, soft_wrap=True)

    def __enter__(self) -> SweepDisplay:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()


def runs_table(
    experiment: Experiment, configs: Sequence[Config], records: Sequence[Record], workers: int = 1, width: int = 200
) -> Table:
    """List every run with the settings in which they differ, and its time: measured, or estimated for this device.

    The settings have a column each where they fit, and else one for all, as name=value.

    Args:
        experiment: whose runs.
        configs: the runs.
        records: finished ones.
        workers: runs at a time, see `run_sweep`.
        width: of the terminal, in characters.
    """
    done = {record.key: record for record in records}
    estimator = Estimator(experiment, records, device_name(Counter(places(workers)).most_common(1)[0][1]))
    varied = _varied(configs)
    together = _width([varied, *([_cell(config.get(key)) for key in varied] for config in configs)]) > width - _STATE
    table = Table(*(["run"] if together else varied), Column("state", no_wrap=True), Column("seconds", no_wrap=True))

    def settings(config: Config) -> list[str]:
        cells = {key: _cell(config.get(key)) for key in varied}
        return [" ".join(f"{key}={cell}" for key, cell in cells.items() if cell)] if together else [*cells.values()]

    finished = [config for config in configs if run_key(experiment.name, config) in done]
    pending = estimator.shortest_first(config for config in configs if run_key(experiment.name, config) not in done)
    for config in finished:
        measured = done[run_key(experiment.name, config)].seconds
        table.add_row(*settings(config), "done", f"{measured:.1f}")
    estimates = [estimator.seconds(config) for config in pending]
    for config, estimate in zip(pending, estimates, strict=True):
        guess = "?" if estimate is None else f"about {estimate:.1f}"
        table.add_row(*settings(config), "to do", guess)
    known = [estimate for estimate in estimates if estimate is not None]
    at_a_time = f" with {workers} workers" if workers > 1 else ""
    time_left = f", about {format_seconds(sum(known) / workers)} on this device{at_a_time}" if known else ""
    table.caption = f"{len(finished)} done, {len(pending)} to do{time_left}"
    return table


def summary_table(rows: Sequence[dict[str, str]], title: str) -> Table:
    """An experiment's summary; the columns are those of any row, in order."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table


_STATE = 30
"""Characters of a line that the columns for state and seconds take."""


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Characters that a table of these rows is wide."""
    return sum(3 + max(map(len, column)) for column in zip(*rows, strict=True))


def _key(config: Config) -> str:
    return json.dumps(config, sort_keys=True)


def _varied(configs: Sequence[Config]) -> list[str]:
    """The settings that are not the same in all of the runs; one that a run leaves out is at its default there."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
