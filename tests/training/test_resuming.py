"""Finished, half-finished, damaged and contested runs: nothing is trained twice, and nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from dynamask.errors import Interrupted, UsageError
from dynamask.lock import locked
from dynamask.training import TrainConfig, checkpoints, open_run, train
from dynamask.training.checkpointing import damage
from tests.training.test_training import losses, settings, text  # noqa: F401 -- a fixture


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A finished run of 6 steps, constant rate, checkpoints after 4 and 6."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train(run_settings(text, output), quiet=True)
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def run_settings(text: Path, output: Path, **changes: Any) -> TrainConfig:  # noqa: F811
    return settings(text, output, **{"steps": 6, "save_every": 2, "schedule": "constant", "keep": 2} | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return open_run(folder)[0].state_dict()


def assert_same(first: Path, second: Path) -> None:
    for (name, one), two in zip(weights(first).items(), weights(second).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, msg=name)


def test_a_finished_run_is_left_as_it_is(text: Path, finished: Path, run: Path) -> None:  # noqa: F811
    lines: list[str] = []
    again = train(run_settings(text, run), report=lines.append)
    assert again.trained == 0
    assert lines == [f"this run is finished: {run} holds the model of step 6; nothing was trained"]
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]
    assert_same(finished, run)
    held_out = [entry["eval_loss"] for entry in again.history if "eval_loss" in entry]
    assert again.loss == held_out[-1]


def test_a_checkpoint_opens_with_its_runs_tokenizer(finished: Path) -> None:
    model, tokenizer = open_run(finished / "checkpoint-4")
    assert model.config.vocab_size >= len(tokenizer)
    assert tokenizer.get_vocab() == open_run(finished)[1].get_vocab()


def test_a_run_killed_before_its_final_save_is_saved_without_another_step(
    text: Path,  # noqa: F811
    finished: Path,
    run: Path,
) -> None:
    expected = json.loads((run / "model" / "trainer_state.json").read_text())
    shutil.rmtree(run / "model")
    result = train(run_settings(text, run), quiet=True)
    assert result.trained == 0
    assert_same(finished, run)
    assert json.loads((run / "model" / "trainer_state.json").read_text())["global_step"] == expected["global_step"] == 6
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]


def test_a_resumed_run_reports_the_steps_that_it_ran(text: Path, finished: Path, run: Path) -> None:  # noqa: F811
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoint-6")
    lines: list[str] = []
    result = train(run_settings(text, run), report=lines.append)
    assert result.trained == 2
    assert "continuing from step 4 of 6" in lines
    assert_same(finished, run)
    summary = next(entry for entry in result.history if "train_loss" in entry)
    assert summary["train_loss"] == pytest.approx(sum(losses(result.history)[step] for step in (5, 6)) / 2)
    assert summary["train_steps_per_second"] == pytest.approx(2 / summary["train_runtime"], rel=0.2)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(
    text: Path,  # noqa: F811
    finished: Path,
    run: Path,
    file: str,
) -> None:
    shutil.rmtree(run / "model")
    damaged = run / "checkpoint-6" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    lines: list[str] = []
    train(run_settings(text, run), report=lines.append)
    assert any(line.startswith(f"{run}/checkpoint-6 is damaged (") and "\n" not in line for line in lines)
    assert "continuing from step 4 of 6" in lines
    assert_same(finished, run)


def test_every_byte_of_a_checkpoint_is_checked(finished: Path, run: Path) -> None:
    checkpoint = run / "checkpoint-6"
    assert damage(checkpoint) is None
    for file in ("model.safetensors", "config.json", "trainer_state.json", "rng_state.pth"):
        whole = (checkpoint / file).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        (checkpoint / file).write_bytes(flipped)
        assert damage(checkpoint) is not None, file
        (checkpoint / file).write_bytes(whole)
    (checkpoint / "config.json").unlink()
    assert damage(checkpoint) == "config.json is missing"


def test_damage_everywhere_is_named(text: Path, run: Path) -> None:  # noqa: F811
    shutil.rmtree(run / "model")
    for checkpoint in checkpoints(run):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(UsageError, match=r"every checkpoint in .* is damaged"):
        train(run_settings(text, run), quiet=True)
    (run / "train.yaml").write_text("steps: [")
    with pytest.raises(UsageError, match=r"train\.yaml is not valid YAML"):
        train(run_settings(text, run), quiet=True)


class _Signal(TrainerCallback):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_with_a_checkpoint(
    text: Path,  # noqa: F811
    finished: Path,
    tmp_path: Path,
    number: int,
) -> None:
    before = signal.getsignal(number)
    output = tmp_path / "run"
    config = run_settings(text, output, save_every=0)
    with pytest.raises(Interrupted, match=r"stopped at step 3 of 6.*run the same command again") as stopped:
        train(config, quiet=True, callbacks=[_Signal(number)])
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before
    assert [path.name for path in checkpoints(output)] == ["checkpoint-3"]
    lines: list[str] = []
    assert train(config, report=lines.append).trained == 3
    assert "continuing from step 3 of 6" in lines
    assert_same(finished, output)


def _hold(file: Path, ready: Any) -> None:
    with locked(file, "a training"):
        ready.set()
        signal.pause()


def test_two_trainings_in_one_folder_are_refused(text: Path, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "run"
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=_hold, args=(output / ".lock", ready), daemon=True)
    other.start()
    assert ready.wait(60)
    with pytest.raises(UsageError, match=rf"a training in .* is running already \(process {other.pid} on "):
        train(run_settings(text, output, steps=1, save_every=0), quiet=True)
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    assert (output / ".lock").exists(), "a killed process removes nothing"
    assert train(run_settings(text, output, steps=1, save_every=0), quiet=True).trained == 1
    assert not (output / ".lock").exists()


def test_an_output_that_cannot_be_written_is_named_first(text: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="it is a file"):
        train(run_settings(text, tmp_path / "file"), quiet=True)
    with pytest.raises(UsageError, match="cannot write to"):
        train(run_settings(text, tmp_path / "file" / "below"), quiet=True)
    assert (tmp_path / "file").read_text() == "x"
