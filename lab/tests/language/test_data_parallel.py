"""A run on two processes has the numbers of a run on one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask_lab.language import data_parallel
from dynamask_lab.language import engine as language
from dynamask_lab.language.data_parallel import PROCESSES, Group
from dynamask_lab.language.engine import LanguageConfig, run_language


def _config(**settings: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {"layers": 2, "width": 32, "heads": 2, "groups": 1, "feed_forward": 48, "corpus": "bytes"}
    shape |= {"length": 32, "batch_tokens": 128, "steps": 30, "validation_tokens": 512, "learning_rate": 1e-2}
    return LanguageConfig(**{**shape, "attention": "mha", **settings}).plain()


def _quiet(share: float, note: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(language.STATE_FOLDER, str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path.cwd(), Path.cwd() / "lab"))))


_LEARNED = {"attention": "dma", "ranking": "learned", "window": 16, "sinks": 2, "local": 4}
_SCORED = {"attention": "dma", "ranking": "attention", "window": 14, "layer_windows": [8, 20], "gate_init": "delta"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        {"attention": "mha"},
        {**_LEARNED, "calibrate_at": 0.5, "batch_tokens": 256},
        {**_SCORED, "recency_spread": 8.0, "score_form": "linear", "gate_rate": 0.1},
    ],
    ids=["dense", "learned", "scored"],
)
def test_two_processes_have_the_losses_of_one(monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]) -> None:
    settings = _config(**form, steps=12)
    monkeypatch.delenv(PROCESSES, raising=False)
    one = run_language(settings, _quiet)
    monkeypatch.setenv(PROCESSES, "2")
    two = run_language(settings, _quiet)
    assert two["processes"] == 2
    assert "processes" not in one
    assert two["training"] == pytest.approx(one["training"], rel=1e-4)
    assert [look["loss"] for look in two["curve"]] == pytest.approx([look["loss"] for look in one["curve"]], rel=1e-4)
    assert two.get("head_windows") == one.get("head_windows")


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_goes_on_as_a_run_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _config()
    whole = run_language(settings, _quiet)

    def stop(share: float, note: str) -> None:
        if round(share * 30) == 20:
            raise TimeoutError

    monkeypatch.setenv(PROCESSES, "2")
    with pytest.raises(TimeoutError):
        run_language(settings, stop)
    monkeypatch.setenv(PROCESSES, "1")
    resumed = run_language(settings, _quiet)
    assert resumed["training"] == pytest.approx(whole["training"], rel=1e-4)


@pytest.mark.slow
def test_a_run_whose_process_ends_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROCESSES, "2")
    own = data_parallel.subprocess.Popen

    def ending(command: list[str]) -> Any:
        return own([command[0], "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(data_parallel, "_PATIENCE", data_parallel.datetime.timedelta(seconds=5))
    monkeypatch.setattr(data_parallel.subprocess, "Popen", ending)
    with pytest.raises((RuntimeError, TimeoutError)):
        run_language(_config(), _quiet)


def test_a_batch_is_shared_evenly_or_not_at_all() -> None:
    assert [list(Group(rank, 2).part(6)) for rank in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InvalidInputError, match="share the 6 sequences"):
        Group(0, 4).part(6)


def test_a_number_of_processes_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("0", "-1", "two"):
        monkeypatch.setenv(PROCESSES, wrong)
        with pytest.raises(InvalidInputError, match=PROCESSES):
            run_language(_config(), _quiet)
    monkeypatch.setenv(PROCESSES, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidInputError, match="1 GPUs are visible"):
        data_parallel.processes()


def test_runs_that_processes_cannot_share_are_refused(tmp_path: Path) -> None:
    noisy = LanguageConfig.of(_config(attention="dma", window=8, rank_noise=0.5))
    with pytest.raises(InvalidInputError, match="rank_noise"):
        language._Run(noisy, tmp_path, Group(0, 2))
    learned = LanguageConfig.of(_config(**_LEARNED))
    with pytest.raises(InvalidInputError, match="a multiple of 8 sequences; got 4"):
        language._Run(learned, tmp_path, Group(0, 2))
