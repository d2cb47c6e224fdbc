"""`RankPredictor`: shapes, dtypes, untrained ties, and the reach of its gradients."""

from __future__ import annotations

import pytest
import torch

from dynamask.mixers.rank_predictor import RankPredictor


@pytest.mark.parametrize("width", [None, 0, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ranks_are_wide_and_untrained_ones_tie(width: int | None, dtype: torch.dtype) -> None:
    predictor = RankPredictor(32, 3, width=width).to(dtype)
    predictor.initialize_parameters()
    ranks = predictor(torch.randn(2, 7, 32, dtype=dtype))
    assert ranks.shape == (2, 3, 7)
    assert ranks.dtype == torch.promote_types(dtype, torch.float32)
    assert bool((ranks == 0).all())


def test_every_parameter_learns() -> None:
    predictor = RankPredictor(32, 3)
    predictor(torch.randn(2, 7, 32)).square().sum().backward()
    for name, parameter in predictor.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name


def test_parts_of_a_sequence_give_the_same_ranks() -> None:
    predictor, hidden = RankPredictor(32, 3), torch.randn(1, 40, 32)
    whole = predictor(hidden)
    parts = torch.cat([predictor(hidden[:, :13]), predictor(hidden[:, 13:])], dim=-1)
    assert torch.allclose(whole, parts, rtol=1e-4)
