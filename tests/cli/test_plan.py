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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "12"], "12 GPUs are no whole number of nodes of 8"),
        (["--network", "0"], "--network must be above 0"),
        (["--network", "nan"], "--network must be above 0"),
    ],
)
def test_numbers_that_fit_no_cluster_are_refused(dynamask: Command, options: list[str], message: str) -> None:
    done = dynamask("plan", "--preset", "tiny", *options)
    assert done.returncode == 2
    assert message in done.said


@pytest.mark.parametrize("tokens", ["40X", "1.2.3B", "1e400"])
def test_a_number_that_is_none_is_refused(dynamask: Command, tokens: str) -> None:
    done = dynamask("plan", "--tokens", tokens)
    assert done.returncode == 2
    assert "--tokens must be a number" in done.stderr
