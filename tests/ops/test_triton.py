"""Runs the kernels' tests under Triton's interpreter, in a process of its own: Triton reads the switch at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton_kernels.py runs on the GPU itself")
def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    file = Path(__file__).with_name("test_triton_kernels.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
