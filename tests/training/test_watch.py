"""Faults of a training, each put in by hand: losses that are no numbers or jump, late data, slow processes."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamask.data import PackedDataset
from dynamask.errors import UsageError
from dynamask.training import AtomicTrainer, checkpoints, open_run, train
from dynamask.training import run as run_module
from dynamask.training.watch import LossWatch, pace_lines, pace_of_all
from tests.training.test_training import losses, settings, text  # noqa: F401 -- a fixture


def test_losses_that_are_no_numbers_or_jump_are_problems() -> None:
    watch = LossWatch(2.0)
    assert watch.problem(9.0, 1.0) is None
    assert watch.problem(30.0, 1.0) is None, "there is nothing to compare with yet"
    for _ in range(12):
        assert watch.problem(3.0, 1.0) is None
    assert watch.problem(4.9, None) is None
    assert "the median of the last 15 steps 3.0000" in str(watch.problem(5.1, 1.0))
    assert watch.problem(3.0, 1.0) is None
    assert watch.problem(math.nan, 1.0) == "the loss is nan"
    assert "norm of the gradient is inf" in str(watch.problem(3.0, math.inf))
    patient = LossWatch(0.0)
    assert [patient.problem(loss, 1.0) for loss in [1.0] * 20 + [50.0]] == [None] * 21


@pytest.mark.parametrize("fault", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_a_step_that_is_no_number_stops_with_its_batch_and_can_be_left_out(
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    taken: list[torch.Tensor] = []
    healthy = AtomicTrainer.compute_loss

    def broken(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = healthy(self, model, inputs, *args, **kwargs)
        if self.state.global_step != 4:
            return loss
        taken.append(inputs["input_ids"].clone())
        if fault == "loss":
            return loss * math.nan
        return loss + 0 * sum((p * math.inf).nan_to_num().sqrt().sum() for p in [next(model.parameters()) * 0])

    monkeypatch.setattr(AtomicTrainer, "compute_loss", broken)
    config = settings(text, tmp_path / "run", steps=6, save_every=2)
    with pytest.raises(UsageError, match=r"stopped at step 5: the (loss|norm of the gradient) is nan.*checkpoint-4"):
        train(config, quiet=True)
    saved = torch.load(tmp_path / "run" / "stopped-at-step-5.pt", weights_only=True)
    torch.testing.assert_close(saved["batches"][0]["input_ids"], taken[0])
    assert saved["step"] == 5
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    config.skip = [5]
    result = train(config, quiet=True)
    assert result.trained == 2
    assert set(losses(result.history)) == {1, 2, 3, 4, 5, 6}
    assert all(tensor.isfinite().all() for tensor in open_run(tmp_path / "run")[0].state_dict().values())


@pytest.mark.slow
def test_a_spike_stops_with_its_batch_and_can_be_left_out(
    text: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    healthy = AtomicTrainer.compute_loss

    def broken(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = healthy(self, model, inputs, *args, **kwargs)
        return loss + 9.0 if self.state.global_step == 13 and model.training else loss

    monkeypatch.setattr(AtomicTrainer, "compute_loss", broken)
    config = settings(text, tmp_path / "run", steps=15, save_every=4, spike=5.0)
    with pytest.raises(UsageError, match=r"stopped at step 14: .*median of the last 13 steps.*checkpoint-12"):
        train(config, quiet=True)
    assert torch.load(tmp_path / "run" / "stopped-at-step-14.pt", weights_only=True)["step"] == 14
    config.skip = [14]
    assert set(losses(train(config, quiet=True).history)) == set(range(1, 16))


@pytest.mark.slow
def test_data_that_comes_late_is_said(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    prompt = PackedDataset.__getitem__

    def late(self: Any, index: int) -> Any:
        time.sleep(0.2)
        return prompt(self, index)

    monkeypatch.setattr(PackedDataset, "__getitem__", late)
    lines: list[str] = []
    result = train(settings(text, tmp_path / "run", steps=4, save_every=0), report=lines.append)
    assert any("process 0 waited for data" in line for line in lines), lines
    assert all(entry["data_wait_share"] > 0.2 for entry in result.history if "loss" in entry and entry["step"] > 1)


def test_a_slow_process_is_named() -> None:
    logs = pace_of_all([[0.01, 0.10], [0.02, 0.11], [0.30, 0.10], [0.0, 0.31]])
    assert logs == {
        "data_wait_share": 0.3,
        "data_wait_process": 2,
        "slowest_ratio": pytest.approx(3.1),
        "slowest_process": 3,
    }
    assert pace_lines(logs) == [
        "process 2 waited for data 30% of the time",
        "process 3 is slow: the same product takes it 3.1 times the median of all processes",
    ]
    assert pace_lines(pace_of_all([[0.05, 0.1]])) == []


def test_metrics_go_where_they_are_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"tensorboard", "wandb"}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else find(name))
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert run_module._reports() == ["tensorboard"]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert run_module._reports() == ["tensorboard", "wandb"]


@pytest.mark.slow
def test_tensorboard_gets_the_losses(text: Path, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(settings(text, tmp_path / "run", steps=3, save_every=0), quiet=True)
    found = {}
    for file in (tmp_path / "run").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx(losses(result.history), abs=1e-4)
