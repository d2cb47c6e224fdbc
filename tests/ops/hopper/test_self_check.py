"""The first use of a Hopper kernel: checked once, replaced where it is wrong or fails."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamask.ops.hopper import dispatch, self_check
from dynamask.ops.interval import blocked


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_seen", set())
    monkeypatch.setattr(dispatch, "_distrusted", set())
    monkeypatch.setattr(self_check, "hopper", lambda *_: object())


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 4, 8, 32, dtype=torch.bfloat16), torch.zeros(1, 2, 8, 32, dtype=torch.bfloat16)


def _right(gradient: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    return (blocked.forward(*problem)[0],)


def _right_backward(gradient: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    *inputs, scale = problem
    return blocked.backward(gradient, *inputs, *blocked.forward(*problem), scale)[:3]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("name", "compute"), [("forward", _right), ("backward", _right_backward)])
def test_right_kernels_stay(name: str, compute: Any, biased: bool) -> None:
    query, value = _inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        self_check.check_first_use(name, query, value, value[..., 0].float() if biased else None, compute)
    assert not dispatch._distrusted


def _nan(gradient: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    return (_right(gradient, *problem)[0] * float("nan"),)


def _one_head_wrong(gradient: Tensor, *problem: Any) -> tuple[Tensor, ...]:
    (output,) = _right(gradient, *problem)
    output[:, 1] = output[:, 0]
    return (output,)


def _failing(*_: Any) -> tuple[Tensor, ...]:
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize("compute", [_nan, _one_head_wrong, _failing])
def test_wrong_kernels_are_replaced_and_named_once(compute: Any) -> None:
    query, value = _inputs()
    with pytest.warns(UserWarning, match="portable kernels take their place"):
        self_check.check_first_use("forward", query, value, None, compute)
    assert dispatch._distrusted == {("forward", *dispatch.variant(query, value))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        self_check.check_first_use("forward", query, value, None, compute)
