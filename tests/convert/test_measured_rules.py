"""Windows and slopes are compared by the divergence that they cause."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamask import InvalidInputError, convert
from dynamask.convert.measured_rules import Rules, measured_divergences
from tests.conftest import random_ranks


def trained(llama: Any) -> Any:
    return random_ranks(convert.upcycle(llama, 24, local=4, sinks=2))


@torch.no_grad()
def test_it_is_the_divergence_of_the_logits(llama: Any) -> None:
    model = trained(llama)
    tokens = torch.randint(3, 300, (1, 64))
    rules = [Rules((64,) * 4, (0.0,) * 4), Rules((8, 12, 16, 20), (0.0, 0.5, 0.0, 1.0))]
    found = measured_divergences(model, [tokens], rules)[0]
    dense, sparse = llama(tokens).logits.log_softmax(-1), model(tokens).logits.log_softmax(-1)
    wanted = (dense.exp() * (dense - sparse)).sum(-1).mean()
    torch.testing.assert_close(found, torch.tensor([0.0, float(wanted)]).double(), atol=1e-5, rtol=1e-4)
    assert float(wanted) > 1e-4


def test_slopes_that_an_estimate_praises_wrongly_are_left(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(llama)
    tokens = [torch.randint(3, 300, (1, 64))] * 2

    def praising(model: Any, batches: Any, candidates: list[int], slopes: list[float], progress: Any) -> Tensor:
        errors = torch.ones(4, len(slopes), len(candidates), dtype=torch.float64)
        errors[:, -1] = 0.0  # the newest keys alone
        return errors

    allocation = sys.modules["dynamask.convert.allocate_windows"]  # the package's attribute is the function
    monkeypatch.setattr(allocation, "_errors", praising)
    steep, flat = (Rules((24,) * 4, (slope,) * 4) for slope in (1.0, 0.0))
    better = int(measured_divergences(model, tokens, [steep, flat]).mean(0).argmin())
    convert.allocate_windows(model, tokens, 24, slopes=(0.0, 1.0))
    slopes = [slope for layer in model.config.head_slopes for slope in layer]
    assert slopes == [(1.0, 0.0)[better]] * 4
    monkeypatch.setattr(allocation, "measured_divergences", lambda *_: torch.tensor([[2.0, 1.0]]))
    convert.allocate_windows(model, tokens, 24, slopes=(0.0, 1.0))
    assert not model.config.slopes or not any(any(layer) for layer in model.config.slopes)


def test_blocks_that_repeat_do_not_decide(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    allocation = sys.modules["dynamask.convert.allocate_windows"]
    measured: list[Tensor] = []

    def measure(model: Any, blocks: list[Tensor], rules: list[Rules]) -> Tensor:
        measured.extend(blocks)
        return torch.arange(len(rules))[None].double()

    monkeypatch.setattr(allocation, "measured_divergences", measure)
    monkeypatch.setattr(allocation, "_alternatives", lambda *_: [Rules((24,) * 4, (s,) * 4) for s in (1.0, 0.0)])
    plain = torch.randint(3, 300, (1, 64))
    copied = torch.cat([plain[:, :32]] * 2, 1)
    copied[0, 0] = 1
    convert.allocate_windows(trained(llama), [copied, plain], 24)
    assert len(measured) == 1
    assert measured[0].equal(plain)
    convert.allocate_windows(trained(llama), [copied], 24)
    assert measured[1].equal(copied)


def test_a_model_that_computes_nan_is_refused(llama: Any) -> None:
    model = trained(llama)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InvalidInputError, match="not finite"):
        measured_divergences(model, [torch.randint(3, 300, (1, 64))], [Rules((24,) * 4, (0.0,) * 4)])
