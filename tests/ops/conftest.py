"""Kernel tests under Triton's interpreter, in a process of their own: Triton reads the switch at import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def run_interpreted() -> Callable[[str, float], None]:
    def run(name: str, timeout: float) -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        file = Path(__file__).with_name(name)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", str(file)],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            cwd=file.parents[2],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

    return run
