"""`dynamask plan`: what it prints, and what it refuses."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Command


def test_a_plan_says_time_memory_and_command(dynamask: Command) -> None:
    done = dynamask("plan", "--preset", "1.7b", "--gpus", "64", "--tokens", "40B", "model.windows=1024")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for part in ("1.72 B", "days", "memory of a GPU", "srun --nodes 8", "model.windows=1024", "largest error"):
        assert part in text, text


@pytest.mark.slow
def test_what_does_not_fit_is_said(dynamask: Command) -> None:
    done = dynamask("plan", "--gpus", "1", "--batch", "16", "--tokens", "1.5T")
    assert "This does not fit" in done.stdout


@pytest.mark.parametrize("tokens", ["40X", "1.2.3B"])
def test_a_number_that_is_none_is_refused(dynamask: Command, tokens: str) -> None:
    done = dynamask("plan", "--tokens", tokens)
    assert done.returncode == 2
    assert "--tokens must be a number" in done.stderr
