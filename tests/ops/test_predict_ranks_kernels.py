"""The kernels of the rank predictor do what its torch operations do: on a GPU, or under TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

from dynamask.mixers.rank_predictor import RankPredictor

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)
# numpy, which the interpreter computes with, has no bfloat16.
NARROW = torch.bfloat16 if GPU else torch.float16


@pytest.mark.parametrize(("batch", "length", "hidden", "groups"), [(1, 1, 96, 3), (2, 3, 300, 8)])
@pytest.mark.parametrize(("given", "weights"), [(torch.float32,) * 2, (NARROW,) * 2, (NARROW, torch.float32)])
@torch.no_grad()
def test_ranks_of_a_few_positions(
    batch: int, length: int, hidden: int, groups: int, given: torch.dtype, weights: torch.dtype
) -> None:
    from dynamask.ops.triton.predict_ranks import predict_ranks_launch

    torch.manual_seed(0)
    predictor = RankPredictor(hidden, groups).to(DEVICE)
    torch.nn.init.normal_(predictor.down.weight)
    torch.nn.init.normal_(predictor.down.bias)
    predictor.to(weights)
    assert predictor.up is not None
    # Mean squares around which the constant of the norm counts, too.
    states = torch.randn(batch, length, hidden, device=DEVICE).to(given) * 0.05
    ranks = predict_ranks_launch(states, predictor.up.weight, predictor.down.weight, predictor.down.bias, 64.0)
    expected = predictor(states.repeat_interleave(64, 1))[..., ::64]  # more positions than the kernels take
    assert ranks.dtype == torch.float32
    assert torch.equal((ranks * 64).round(), ranks * 64)
    # A sum in another order may fall to the other side of a step.
    assert (ranks - expected).abs().max() <= (1.01 / 64 if given == torch.float32 else 8 / 64)
    assert ((ranks - expected).abs() > 1e-6).float().mean() < (0.1 if given == torch.float32 else 0.9)


def test_the_constant_of_the_norm() -> None:
    from dynamask.ops.triton.predict_ranks import rms_epsilon

    for dtype in (torch.float32, NARROW, torch.bfloat16):
        for size in (1.0, 0.01):
            x = torch.full((1, 128), size, dtype=dtype, device=DEVICE)
            expected = torch.nn.functional.rms_norm(x, (128,))[0, 0].item()
            value = x[0, 0].double().item()
            assert value / (value**2 + rms_epsilon(dtype, DEVICE)) ** 0.5 == pytest.approx(expected, rel=2e-2)
