"""Replayed gradients are those of the passes, whatever becomes of the recording."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamask.training import recorded_gradients
from dynamask_lab.language.replayed import ReplayedGradients


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.config = SimpleNamespace(head_windows=((8,), (4,)))


class _Recorded:
    """Stands for a recording: the passes as they are, counted."""

    made = 0

    def __init__(self, loss_of: Any, parameters: Any, *inputs: Tensor, **options: Any) -> None:
        type(self).made += 1
        self._loss_of = loss_of

    def __call__(self, *inputs: Tensor) -> Tensor:
        loss: Tensor = self._loss_of(*inputs)
        loss.backward()
        return loss.detach()


def _gradients(monkeypatch: pytest.MonkeyPatch, recorded: type) -> tuple[_Model, ReplayedGradients]:
    model = _Model()
    found = ReplayedGradients(model, lambda batch: (model.weight * batch).square().sum())
    monkeypatch.setattr(recorded_gradients, "RecordedGradients", recorded)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found._able = True  # as on a GPU
    return model, found


def _check(model: _Model, gradients: ReplayedGradients, calls: int) -> None:
    for number in range(calls):
        batch = torch.full((3, 2), number + 1.0)
        model.weight.grad = None
        loss = gradients(batch)
        assert float(loss) == pytest.approx(float((model.weight.detach() * batch).square().sum()))
        assert not loss.requires_grad
        expected = 2 * model.weight.detach() * batch.square().sum(0)
        torch.testing.assert_close(model.weight.grad, expected)


def test_a_shape_that_comes_often_is_recorded_once_for_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Recorded, "made", 0)
    model, gradients = _gradients(monkeypatch, _Recorded)
    _check(model, gradients, 30)
    assert _Recorded.made == 1
    model.config.head_windows = ((16,), (2,))  # of texts of two tokens, which both hold whole, nothing changes
    _check(model, gradients, 30)
    assert _Recorded.made == 1
    model.config.head_windows = ((16,), (1,))
    _check(model, gradients, 30)
    assert _Recorded.made == 2
    assert len(gradients._recorded) == 1


def test_a_failed_recording_leaves_the_passes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    model, gradients = _gradients(monkeypatch, Failing)
    with pytest.warns(UserWarning, match="not recorded: operation not permitted"):
        _check(model, gradients, 12)
    _check(model, gradients, 3)
