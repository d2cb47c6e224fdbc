"""Replayed gradients are those of the passes, whatever becomes of the recording."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamask import DynamaskConfig, DynamaskForCausalLM
from dynamask.training import recorded_gradients
from dynamask.training.recorded_gradients import clear_gradients
from dynamask_lab.language.replayed import ReplayedGradients

_DEVICE = "cuda"


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_replays_are_the_passes_on_a_gpu(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = DynamaskConfig(num_key_value_heads=2, head_dim=16, vocab_size=64, windows=[[16, 40], 24], sinks=4, **shape)
    model = DynamaskForCausalLM(config).to(_DEVICE)

    def loss_of(batch: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    gradients = ReplayedGradients(model, loss_of)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for number in range(14):
        batch = torch.randint(64, (2, 120), device=_DEVICE)
        clear_gradients(parameters)
        loss = gradients(batch)
        found = [None if p.grad is None else p.grad.clone() for p in parameters]
        clear_gradients(parameters)
        expected = loss_of(batch)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        for gradient, parameter in zip(found, parameters, strict=True):
            assert (gradient is None) == (parameter.grad is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)
        with torch.no_grad():  # as an optimizer's step does: the recording reads the weights of now
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        assert len(gradients._recorded) == (number >= 8)
    assert not [warning for warning in recwarn if "not recorded" in str(warning.message)]
