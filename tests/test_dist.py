"""The distribution: the wheel alone, in an environment of its own, runs the README and explains what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_readme import BLOCKS

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def _environment() -> dict[str, str]:
    """The environment without what would let another copy of the product shadow the installed one."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy: a build leaves files in its source, and files of earlier builds would get into the wheel.
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "dynamask", source / "dynamask", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("dynamask_attention-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and what it depends on, nothing more."""
    folder = tmp_path_factory.mktemp("clean")
    _run(sys.executable, "-m", "venv", folder, cwd=folder)
    interpreter = folder / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    _run(interpreter, "-m", "pip", "install", "--quiet", "-c", constraints, wheel, cwd=folder)
    return interpreter


def test_the_wheel_holds_the_product_alone(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dynamask"}


def test_an_installation_is_small(python: Path, tmp_path: Path) -> None:
    installed = _run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).lower()
    for extra in ("datasets", "accelerate", "tensorboard", "matplotlib", "lm_eval"):
        assert f"\n{extra}==" not in f"\n{installed}"


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_readme_runs_from_the_wheel(number: int, python: Path, tmp_path: Path) -> None:
    _run(python, "-c", BLOCKS[number], cwd=tmp_path)


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (["train", "preset=tiny", "data=stdlib", "steps=1"], "dynamask-attention[train]"),
        (["experiment"], "dynamask-lab"),
    ],
)
def test_what_an_extra_brings_is_named(command: list[str], needed: str, python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [python, "-m", "dynamask", *command],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert needed in done.stderr
    assert "Traceback" not in done.stderr
