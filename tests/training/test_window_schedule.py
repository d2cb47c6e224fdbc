"""Windows that shrink in training: what steps see, what is saved, and what a resumed run makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from dynamask import convert
from dynamask.errors import InvalidInputError, UsageError
from dynamask.training import ScheduledWindow, TrainConfig, checkpoints, open_run, train
from tests.training.test_training import losses, settings, text  # noqa: F401 -- a fixture

SCHEDULE = [[0.0, 4.0], [0.5, 2.0], [0.75, 1.0]]


class _Seen(TrainerCallback):
    """The windows of layers in the steps, by the calls they make."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.windows: dict[int, list[tuple[int, ...]]] = {}
        self.stop_at = stop_at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = kwargs["model"].model.layers
        for layer in layers:
            layer.mixer.register_forward_pre_hook(
                lambda mixer, _: (
                    self.windows.setdefault(state.global_step, []).append(tuple(mixer.windows))
                    if torch.is_grad_enabled()
                    else None
                )
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


def test_steps_see_the_schedule_and_everything_else_the_window(text: Path, tmp_path: Path) -> None:  # noqa: F811
    seen = _Seen()
    config = settings(text, tmp_path / "run", window_schedule=SCHEDULE)
    result = train(config, quiet=True, callbacks=[seen])
    assert [seen.windows[step] for step in range(12)] == [[(32,)]] * 6 + [[(16,)]] * 3 + [[(8,)]] * 3
    model, _ = open_run(tmp_path / "run")
    assert model.config.windows == 8
    for folder in checkpoints(tmp_path / "run"):
        assert json.loads((folder / "config.json").read_text())["windows"] == 8
    plain = train(settings(text, tmp_path / "plain"), quiet=True)
    assert losses(result.history)[12] != losses(plain.history)[12]


def test_a_resumed_run_goes_on_with_the_schedule(text: Path, tmp_path: Path) -> None:  # noqa: F811
    expected = losses(train(settings(text, tmp_path / "whole", window_schedule=SCHEDULE), quiet=True).history)
    cut = settings(text, tmp_path / "cut", window_schedule=SCHEDULE)
    with pytest.raises(KeyboardInterrupt):
        train(cut, quiet=True, callbacks=[_Seen(stop_at=7)])
    assert losses(train(cut, quiet=True).history) == expected
    with pytest.raises(UsageError, match="window_schedule was"):
        train(settings(text, tmp_path / "cut"), quiet=True)


def test_uneven_windows_shrink_in_proportion(text: Path, tmp_path: Path) -> None:  # noqa: F811
    seen = _Seen()
    config = settings(text, tmp_path / "run", window_schedule=[[0.0, 2.0], [0.5, 1.0]], steps=4)
    config.model |= {"num_hidden_layers": 2, "windows": [3, 9]}
    train(config, quiet=True, callbacks=[seen])
    assert [seen.windows[step] for step in range(4)] == [[(6,), (18,)]] * 2 + [[(3,), (9,)]] * 2


@pytest.mark.parametrize(
    "schedule",
    [
        [[0.5, 2.0], [0.0, 1.0]],
        [[0.0, 0.0]],
        [0.0, 1.0],
        [[0.0, 1.0, 2.0]],
        [["a", 1]],
        [[0, 4]],
        [[0, 4], [2, 1]],
        [[0, 4], [0.5, 2]],
        [[0, 4], [0, 1]],
        [[-1, 1]],
    ],
)
def test_schedules_that_cannot_be_are_named(schedule: Any) -> None:
    with pytest.raises(UsageError, match=r"window_schedule (is|must end)"):
        TrainConfig(window_schedule=schedule)
    with pytest.raises(InvalidInputError, match=r"window_schedule (is|must end)"):
        ScheduledWindow(schedule)


def test_a_schedule_is_read_from_the_command_line() -> None:
    config = TrainConfig.load(None, ["window_schedule=[[0, 4], [0.5, 1]]"])
    assert config.window_schedule == [[0, 4], [0.5, 1]]
    with pytest.raises(UsageError, match="window_schedule must be list"):
        TrainConfig.load(None, ["window_schedule=4"])


def test_an_upcycled_model_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = convert.upcycle(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), 200)
    callback = ScheduledWindow(SCHEDULE)
    with pytest.raises(InvalidInputError, match="scheduled for dynamask models; got a DynamaskLlamaConfig"):
        callback.on_train_begin(None, None, None, model=model)
