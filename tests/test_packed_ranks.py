"""Ranks that travel as bits inside the values of an ordinary cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

from dynamask.errors import InvalidInputError
from dynamask.packed_ranks import check_carries_ranks, pack_ranks, rank_channels, unpack_ranks

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _pair(dtype: torch.dtype, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ranks = torch.randn(2, 3, length, dtype=wide)
    ranks[0, 0, :4] = torch.tensor([float("inf"), -float("inf"), -0.0, 1e-42])
    return torch.randn(2, 3, length, 8).to(dtype), ranks


@pytest.mark.parametrize("dtype", DTYPES)
def test_comes_back_bit_for_bit_through_a_dynamic_cache(dtype: torch.dtype) -> None:
    value, ranks = _pair(dtype)
    packed = pack_ranks(value, ranks)
    assert packed.shape[-1] == 8 + rank_channels(dtype)
    cache = DynamicCache()
    cache.update(packed[:, :, :4], packed[:, :, :4], 0)
    _, stored = cache.update(packed[:, :, 4:], packed[:, :, 4:], 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    for got, order in ((stored, [0, 1]), (cache.layers[0].values, [1, 0])):
        again, bits = unpack_ranks(got)
        assert torch.equal(again, value[order])
        assert torch.equal(bits, ranks[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_comes_back_bit_for_bit_through_a_static_layer(dtype: torch.dtype) -> None:
    value, ranks = _pair(dtype)
    layer = StaticLayer(max_cache_len=9)
    packed = pack_ranks(value, ranks)
    _, stored = layer.update(packed, packed, cache_position=torch.arange(6))
    again, bits = unpack_ranks(stored[:, :, :6])
    assert torch.equal(again, value)
    assert torch.equal(bits, ranks)


def test_passes_gradients_to_the_values() -> None:
    value, ranks = _pair(torch.float32)
    value.requires_grad_()
    unpack_ranks(pack_ranks(value, ranks))[0].sum().backward()
    assert torch.equal(value.grad, torch.ones_like(value))


def test_refuses_what_cannot_carry_ranks() -> None:
    value, ranks = _pair(torch.float32)
    with pytest.raises(InvalidInputError, match="float64, float32, bfloat16 or float16"):
        pack_ranks(value.to(torch.int8), ranks)
    with pytest.raises(InvalidInputError, match="ranks must be of shape"):
        pack_ranks(value, ranks[:, :1])
    check_carries_ranks(DynamicCache(), 0, 8)
