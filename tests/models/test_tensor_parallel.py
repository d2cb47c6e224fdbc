"""Models that transformers splits by their plan equal the whole ones: losses, gradients, generation, what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.models.tensor_parallel_cases import MODELS
from tests.processes import run_processes

CASES = "tests.models.tensor_parallel_cases"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_split_model_equals_the_whole(name: str, tmp_path: Path) -> None:
    if name == "gpt_neox" and transformers.__version__.startswith(("5.10", "5.11", "5.12", "5.13", "5.14")):
        pytest.skip("these releases rename the biases of layers that they split by rows")
    run_processes(f"{CASES}:several", 2, name, str(tmp_path))


@pytest.mark.slow
def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    run_processes(f"{CASES}:refused", 2, str(tmp_path))
