"""`dynamask experiment` as a person types it; a killed and resumed one is in `test_sweep.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from dynamask.cli import common, main
from dynamask_lab.studies import MQAR, Record, read_results, run_key
from dynamask_lab.sweeps.provenance import device_name
from dynamask_lab.sweeps.results import ResultsFile


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def dynamask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, for a new one takes seconds to import torch: its exit code and what it printed."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["dynamask", "experiment", *arguments])
        monkeypatch.setattr(common.console, "_width", 200)
        monkeypatch.setattr(common.errors, "_width", 200)
        with pytest.raises(SystemExit) as ended:
            main.main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_help_and_the_list_of_experiments_teach(dynamask: Command) -> None:
    helped = dynamask("--help")
    assert helped.returncode == 0
    assert "--budget 25m" in helped.stdout
    listed = dynamask()
    assert listed.returncode == 0
    assert "mqar" in listed.stdout
    assert "smoke (10)" in listed.stdout


def test_list_says_what_is_done_and_left_and_writes_nothing(dynamask: Command, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    fresh = dynamask("mqar", "--size", "smoke", "--results", str(path), "--list")
    assert (fresh.returncode, "0 done, 10 to do" in fresh.stdout) == (0, True)
    assert not path.exists()
    config = MQAR.configs("smoke")[0]
    with ResultsFile(path) as file:
        file.append(Record("mqar", run_key("mqar", config), config, 0, {}, 12.5, "another machine", {}, None))
    listed = dynamask("mqar", "--size", "smoke", "--results", str(path), "--list")
    assert "1 done, 9 to do" in listed.stdout
    assert "12.5" in listed.stdout
    assert len(read_results(path)) == 1


def test_list_estimates_for_runs_that_share_the_device(dynamask: Command, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    config = MQAR.configs("smoke")[0]
    with ResultsFile(path) as file:
        file.append(Record("mqar", run_key("mqar", config), config, 0, {}, 12.5, device_name(2), {}, None))
    command = ("mqar", "--size", "smoke", "--results", str(path), "--list")
    assert "on this device with 2 workers" in " ".join(dynamask(*command, "--workers", "2").stdout.split())
    assert "on this device" not in dynamask(*command).stdout, "a run alone takes another time"


def test_an_exhausted_budget_says_how_to_go_on(dynamask: Command, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    done = dynamask("mqar", "--size", "smoke", "--results", str(path), "--budget", "0.0001s")
    assert done.returncode == 0, done.stderr
    assert "0 of 10 runs" in done.stdout
    assert "10 runs are left: run the same command again" in done.stderr
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mqr", "--results", "r.jsonl"], "did you mean 'mqar'"),
        (["mqar"], "say where the runs go"),
        (["mqar", "--results", "r.jsonl", "--budget", "soon"], "write 25m"),
        (["mqar", "--results", "r.jsonl", "--workers", "0"], "--workers must be at least 1"),
        (["mqar", "--results", "r.jsonl", "--size", "papr"], "did you mean 'paper'"),
        (["mqar", "--results", "no/such/r.jsonl"], "cannot write results to"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(
    dynamask: Command, arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = dynamask(*[str(tmp_path / each) if each.endswith(".jsonl") else each for each in arguments])
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
