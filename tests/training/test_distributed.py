"""Training by several processes that split the model: the losses of one process, also after a process was killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamask.errors import UsageError
from dynamask.training import TrainConfig, checkpoints, open_run, train
from dynamask.training.checkpointing import is_sharded
from dynamask.training.processes import agreed, processes_of
from tests.processes import run_processes
from tests.training.test_training import MODEL, losses, settings, text  # noqa: F401 -- a fixture

STEPS = 12


def run_settings(text: Path, output: Path, **changes: Any) -> TrainConfig:  # noqa: F811
    given: dict[str, Any] = {"steps": STEPS, "batch_size": 1, "save_every": 4, "keep": 9}
    return settings(text, output, **given | changes)


def torchrun(config: TrainConfig, file: Path, processes: int) -> subprocess.Popen[str]:
    config.save(file)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "dynamask", "train", "-c", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    told = process.communicate(timeout=400)[1]
    assert process.returncode == 0, told[-3000:]
    return told


def children(pid: int) -> dict[int, int]:
    """Processes that torchrun started, by their rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) != pid:
                continue
            facts = (folder / "environ").read_bytes().split(b"\0")
            ranks = [int(fact[5:]) for fact in facts if fact.startswith(b"RANK=")]
        except (OSError, ValueError):
            continue
        if ranks:
            found[ranks[0]] = int(folder.name)
    return found


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:  # noqa: F811
    """Losses of one process that takes the sequences of two in turns."""
    output = tmp_path_factory.mktemp("alone") / "run"
    return losses(train(run_settings(text, output, gradient_accumulation=2), quiet=True).history)


def history(output: Path) -> dict[int, float]:
    import json

    return losses(json.loads((output / "model" / "trainer_state.json").read_text())["log_history"])


def assert_close(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-5), step


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_split_training_survives_a_killed_process_and_another_number_of_them(
    text: Path,  # noqa: F811
    alone: dict[int, float],
    tmp_path: Path,
) -> None:
    output, file = tmp_path / "run", tmp_path / "run.yaml"
    config = run_settings(text, output)
    running = torchrun(config, file, 2)
    while not (output / "checkpoint-4").exists():
        assert running.poll() is None, running.communicate()[1][-3000:]
        time.sleep(0.01)
    os.kill(children(running.pid)[1], signal.SIGKILL)
    running.communicate(timeout=200)
    assert running.returncode != 0
    assert not (output / "model").exists()
    assert is_sharded(output / "checkpoint-4")

    resumed = finish(torchrun(config, file, 2))
    assert "continuing from step" in resumed
    assert_close(history(output), alone)
    assert processes_of(output) == 2
    whole = open_run(output)[0].state_dict()

    # The same from step 8 on by one process: other shards.
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "checkpoint-12")
    with pytest.raises(UsageError, match=r"2 sequences a step .* and these settings give 1"):
        train(config, quiet=True)
    one = run_settings(text, output, gradient_accumulation=2)
    with pytest.raises(UsageError, match="continue it by torchrun"):
        train(one, quiet=True)
    assert "continuing from step 8 of 12" in finish(torchrun(one, file, 1))
    assert_close(history(output), alone)
    for name, tensor in open_run(output)[0].state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6, msg=name)

    # Killed between the last checkpoint and the final save.
    shutil.rmtree(output / "model")
    finish(torchrun(one, file, 1))
    for name, tensor in open_run(output)[0].state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6, msg=name)

    # A part of a shard is damaged: the older checkpoint is used.
    shutil.rmtree(output / "model")
    part = next((checkpoints(output)[-1] / "optimizer_0").glob("__0_*.distcp"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(bytes(content))
    told = finish(torchrun(one, file, 1))
    assert "checkpoint-12 is damaged (optimizer_0/__0_0.distcp has another checksum)" in told
    assert "continuing from step 8 of 12" in told


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_that_share_sequences_train_as_one(text: Path, tmp_path: Path) -> None:  # noqa: F811
    # Learned ranks learn inside a shard, the paper's through the loss itself.
    model = {**MODEL, "ranking": "paper", "local": 0, "sinks": 0}
    changes: dict[str, Any] = {"model": model, "steps": 6}
    alone = train(run_settings(text, tmp_path / "alone", gradient_accumulation=2, **changes), quiet=True)
    split = run_settings(text, tmp_path / "split", context_parallel=2, **changes)
    finish(torchrun(split, tmp_path / "run.yaml", 2))
    assert_close(history(tmp_path / "split"), losses(alone.history))
    whole = open_run(tmp_path / "alone")[0].state_dict()
    for name, tensor in open_run(tmp_path / "split")[0].state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-5, msg=name)


def test_sequences_that_cannot_be_shared_are_refused(text: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="must divide the number of processes; there are 1"):
        train(run_settings(text, tmp_path / "run", context_parallel=2), quiet=True)


def test_processes_that_do_not_agree_are_none() -> None:
    assert agreed(lambda: 3) == 3
    with pytest.raises(UsageError, match="no"):
        agreed(lambda: (_ for _ in ()).throw(UsageError("no")))


def slow_process(text: str, output: str) -> None:  # noqa: F811
    """Train while the products of the second process take long; the first one reports it."""
    import torch.distributed as dist

    from dynamask.training import watch

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # accelerate wants them; the group is there already
    honest, lines = watch._probe, []
    if dist.get_rank() == 1:
        watch._probe = lambda device: 10 * honest(device) + 0.05
    result = train(run_settings(Path(text), Path(output), steps=3, save_every=0), report=lines.append)
    logged = [entry for entry in result.history if "slowest_ratio" in entry]
    assert logged
    assert all(entry["slowest_process"] == 1 and entry["slowest_ratio"] > 1.5 for entry in logged)
    if dist.get_rank() == 0:
        assert any("process 1 is slow" in line for line in lines), lines


@pytest.mark.slow
def test_a_slow_process_is_reported_in_a_training(text: Path, tmp_path: Path) -> None:  # noqa: F811
    run_processes("tests.training.test_distributed:slow_process", 2, str(text), str(tmp_path / "run"))
