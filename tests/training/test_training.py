"""A run: from text to a model that loads; killed and resumed; refused where it must be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import TrainerCallback

from dynamask.errors import UsageError
from dynamask.training import TrainConfig, checkpoints, open_run, train
from dynamask.training import run as run_module

MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "windows": 8,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"file {i} says: " + "to be or not to be, that is the question. " * 8)
    return folder


def settings(text, output, **changes) -> TrainConfig:
    return TrainConfig(
        **{
            "model": dict(MODEL),
            "data": [str(text)],
            "output": str(output),
            "context": 32,
            "batch_size": 2,
            "steps": 12,
            "save_every": 4,
            "log_every": 1,
            "validation": 0.2,
        }
        | changes
    )


def losses(history: list[dict]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_trains_saves_and_loads(text, tmp_path) -> None:
    result = train(settings(text, tmp_path / "run", steps=30, schedule="wsd", learning_rate=1e-2), quiet=True)
    curve = losses(result.history)
    assert curve[30] < curve[1] - 0.3
    model, tokenizer = open_run(tmp_path / "run")
    assert model.config.use_cache
    ids = tokenizer("to be", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, pad_token_id=0).shape[1] == ids.shape[1] + 3
    assert list((tmp_path / "run").glob("runs/*/events*"))  # TensorBoard
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-28", "checkpoint-30"]


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_resumes_to_the_same_losses(text, tmp_path) -> None:
    expected = losses(train(settings(text, tmp_path / "whole"), quiet=True).history)
    with pytest.raises(KeyboardInterrupt):
        train(settings(text, tmp_path / "cut"), quiet=True, callbacks=[_Stop()])
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["checkpoint-4"]
    resumed = losses(train(settings(text, tmp_path / "cut"), quiet=True).history)
    assert resumed == pytest.approx(expected, abs=1e-6)
    first, second = (open_run(tmp_path / name)[0].state_dict() for name in ("whole", "cut"))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name])


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_the_last_whole_checkpoint(text, tmp_path) -> None:
    """SIGKILL in the middle of the second checkpoint: nothing is there to clean up after it."""
    output = tmp_path / "killed"
    script = textwrap.dedent(
        f"""
        import os, signal
        from tests.training.test_training import settings
        from dynamask.training import train, AtomicTrainer
        save = AtomicTrainer._save_rng_state
        def kill(self, folder):
            if self.state.global_step == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, folder)
        AtomicTrainer._save_rng_state = kill
        train(settings({str(text)!r}, {str(output)!r}), quiet=True)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4"]
    expected = losses(train(settings(text, tmp_path / "whole"), quiet=True).history)
    assert losses(train(settings(text, output), quiet=True).history) == pytest.approx(expected, abs=1e-6)


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(text, tmp_path, monkeypatch) -> None:
    from dynamask.training import AtomicTrainer

    save = AtomicTrainer._save_rng_state

    def full(self, folder):
        if self.state.global_step == 8:
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(AtomicTrainer, "_save_rng_state", full)
    with pytest.raises(UsageError, match="disk is full: the checkpoint of step 8"):
        train(settings(text, tmp_path / "run"), quiet=True)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4"]


def test_too_little_disk_is_said_before_training(text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UsageError, match=r"need \d+\.\d KB in .* and 1\.0 KB are free"):
        train(settings(text, tmp_path / "run"), quiet=True)


def test_a_folder_belongs_to_one_run(text, tmp_path) -> None:
    train(settings(text, tmp_path / "run"), quiet=True)
    with pytest.raises(UsageError, match=r"learning_rate was 0\.001 and is 0\.01"):
        train(settings(text, tmp_path / "run", learning_rate=1e-2), quiet=True)
    with pytest.raises(UsageError, match="holds checkpoints or the model"):
        train(settings(text, tmp_path / "run", resume=False), quiet=True)


