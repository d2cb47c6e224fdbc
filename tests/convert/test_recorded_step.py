"""A recorded step gives the losses and gradients of the pass, and is refused where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from dynamask import InvalidInputError
from dynamask.convert.recorded_step import RecordedStep
from dynamask.training import recorded_gradients


class _Replayed:
    """Stands for a CUDA graph: runs the pass, with gradients that are off by a factor."""

    factor = 1.0

    def __init__(
        self,
        loss_of: Callable[..., Tensor],
        parameters: Iterable[nn.Parameter],
        tokens: Tensor,
        backward: bool,
        pool: None,
    ) -> None:
        assert backward
        self.loss_of, self.parameters = loss_of, list(parameters)

    def __call__(self, tokens: Tensor) -> Tensor:
        loss = self.loss_of(tokens)
        (self.factor * loss).backward()
        return loss.detach()


def _losses(layer: nn.Linear) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda tokens: (layer(tokens.float()).square().mean(), layer.weight.square().sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replay_equals_the_pass_on_a_gpu() -> None:
    layer, tokens = nn.Linear(4, 4).cuda(), torch.randint(9, (2, 4)).cuda()
    losses_of = _losses(layer)
    step = RecordedStep(losses_of, layer.parameters(), tokens)
    loss, ranks = losses_of(tokens + 1)
    expected = torch.autograd.grad(loss + ranks, list(layer.parameters()))
    torch.testing.assert_close(step(tokens + 1), loss.detach())
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_loss_is_the_first_and_gradients_are_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_gradients, "RecordedGradients", _Replayed)
    layer, tokens = nn.Linear(4, 4), torch.randint(9, (2, 4))
    step = RecordedStep(_losses(layer), layer.parameters(), tokens)
    assert layer.weight.grad is None, "the comparison leaves none"
    assert step.serves(tokens + 1)
    assert not step.serves(tokens[:1])
    loss, ranks = _losses(layer)(tokens + 1)
    expected = torch.autograd.grad(loss + ranks, layer.weight)[0]
    torch.testing.assert_close(step(tokens + 1), loss.detach())
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_replay_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_gradients, "RecordedGradients", _Replayed)
    monkeypatch.setattr(_Replayed, "factor", 1.5)
    layer = nn.Linear(4, 4)
    with pytest.raises(InvalidInputError, match="distil with recorded=False"):
        RecordedStep(_losses(layer), layer.parameters(), torch.randint(9, (2, 4)))
