"""Every example runs; the demo, shortened, leaves the pictures it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py") if p.name != "demo.py"))
def test_example(name: str, tmp_path) -> None:
    assert run(str(EXAMPLES / name), cwd=tmp_path)


def test_demo(tmp_path) -> None:
    output = run(str(EXAMPLES / "demo.py"), "--steps", "3", "--output", str(tmp_path / "demo"), cwd=tmp_path)
    assert "perplexity" in output
    assert "bounded cache" in output
    for name in ("live_keys.png", "curves.png"):
        assert (tmp_path / "demo" / name).stat().st_size > 10_000
