"""`dynamask experiment` as a person types it; a killed and resumed one is in `test_sweep.py`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from dynamask.cli import common, main
from dynamask.errors import UsageError
from dynamask_lab import studies
from dynamask_lab.report.results import render_results
from dynamask_lab.studies import EXPERIMENTS, MQAR, Record, check_experiment, read_results, run_key
from dynamask_lab.sweeps.display import runs_table
from dynamask_lab.sweeps.provenance import device_name
from dynamask_lab.sweeps.results import ResultsFile
from tests.cli.conftest import refused_without_torch


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
    assert not path.exists(), "nothing came of it"


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


def test_unknown_names_need_no_torch(tmp_path: Path) -> None:
    refused_without_torch(
        ("experiment mqr", "experiment mqar --budget -1", "experiment mqar", "benchmark model --preset tny"), tmp_path
    )


def test_every_experiment_announced_is_there() -> None:
    for name, experiment in EXPERIMENTS.items():
        assert name == experiment.name
        assert getattr(studies, name.upper()) is experiment
        check_experiment(name)
    with pytest.raises(UsageError) as refused:
        check_experiment("mqr")
    assert str(refused.value).endswith(f"there are {', '.join(sorted(EXPERIMENTS))}")


def test_list_fits_a_terminal(dynamask: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns every setting in which runs differ is there in full, and no two runs read alike."""
    configs = MQAR.configs("smoke")
    for width in (80, 200):
        table = runs_table(MQAR, configs, [], 1, width)
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(table)
        printed = console.export_text()
        assert "…" not in printed
        assert max(map(len, printed.splitlines())) <= width
        cells = {tuple(column._cells[row] for column in table.columns) for row in range(len(configs))}
        assert len(cells) == len(configs)


def test_an_interrupted_sweep_says_how_to_go_on(
    dynamask: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamask_lab.studies.run_sweep", interrupted)
    done = dynamask("mqar", "--size", "smoke", "--results", str(tmp_path / "r.jsonl"))
    assert done.returncode == 130
    assert "run the same command again to go on" in " ".join(done.stderr.split())


def test_a_failed_sweep_leaves_no_empty_file(tmp_path: Path) -> None:
    with ResultsFile(tmp_path / "new.jsonl"):
        assert (tmp_path / "new.jsonl").exists()
    assert not (tmp_path / "new.jsonl").exists()
    (tmp_path / "old.jsonl").touch()
    with ResultsFile(tmp_path / "old.jsonl"):
        pass
    assert (tmp_path / "old.jsonl").exists(), "another's file is not removed"


def test_a_report_outside_a_checkout_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run `dynamask report results` in a checkout"):
        render_results(tmp_path / "lab" / "results", tmp_path / "docs" / "results")
    assert list(tmp_path.iterdir()) == []
