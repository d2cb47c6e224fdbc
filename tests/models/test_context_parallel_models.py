"""Models on shards of a sequence: logits, losses and gradients are those of the whole sequence in one process."""

from __future__ import annotations

import pytest

from tests.processes import run_processes

CASES = "tests.models.context_parallel_cases"


def test_two_processes_agree_with_one() -> None:
    run_processes(f"{CASES}:short", 2)


@pytest.mark.slow
def test_a_grid_of_processes_splits_sequences_and_parameters() -> None:
    run_processes(f"{CASES}:grid", 4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 4])
def test_every_kind_of_model_agrees_with_one_process(size: int) -> None:
    run_processes(f"{CASES}:everything", size)