def test_what_others_left_in_the_output_is_left_alone(text, tmp_path) -> None:
    for name in ("model", "checkpoint-5"):
        output = tmp_path / f"with-{name}"
        (output / name).mkdir(parents=True)
        (output / name / "precious.txt").write_text("years of work")
        with pytest.raises(UsageError, match="no run of dynamask left there"):
            train(settings(text, output), quiet=True)
        assert (output / name / "precious.txt").read_text() == "years of work"


def test_a_model_without_checkpoints_is_not_replaced_by_another_run(text, tmp_path) -> None:
    train(settings(text, tmp_path / "run", save_every=0, steps=2), quiet=True)
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="seed was 0 and is 1"):
        train(settings(text, tmp_path / "run", save_every=0, steps=2, seed=1), quiet=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before


def test_a_run_is_not_resumed_on_other_texts(text, tmp_path) -> None:
    import os
    import shutil

    texts = shutil.copytree(text, tmp_path / "texts")
    with pytest.raises(KeyboardInterrupt):
        train(settings(texts, tmp_path / "run"), quiet=True, callbacks=[_Stop()])
    before = (texts / "1.txt").read_text()
    (texts / "1.txt").write_text("xylophone quartz " * 60)
    with pytest.raises(UsageError, match=r"texts of the run .* changed"):
        train(settings(texts, tmp_path / "run"), quiet=True)
    # The same texts with another date are the same texts.
    (texts / "1.txt").write_text(before)
    os.utime(texts / "1.txt", (1, 1))
    assert max(losses(train(settings(texts, tmp_path / "run"), quiet=True).history)) == 12


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_share_one_corpus_and_one_model(text, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    settings(text, tmp_path / "run", steps=4).save(file)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dynamask", "train"]
    done = subprocess.run([sys.executable, *command, "-c", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    open_run(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*partial*"))


def test_left_out_files_are_reported(text, tmp_path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    result = train(
        settings(text, tmp_path / "run", data=[str(text), str(tmp_path / "bad.txt")], errors="skip"), quiet=True
    )
    assert len(result.skipped) == 1
    assert "bad.txt is not UTF-8" in result.skipped[0]


def test_settings_come_from_file_and_overrides(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\nlearning_rate: 1e-3\nmodel: {windows: 4}\n")
    config = TrainConfig.load(file, ["steps=9", "model.local=2", "data=[a.txt, b.txt]", "tokenizer=null"])
    assert (config.steps, config.learning_rate, config.model) == (9, 1e-3, {"windows": 4, "local": 2})
    assert config.data == ["a.txt", "b.txt"]
    assert TrainConfig.load(None, ["data=a.txt"]).data == ["a.txt"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stpes=3"], "unknown setting 'stpes' \\(did you mean 'steps'"),
        (["steps"], "not an override"),
        (["steps=many"], "steps must be int; got 'many'"),
        (["steps=0"], "steps must be at least 1"),
        (["schedule=linear"], "schedule must be one of"),
        (["precision=fp8"], "precision must be"),
        (["compile=3"], "compile must be bool"),
        (["data=[a"], "not valid YAML"),
        (["model=3", "model.windows=4"], "model must hold keys and values"),
        (["learning_rate=.nan"], "learning_rate must be a positive number"),
        (["warmup=-1"], "warmup must be at least 0"),
    ],
)
def test_bad_settings_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig.load(None, overrides)


def test_bad_configuration_files_are_named(tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot read the configuration"):
        TrainConfig.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UsageError, match="must hold keys and values"):
        TrainConfig.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        TrainConfig.load(tmp_path / "broken.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"steps: 3 # caf\xe9")
    with pytest.raises(UsageError, match="not valid YAML"):
        TrainConfig.load(tmp_path / "latin.yaml")
    (tmp_path / "number.yaml").write_text("1: 2")
    with pytest.raises(UsageError, match="unknown setting 1"):
        TrainConfig.load(tmp_path / "number.yaml")


def test_a_folder_without_a_model_is_named(tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot load a model from"):
        open_run(tmp_path)


def test_a_truncated_model_is_named(text, tmp_path) -> None:
    result = train(settings(text, tmp_path / "run", steps=1), quiet=True)
    weights = result.model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot load a model from"):
        open_run(tmp_path / "run")
