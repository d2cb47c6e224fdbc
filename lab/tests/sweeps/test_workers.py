"""Sweeps in several processes: the same findings as in one, and what a death, a deadline and a Ctrl-C cost.

Every process imports torch, which takes seconds: few are started, and each test asks much of them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask_lab.language.engine import STATE_FOLDER
from dynamask_lab.studies import SCALING, Experiment, Observer, Record, read_results, run_sweep
from dynamask_lab.sweeps.provenance import device_name
from dynamask_lab.sweeps.results import ResultsFile
from dynamask_lab.sweeps.schedule import OutOfBudget, Schedule
from dynamask_lab.sweeps.workers import WorkerDied, places, run_in_workers, visible_gpus


def act(config: dict[str, Any], progress: Callable[[float, str], None]) -> dict[str, Any]:
    """A run that does what its config says, and keeps the state of what it was stopped in."""
    what, state = config["what"], Path(config["folder"]) / f"{config['cost']}.state"
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    done = int(state.read_text()) if state.exists() else 0
    if what == "wait" and not done:
        try:
            while True:
                done += 1
                time.sleep(0.01)
                progress(0.5, "waiting")
        except OutOfBudget:
            state.write_text(str(done))
            raise
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
    return {"process": os.getpid(), "done": done, "seconds": 1.0, **{name: os.environ.get(name) for name in names}}


ACTING = Experiment(
    name="acting",
    description="",
    run=act,
    sizes={},
    cost=lambda config: config["cost"],
    kind=lambda config: "",
    summary=lambda records: [],
    interruptible=True,
)


class Log(Observer):
    """What happened, in order; and, once two runs wait, the end of the time there is."""

    schedule: Schedule

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.waiting: set[int] = set()

    def started(self, config: dict[str, Any], estimate: float | None) -> None:
        self.events.append(("started", config["cost"]))

    def advanced(self, config: dict[str, Any], share: float, note: str) -> None:
        self.waiting.add(config["cost"])
        if len(self.waiting) == 2:
            self.schedule.deadline = time.monotonic()

    def finished(self, record: Record) -> None:
        self.events.append(("finished", record.config["cost"]))

    def failed(self, config: dict[str, Any], error: Exception) -> None:
        self.events.append(("failed", config["cost"]))

    def interrupted(self, config: dict[str, Any]) -> None:
        self.events.append(("interrupted", config["cost"]))


def test_the_dead_are_replaced_and_at_the_deadline_runs_are_stopped_to_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)

    def config(cost: int, what: str) -> dict[str, Any]:
        return {"cost": cost, "what": what, "folder": str(tmp_path), "seed": 0}

    kinds = {1: "die", 2: "raise", 3: "end", 4: "end", 5: "end", 10: "wait", 11: "wait", 12: "wait"}
    configs = [config(cost, what) for cost, what in kinds.items()]
    log, path = Log(), tmp_path / "r.jsonl"
    with ResultsFile(path) as file:
        # Told of nothing new until three runs have ended.
        schedule = Schedule(
            ACTING, configs[:5], file, None, lambda finished: configs if len(finished) == 3 else [], log
        )
        log.schedule = schedule
        run_in_workers(schedule, 2)
        left, failed = schedule.left(), {config["cost"]: error for config, error in schedule.failed}
    assert multiprocessing.active_children() == []
    assert [cost for what, cost in log.events if what == "started"] == [1, 2, 3, 4, 5, 10, 11], "shortest first"
    assert set(failed) == {1, 2}
    assert isinstance(failed[1], WorkerDied)
    assert "SIGKILL" in str(failed[1])
    assert isinstance(failed[2], torch.cuda.OutOfMemoryError)
    assert str(failed[2]) == "CUDA out of memory"
    assert {cost for what, cost in log.events if what == "interrupted"} == {10, 11}
    assert [config["cost"] for config in left] == [10, 11, 12]
    records = read_results(path)
    assert sorted(record.config["cost"] for record in records) == [3, 4, 5]
    assert {record.result["CUDA_VISIBLE_DEVICES"] for record in records} <= {"5", "7"}
    assert {record.result["OMP_NUM_THREADS"] for record in records} == {"1"}, "what the user has set stays"
    assert all(int(record.result["TORCHINDUCTOR_COMPILE_THREADS"]) >= 1 for record in records)
    assert {record.device for record in records} == {device_name()}, "each has a GPU to itself"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ

    again = run_sweep(ACTING, [config for config in left if config["cost"] < 12], path)
    saved = {int(state.stem): int(state.read_text()) for state in tmp_path.glob("*.state")}
    assert {record.config["cost"]: record.result["done"] for record in again.records} == saved
    assert min(saved.values()) >= 1


class CtrlC(KeyboardInterrupt):
    """Of this test. A sweep in workers raises KeyboardInterrupt for a SIGTERM, too, such as a time limit sends to the
    tests of a loaded machine: that one is not what the test waits for."""


class BreakOff(Observer):
    """Ctrl-C after so many runs."""

    def __init__(self, after: int) -> None:
        self.left = after

    def finished(self, record: Record) -> None:
        self.left -= 1
        if not self.left:
            raise CtrlC


def test_two_workers_find_what_one_finds_and_one_goes_on_where_they_were_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATE_FOLDER, str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tuning = SCALING.configs("smoke")

    def follow_up(finished: Any) -> list[dict[str, Any]]:
        return SCALING.configs("smoke", finished)

    together = tmp_path / "together.jsonl"
    with pytest.raises(CtrlC):
        run_sweep(SCALING, tuning, together, workers=2, follow_up=follow_up, observer=BreakOff(18))
    assert multiprocessing.active_children() == []
    by_workers = read_results(together)
    assert 18 <= len(by_workers) < 20
    assert {record.device for record in by_workers} == {device_name(2)}
    assert device_name(2) != device_name()
    rest = run_sweep(SCALING, tuning, together, follow_up=follow_up)
    assert (rest.ran, rest.left, rest.failed) == (20 - len(by_workers), [], [])
    assert rest.records[: len(by_workers)] == by_workers

    alone = run_sweep(SCALING, tuning, tmp_path / "alone.jsonl", follow_up=follow_up).records
    assert len(alone) == 20
    losses = {record.key: [look["loss"] for look in record.result["curve"]] for record in alone}
    found = {record.key: [look["loss"] for look in record.result["curve"]] for record in rest.records}
    assert found.keys() == losses.keys()
    for key, curve in found.items():
        assert curve == pytest.approx(losses[key], rel=1e-6)


def test_without_time_no_process_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamask_lab.sweeps.workers._Pool._start", lambda *_: pytest.fail("started"))
    config = {"cost": 1, "what": "end", "folder": str(tmp_path), "seed": 0}
    report = run_sweep(ACTING, [config], tmp_path / "r.jsonl", 1.0, workers=2)
    assert (report.ran, report.left) == (0, [config])


def test_what_no_other_process_could_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    nested = dataclasses.replace(ACTING, run=lambda config, progress: {})
    with pytest.raises(InvalidInputError, match="function of a module"):
        run_sweep(nested, [], path, workers=2)
    with pytest.raises(InvalidInputError, match="workers must be at least 1; got 0"):
        run_sweep(ACTING, [], path, workers=0)
    assert not path.exists()


def test_gpus_are_named_as_the_environment_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-9a, GPU-3c")
    assert visible_gpus() == ["GPU-9a", "GPU-3c"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus() == []


def test_a_worker_has_a_gpu_for_each_process_that_shares_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert places(3) == ["0", "1", "2"]
    monkeypatch.setenv("DYNAMASK_PROCESSES", "2")
    assert places(3) == ["0,1", "2,3", "0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,0,1,4")
    assert places(2) == ["2,3", "0,1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert places(2) == [None, None]
