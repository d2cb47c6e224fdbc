"""The loss that teaches ranks."""

from __future__ import annotations

import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask.mixers.rank_loss import rank_loss


def test_is_zero_at_the_target_and_ignores_invalid_keys() -> None:
    target = torch.randn(2, 3, 5, dtype=torch.float64)
    valid = torch.rand(2, 3, 5) > 0.3
    ranks = torch.where(valid, target, torch.full_like(target, float("nan"))).requires_grad_()
    loss = rank_loss(ranks, target, valid)
    assert loss == 0
    loss.backward()
    assert torch.equal(ranks.grad, torch.zeros_like(target))


def test_is_a_mean_over_valid_keys() -> None:
    ranks, target = torch.zeros(1, 1, 4, requires_grad=True), torch.tensor([[[0.5, -3.0, 9.0, 1.0]]])
    valid = torch.tensor([[[True, True, False, False]]])
    loss = rank_loss(ranks, target, valid)
    torch.testing.assert_close(loss, torch.tensor((0.25 + 9.0) / 2))
    assert rank_loss(ranks, target, torch.zeros_like(valid)) == 0


def test_what_is_no_group_and_no_shards_is_refused() -> None:
    ranks, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool)
    with pytest.raises(InvalidInputError, match=r"shards must be what .*context_shards returns; got int"):
        rank_loss(ranks, ranks, mask, shards=3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="group must be a process group"):
        rank_loss(ranks, ranks, mask, group="gloo")
    with pytest.raises(InvalidInputError, match="one shape"):
        rank_loss(ranks[:, :1], ranks, mask)
