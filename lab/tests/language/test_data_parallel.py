"""A run on two processes has the numbers of a run on one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask_lab.language import data_parallel
from dynamask_lab.language import engine as language
from dynamask_lab.language.data_parallel import PROCESSES, Group
from dynamask_lab.language.engine import LanguageConfig, run_language

_ROUNDING = 1e-5
"""Largest relative difference of losses that is put down to rounding.

At the learning rate of these runs losses differ by 2e-7 at most. At 1e-2 such a model makes 1e-3 of it within 25 steps.
"""


def _config(**settings: Any) -> dict[str, Any]:
    shape: dict[str, Any] = {"layers": 2, "width": 32, "heads": 2, "groups": 1, "feed_forward": 48, "corpus": "bytes"}
    shape |= {"length": 32, "batch_tokens": 128, "steps": 30, "validation_tokens": 512, "learning_rate": 1e-3}
    return LanguageConfig(**{**shape, "attention": "mha", **settings}).plain()


def _quiet(share: float, note: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(language.STATE_FOLDER, str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path.cwd(), Path.cwd() / "lab"))))


_LEARNED = {"attention": "dma", "ranking": "learned", "window": 16, "sinks": 2, "local": 4}
_SCORED = {"attention": "dma", "ranking": "attention", "window": 14, "layer_windows": [8, 20], "gate_init": "delta"}
_SCORED |= {"recency_spread": 8.0, "score_form": "linear", "gate_rate": 0.1}


def _run_with_gradients(settings: dict[str, Any]) -> tuple[dict[str, Any], list[list[torch.Tensor]]]:
    """The result, and what the leader's gradients are at every step before they are clipped."""
    steps: list[list[torch.Tensor]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def note(parameters: Iterable[torch.nn.Parameter], *arguments: Any) -> torch.Tensor:
        parameters = list(parameters)
        steps.append([parameter.grad.double() for parameter in parameters if parameter.grad is not None])
        return clip(parameters, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", note)
        return run_language(settings, _quiet), steps


def _distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest relative difference of a parameter's gradient; below 1e-3 of the whole, relative to that."""
    whole = torch.stack([gradient.norm() for gradient in expected]).norm()
    return max(
        float((own - other).norm() / other.norm().clamp(min=1e-3 * whole))
        for own, other in zip(found, expected, strict=True)
    )


def _assert_same_training(
    found: tuple[dict[str, Any], list[list[torch.Tensor]]], expected: tuple[dict[str, Any], list[list[torch.Tensor]]]
) -> None:
    """Same but for rounding: the first gradients, which no step has amplified, closely, the later ones less so."""
    (result, gradients), (other, others) = found, expected
    distances = [_distance(own, they) for own, they in zip(gradients, others, strict=True)]
    assert distances[0] < 1e-5
    assert max(distances) < 1e-3
    assert result["training"] == pytest.approx(other["training"], rel=_ROUNDING)
    assert [look["loss"] for look in result["curve"]] == pytest.approx(
        [look["loss"] for look in other["curve"]], rel=_ROUNDING
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [{"attention": "mha"}, {**_LEARNED, "calibrate_at": 0.5, "batch_tokens": 256}, _SCORED],
    ids=["dense", "learned", "scored"],
)
def test_two_processes_have_the_gradients_and_losses_of_one(
    monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]
) -> None:
    settings = _config(**form, steps=12)
    monkeypatch.delenv(PROCESSES, raising=False)
    one = _run_with_gradients(settings)
    monkeypatch.setenv(PROCESSES, "2")
    two = _run_with_gradients(settings)
    assert two[0]["processes"] == 2
    assert "processes" not in one[0]
    _assert_same_training(two, one)
    assert two[0].get("head_windows") == one[0].get("head_windows")


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes to the same bit; one to the rounding of two, from the very state that they left."""
    settings = _config(**_SCORED)
    monkeypatch.setenv(PROCESSES, "2")
    whole, gradients = _run_with_gradients(settings)

    def stop(share: float, note: str) -> None:
        if round(share * 30) == 20:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        run_language(settings, stop)
    shutil.copytree(tmp_path / "state", tmp_path / "left")
    torch.rand(7)  # the generator of the process is not the run's

    resumed, later = _run_with_gradients(settings)
    for name in ("training", "curve", "loss", "positions", "gates", "processes"):
        assert resumed[name] == whole[name], name
    for own, other in zip(later, gradients[20:], strict=True):
        assert all(map(torch.equal, own, other))

    monkeypatch.setenv(language.STATE_FOLDER, str(tmp_path / "left"))
    monkeypatch.setenv(PROCESSES, "1")
    alone = _run_with_gradients(settings)
    assert len(alone[1]) == 10
    assert alone[0]["training"][:20] == whole["training"][:20]
    _assert_same_training(alone, (whole, gradients[20:]))


@pytest.mark.slow
def test_a_run_whose_process_ends_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROCESSES, "2")
    own = data_parallel.subprocess.Popen

    def ending(command: list[str]) -> Any:
        return own([command[0], "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(data_parallel, "_PATIENCE", data_parallel.datetime.timedelta(seconds=5))
    monkeypatch.setattr(data_parallel.subprocess, "Popen", ending)
    with pytest.raises((RuntimeError, TimeoutError)):
        run_language(_config(), _quiet)


def test_a_batch_is_shared_evenly_or_not_at_all() -> None:
    assert [list(Group(rank, 2).part(6)) for rank in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InvalidInputError, match="share the 6 sequences"):
        Group(0, 4).part(6)


def test_a_number_of_processes_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("0", "-1", "two"):
        monkeypatch.setenv(PROCESSES, wrong)
        with pytest.raises(InvalidInputError, match=PROCESSES):
            run_language(_config(), _quiet)
    monkeypatch.setenv(PROCESSES, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidInputError, match="1 GPUs are visible"):
        data_parallel.processes()


def test_runs_that_processes_cannot_share_are_refused(tmp_path: Path) -> None:
    noisy = LanguageConfig.of(_config(attention="dma", window=8, rank_noise=0.5))
    with pytest.raises(InvalidInputError, match="rank_noise"):
        language._Run(noisy, tmp_path, Group(0, 2))
    learned = LanguageConfig.of(_config(**_LEARNED))
    with pytest.raises(InvalidInputError, match="a multiple of 8 sequences; got 4"):
        language._Run(learned, tmp_path, Group(0, 2))
