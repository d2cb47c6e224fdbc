"""The command line in this process: a new one takes seconds to import torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from dynamask.cli import common, main


class Done(NamedTuple):
    """What a command ended with."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        """Standard error in one line."""
        return " ".join(self.stderr.split())


Command = Callable[..., Done]


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `dynamask ARGUMENTS`."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["dynamask", *arguments])
        monkeypatch.setattr(common.console, "_width", 200)
        monkeypatch.setattr(common.errors, "_width", 200)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def dynamask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command: its exit code and what it printed."""
    return command(monkeypatch, capsys)


def refused_without_torch(mistakes: Sequence[str], folder: Path) -> None:
    """Run `dynamask --help` and mistaken commands in `folder`, in one new process; none may import torch."""
    script = (
        "import sys\nfrom dynamask.cli.main import main\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    sys.argv = ['dynamask', *line.split()]\n"
        "    try:\n        main()\n    except SystemExit as end:\n"
        "        heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "        assert end.code == (0 if '--help' in line else 2) and not heavy, (line, end.code, heavy)\n"
    )
    given = "\n".join(("--help", *mistakes))
    run = subprocess.run([sys.executable, "-c", script], input=given, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stderr.count("error:") == len(mistakes), run.stderr[-2000:]


SMALL = [
    "model={vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1}",
    "context=32",
    "batch_size=2",
    "steps=4",
    "save_every=2",
    "validation=0.3",
]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts and a finished run, `run`, over them."""
    from dynamask.training import TrainConfig, train

    folder = tmp_path_factory.mktemp("cli")
    (folder / "texts").mkdir()
    for i in range(10):
        (folder / "texts" / f"{i}.txt").write_text(f"{i}: " + "all work and no play makes jack a dull boy. " * 10)
    settings = [
        "recipe=recall",
        f"data={folder / 'texts'}",
        f"output={folder / 'run'}",
    ]  # ranks, whose mask can be drawn
    train(TrainConfig.load(None, [*settings, *SMALL]), quiet=True)
    return folder
