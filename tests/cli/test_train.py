"""`dynamask train` as a person types it."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest

from dynamask.models import PRESETS
from dynamask.training import TrainConfig, checkpoints
from dynamask.training.interruption import StopAtSignal
from tests.cli.conftest import SMALL, Command


def test_help_names_every_setting_and_preset(dynamask: Command) -> None:
    words = set(" ".join(dynamask("train", "--help").stdout.split()).replace(",", " ").replace(".", " ").split())
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= words
    assert {name.split(".")[0] for name in PRESETS} <= words


def test_training_says_what_and_where_and_how_fast(dynamask: Command, run: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = dynamask("train", f"data={run / 'texts'}", f"output={output}", *SMALL, "log_every=2")
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.said
    assert "held out; device: " in done.said
    assert "step 4 of 4: loss " in done.said
    assert "tokens/s" in done.said
    assert "perplexity" in done.stdout
    for raw in ("{'", "lm_head", "it/s", "Writing model shards", "Traceback"):
        assert raw not in done.stdout + done.stderr
    again = dynamask("train", f"data={run / 'texts'}", f"output={output}", *SMALL, "log_every=2")
    assert again.returncode == 0
    assert again.said == f"this run is finished: {output} holds the model of step 4; nothing was trained"
    assert again.stdout == done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_how_to_go_on(
    dynamask: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    output = tmp_path / "run"
    arguments = ["train", f"data={run / 'texts'}", f"output={output}", *SMALL, "save_every=0"]
    own = StopAtSignal.on_step_end

    def kill(self: StopAtSignal, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 1:  # type: ignore[attr-defined]
            os.kill(os.getpid(), number)
        own(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StopAtSignal, "on_step_end", kill)
        stopped = dynamask(*arguments)
    assert stopped.returncode == 128 + number
    assert f"stopped at step 1 of 4; the checkpoint is in {output}: run the same command again" in stopped.said
    assert [path.name for path in checkpoints(output)] == ["checkpoint-1"]
    done = dynamask(*arguments)
    assert done.returncode == 0
    assert "continuing from step 1 of 4" in done.said
    assert "lm_head" not in done.stderr


def test_an_interrupted_preparation_says_how_to_go_on(
    dynamask: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamask.training.run.prepare", interrupted)
    done = dynamask("train", f"output={tmp_path / 'run'}")
    assert done.returncode == 130
    assert "run the same command again" in done.said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stpes=3"], "did you mean 'steps'"),
        (["preset=tny"], "did you mean 'tiny'"),
        (["model.windws=3"], "did you mean 'window"),
        (["data=/no/such/folder"], "no such file or folder"),
        (["model.attention=flash"], "attention must be one of"),
        (["data=./[/gone]"], "no such file or folder: ./[/gone]"),
        (["data=nosuch"], "there is no file or folder nosuch; a name on the hub is written owner/name"),
        (["tokenizer=nosuch"], "there is no tokenizer folder nosuch"),
        (["context=1"], "context must be at least 2"),
        (["context=4096"], "longer than the model's max_position_embeddings=1024"),
        (["steps=20", "warmup=50"], "warmup (50 steps) must be shorter"),
        (["window_schedule=[[0,4]]"], "window_schedule"),
        (["validation=0"], "validation is the share held out"),
        (["clip=-1"], "clip must be at least 0"),
        (["clip=.nan"], "clip must be at least 0"),
        (["beta1=1"], "beta1 must be at least 0 and below 1"),
        (["beta2=1.5"], "beta2 must be at least 0 and below 1"),
        (["seed=-1"], "seed must be at least 0 and below 2**32"),
        (["model.slopes=[[0.1]]"], "slopes must be None or a list with an entry for each of the 4 layers"),
        (["model.slopes=0.1"], "the model field slopes must be a list"),
    ],
)
def test_mistakes_end_with_a_message_and_leave_nothing(
    dynamask: Command, overrides: list[str], message: str, tmp_path: Path
) -> None:
    done = dynamask("train", *overrides, f"output={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.said
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_training_says_what_to_install(
    dynamask: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else real(name, *a))
    done = dynamask("train", f"output={tmp_path / 'run'}")
    assert (done.returncode, done.said) == (
        2,
        "error: training needs accelerate: pip install 'dynamask-attention[train]'",
    )
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_tables_and_hub_data_say_what_to_install(
    dynamask: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (str(tmp_path / "a.parquet"), "no-such-owner/no-such-set"):
        done = dynamask("train", f"data={source}", f"output={tmp_path / 'run'}")
        assert done.returncode == 2
        assert "pip install 'dynamask-attention[train]'" in done.said
