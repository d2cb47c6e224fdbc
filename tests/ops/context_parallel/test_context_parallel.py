"""Attention of a split sequence equals that of one process: outputs, gradients, and bytes that do not grow."""

from __future__ import annotations

import pytest

from tests.processes import run_processes

CASES = "tests.ops.context_parallel.cases"


def test_three_processes_agree_with_one() -> None:
    run_processes(f"{CASES}:everything", 3, "6")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_any_number_of_processes_agrees_with_one(size: int) -> None:
    run_processes(f"{CASES}:everything", size, "48")
