"""The paper's gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dynamask.mixers import DynamicMaskGate


def test_scores_are_the_papers() -> None:
    gate = DynamicMaskGate(2, 8, bias=True).double()
    torch.nn.init.normal_(gate.gate)
    value = torch.randn(3, 2, 7, 8).double()
    z = value.transpose(1, 2).reshape(3, 7, 16) @ gate.delta.weight.T + gate.delta.bias
    expected = (gate.gate * F.softplus(z)).exp().transpose(1, 2)
    torch.testing.assert_close(gate(value), expected, rtol=1e-11, atol=0.0)


def test_untrained_scores_tie_and_the_gate_learns_first() -> None:
    gate = DynamicMaskGate(2, 8)
    gate.initialize_parameters()
    scores = gate(torch.randn(3, 2, 7, 8))
    assert bool((scores == 1).all())
    (scores * torch.randn_like(scores)).sum().backward()
    assert bool((gate.gate.grad != 0).all())


def test_scores_of_half_precision_values_are_float32() -> None:
    gate = DynamicMaskGate(2, 8).bfloat16()
    assert gate(torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)).dtype == torch.float32
