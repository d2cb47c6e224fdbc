"""The sweep runner: what it skips, in which order it goes, when it stops, and what a kill costs."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dynamask.errors import InvalidInputError, UsageError
from dynamask_lab.studies import (
    Experiment,
    Observer,
    Record,
    get_experiment,
    read_results,
    register,
    run_key,
    run_sweep,
)
from dynamask_lab.sweeps.budget import format_seconds, parse_seconds
from dynamask_lab.sweeps.provenance import commit, device_name, shared, versions
from dynamask_lab.sweeps.results import ResultsFile
from dynamask_lab.sweeps.schedule import Estimator


def toy(run: Any = None, name: str = "toy") -> Experiment:
    """Runs that cost what their config says; each kind has a speed of its own."""

    def instantly(config: dict, progress: Any) -> dict:
        progress(1.0, "")
        return {"twice": 2 * config["cost"]}

    return Experiment(
        name=name,
        description="",
        run=run or instantly,
        sizes={},
        cost=lambda config: config["cost"],
        kind=lambda config: config.get("kind", ""),
        summary=lambda records: [],
    )


def configs(*costs: float, **more: Any) -> list[dict]:
    return [{"cost": cost, "seed": 0, **more} for cost in costs]


def timed(config: dict, seconds: float, device: str | None = None) -> Record:
    key = run_key("toy", config)
    return Record("toy", key, config, 0, {}, seconds, device or device_name(), {}, None)


class Log(Observer):
    def __init__(self) -> None:
        self.ran: list[tuple[float, float | None]] = []
        self.errors: list[str] = []
        self.seen: tuple[int, int, int] | None = None

    def resumed(self, finished: int, pending: int, dropped: int) -> None:
        self.seen = (finished, pending, dropped)

    def started(self, config: dict, estimate: float | None) -> None:
        self.ran.append((config["cost"], estimate))

    def failed(self, config: dict, error: Exception) -> None:
        self.errors.append(str(error))


def test_every_run_once_cheapest_first_with_where_it_comes_from(tmp_path: Path) -> None:
    log, path = Log(), tmp_path / "r.jsonl"
    report = run_sweep(toy(), [*configs(3, 1, 2), *configs(1)], path, observer=log)
    assert [cost for cost, _ in log.ran] == [1, 2, 3]
    assert log.ran[0][1] is None
    assert log.ran[1][1] is not None
    assert (report.ran, report.left, report.failed, log.seen) == (3, [], [], (0, 3, 0))
    assert report.records == read_results(path)
    first = json.loads(path.read_text().splitlines()[0])
    assert first["config"] == {"cost": 1, "seed": 0}
    assert (first["seed"], first["result"], first["device"]) == (0, {"twice": 2}, device_name())
    assert first["seconds"] >= 0
    assert {"python", "torch", "transformers", "dynamask"} <= set(first["versions"]) == set(versions())
    assert first["commit"] == commit()


def test_what_stands_in_the_file_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run_sweep(toy(), configs(1, 2), path)
    before = path.read_bytes()
    log = Log()
    report = run_sweep(toy(), configs(2, 1, 5), path, observer=log)
    assert [cost for cost, _ in log.ran] == [5]
    assert path.read_bytes().startswith(before)
    assert sorted(record.config["cost"] for record in report.records) == [1, 2, 5]
    other_seed = [{**config, "seed": 1} for config in configs(1)]
    assert run_sweep(toy(), other_seed, path).ran == 1
    assert run_sweep(toy(name="other"), configs(1), path).ran == 1, "one file may hold several experiments"


def test_the_budget_starts_nothing_that_would_not_end_in_it(tmp_path: Path) -> None:
    def wait(config: dict, progress: Any) -> dict:
        time.sleep(config["cost"] / 100)
        return {}

    path = tmp_path / "r.jsonl"
    report = run_sweep(toy(wait), configs(10_000, 2, 1), path, budget_seconds=2.0)
    assert report.ran == 2
    assert report.left == configs(10_000)
    assert run_sweep(toy(wait), configs(1, 3), path, budget_seconds=0.0).left == configs(3)


def test_a_budget_stops_an_interruptible_run_which_then_goes_on(tmp_path: Path) -> None:
    done: dict[str, int] = {}

    def stepwise(config: dict, progress: Any) -> dict:
        while done.get("steps", 0) < 40:
            done["steps"] = done.get("steps", 0) + 1
            time.sleep(0.02)
            progress(done["steps"] / 40, "")
        return {"steps": done["steps"], "seconds": 12.5}

    experiment = dataclasses.replace(toy(stepwise), interruptible=True)
    # An estimate far beyond the budget does not keep it from starting.
    with ResultsFile(tmp_path / "r.jsonl") as file:
        file.append(timed({"cost": 2, "seed": 0}, 1000.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynamask_lab.sweeps.schedule._SHORTEST_PART", 0.0)
        first = run_sweep(experiment, configs(1), tmp_path / "r.jsonl", 0.2)
    assert (first.ran, len(first.left), first.failed) == (0, 1, [])
    assert 0 < done["steps"] < 40
    second = run_sweep(experiment, configs(1), tmp_path / "r.jsonl")
    assert (second.ran, second.records[0].result, second.records[0].seconds) == (1, {"steps": 40}, 12.5)


def test_whole_runs_start_where_three_quarters_of_the_estimate_fit(tmp_path: Path) -> None:
    done = dataclasses.replace(toy(lambda config, progress: {"seconds": 1.0}), interruptible=True)
    path = tmp_path / "r.jsonl"
    with ResultsFile(path) as file:
        file.append(timed({"cost": 1, "seed": 1}, 100.0))
    for budget, ran in ((60.0, 0), (80.0, 1)):
        assert run_sweep(done, configs(1), path, budget, whole=True).ran == ran


def test_a_device_that_runs_shared_is_told_from_its_name() -> None:
    assert shared(device_name(3))
    assert shared("NVIDIA H200 (4 runs at a time))"), "as some lines have it"
    assert not shared(device_name())


def test_too_little_budget_does_not_take_up_an_interruptible_run(tmp_path: Path) -> None:
    experiment = dataclasses.replace(toy(), interruptible=True)
    assert run_sweep(experiment, configs(1), tmp_path / "r.jsonl", 1.0).ran == 0


def test_a_first_run_starts_without_an_estimate_and_an_empty_budget_starts_none(tmp_path: Path) -> None:
    assert run_sweep(toy(), configs(1), tmp_path / "a", budget_seconds=0.0).ran == 0
    assert run_sweep(toy(), configs(1e12), tmp_path / "b", budget_seconds=60.0).ran == 1
    with pytest.raises(InvalidInputError, match="budget_seconds"):
        run_sweep(toy(), configs(1), tmp_path / "c", budget_seconds=-1.0)


def test_estimates_are_the_kind_s_median_rate_on_this_device_and_the_slowest_kind_s_elsewhere() -> None:
    records = [timed({"cost": 10, "seed": seed, "kind": "a"}, seconds) for seed, seconds in enumerate((10, 20, 90))]
    records += [timed({"cost": 10, "seed": 0, "kind": "b"}, 50.0)]
    records += [timed({"cost": 10, "seed": 0, "kind": "c"}, 1e6, device="another machine")]
    estimator = Estimator(toy(), records, device_name())
    [a, b, c] = [{"cost": 5, "seed": 7, "kind": kind} for kind in "abc"]
    assert [estimator.seconds(config) for config in (a, b, c)] == [10.0, 25.0, 25.0]
    cheap_and_slow, dear_and_fast = {"cost": 10, "seed": 1, "kind": "b"}, {"cost": 20, "seed": 1, "kind": "a"}
    assert estimator.shortest_first([cheap_and_slow, dear_and_fast]) == [dear_and_fast, cheap_and_slow]
    assert Estimator(toy(), records[-1:], device_name()).seconds(a) is None


def test_records_of_settings_no_longer_known_are_kept_and_not_measured_by(tmp_path: Path) -> None:
    mqar, path = get_experiment("mqar"), tmp_path / "r.jsonl"
    with ResultsFile(path) as file:
        old = {"attention": "mha", "depth": 2, "seed": 0}
        file.append(Record("mqar", run_key("mqar", old), old, 0, {}, 1.0, device_name(), {}, None))
    assert Estimator(mqar, read_results(path), device_name()).seconds(mqar.configs("smoke")[0]) is None
    assert run_sweep(mqar, [], path).records == []


def test_a_run_that_raises_costs_only_itself_and_is_tried_again(tmp_path: Path) -> None:
    def out_of_memory(config: dict, progress: Any) -> dict:
        if config["cost"] == 1:
            raise RuntimeError("out of memory")
        return {}

    log, path = Log(), tmp_path / "r.jsonl"
    report = run_sweep(toy(out_of_memory), configs(1, 2), path, observer=log)
    assert (report.ran, log.errors) == (1, ["out of memory"])
    assert [config for config, _ in report.failed] == configs(1)
    assert run_sweep(toy(), configs(1, 2), path).ran == 1


def test_mistakes_are_named_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(UsageError, match="did you mean 'mqar'"):
        run_sweep("mqr", configs(1), path)
    with pytest.raises(InvalidInputError, match="seed"):
        run_sweep(toy(), [{"cost": 1}], path)
    assert not path.exists()
    with pytest.raises(InvalidInputError, match="exists already"):
        register(toy(name="mqar"))
    with pytest.raises(UsageError, match="did you mean 'small'"):
        get_experiment("mqar").configs("smal")


@pytest.mark.parametrize(
    ("text", "seconds"), [("25m", 1500), ("1h30m", 5400), ("90s", 90), ("90", 90), ("1.5H", 5400), (" 2m5s ", 125)]
)
def test_spans_of_time(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "25 minutes", "-3m", "0s", "5m!", "h1", "1e3"])
def test_what_is_no_span_of_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write 25m"):
        parse_seconds(text)


def test_spans_are_written_for_reading() -> None:
    assert [format_seconds(s) for s in (7.34, 125, 3599.9, 5400)] == ["7.3s", "2m05s", "1h00m", "1h30m"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """The real thing: the smoke sweep of mqar in a process, SIGKILL while it runs, the same command again."""
    path = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "dynamask", "experiment", "mqar", "--size", "smoke", "--results", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (path.exists() and b"\n" in path.read_bytes()):
        assert process.poll() is None, process.stderr.read()[-2000:] if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = read_results(path)
    total = len(get_experiment("mqar").configs("smoke"))
    assert 1 <= len(before) < total
    with path.open("ab") as file:  # and as if the kill had come in the middle of a line
        file.write(b'{"experiment": "mqar", "key": "12')
    torn = path.read_bytes()

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{len(before)} of {total} runs stand in the file already" in done.stderr
    assert "cut off 33 bytes" in done.stderr
    assert f"mqar smoke: {total} of {total} runs" in done.stdout
    records = read_results(path)
    assert records[: len(before)] == before
    assert path.read_bytes().startswith(torn[:-33])
    assert len({record.key for record in records}) == len(records) == total
