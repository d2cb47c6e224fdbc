"""The check at first use leaves nothing in a layer that is recomputed in the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dynamask.ops.hopper import self_check
from dynamask.ops.interval import blocked


def _forward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, expiry: Tensor, bias: Any, scale: float) -> Any:
    return blocked.forward(q, k, v, expiry, bias, scale)[:1]


def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, expiry: Tensor, bias: Any, scale: float) -> Any:
    parts = blocked.forward(q, k, v, expiry, bias, scale)
    return blocked.backward(gradient, q, k, v, expiry, bias, *parts, scale)[:3]


@pytest.mark.parametrize(("attention_pass", "compute"), [("forward", _forward), ("backward", _backward)])
def test_nothing_of_the_check_is_saved_for_a_backward_pass(attention_pass: str, compute: Any) -> None:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    query, value = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        assert self_check._agrees(attention_pass, query, value, False, compute)
    assert saved == []
