"""Runs the kernels' tests under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton_kernels.py runs on the GPU itself")
def test_kernels_under_the_interpreter(run_interpreted: Callable[[str, float], None]) -> None:
    run_interpreted("test_triton_kernels.py", 550)
