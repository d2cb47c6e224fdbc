"""The layer for models of one's own: (B, N, dim) in and out, any cache, and ranks that learn by their own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import dynamask
from dynamask import InvalidInputError
from dynamask.layers import new_cache, rank_loss_of
from dynamask.mixers import RankPredictor


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_heads": 4, "num_kv_heads": 2, "window": [5, 9], "local": 2, "sinks": 1}
    made = dynamask.DynamicMaskAttention(**{**sizes, **options}).double().eval()
    for module in made.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
        if isinstance(module, RankPredictor):
            nn.init.normal_(module.down.weight, std=1.0)
    return made


def stack() -> list[Any]:
    return [layer(layer_idx=0), layer(layer_idx=1, window=[7, 4])]


def run(layers: list[Any], states: torch.Tensor, **arguments: Any) -> torch.Tensor:
    for each in layers:
        states = states + each(states, **arguments)
    return states


STATES = torch.randn(2, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_shape_and_windows() -> None:
    assert layer()(STATES).shape == STATES.shape
    wide, narrow = layer(window=64), layer(window=5)
    assert wide.windows == (64, 64)
    narrow.load_state_dict(wide.state_dict())
    assert torch.equal(wide(STATES)[:, :5], narrow(STATES)[:, :5])
    assert not torch.allclose(wide(STATES), narrow(STATES)), "a smaller window sees less"


@pytest.mark.parametrize("kind", ["bounded", "dynamic"])
@pytest.mark.parametrize("pieces", [(10, 1, 1, 12), pytest.param((1,) * 24, marks=pytest.mark.slow)])
def test_cached_is_uncached(kind: str, pieces: tuple[int, ...]) -> None:
    layers = stack()
    cache: Any = new_cache(layers) if kind == "bounded" else DynamicCache()
    with torch.no_grad():
        whole = run(layers, STATES)
        parts = [run(layers, piece, cache=cache) for piece in STATES.split(list(pieces), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.get_seq_length() == 24
    if kind == "bounded":
        assert cache.layers[1].keys_held.tolist() == [[7, 4]] * 2


def test_padding_and_packing() -> None:
    layers = stack()
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :6] = 0
    with torch.no_grad():
        padded = run(layers, STATES, attention_mask=mask)
        alone = run(layers, STATES[:1, 6:])
        packed = run(layers, STATES[:1], segment_ids=torch.tensor([[0] * 10 + [1] * 14]))
        starts_over = run(layers, STATES[:1], position_ids=torch.tensor([[*range(10), *range(14)]]))
        apart = [run(layers, part) for part in STATES[:1].split([10, 14], 1)]
    torch.testing.assert_close(padded[:1, 6:], alone)
    torch.testing.assert_close(packed, torch.cat(apart, 1))
    torch.testing.assert_close(starts_over, packed)


@pytest.mark.slow
def test_ranks_learn_by_their_own_loss_alone() -> None:
    model = nn.ModuleList(stack()).train()
    states = STATES.clone().requires_grad_()
    run(list(model), states).square().mean().backward()
    predictors = [module for module in model.modules() if isinstance(module, RankPredictor)]
    assert all(p.grad is None or not p.grad.any() for each in predictors for p in each.parameters())
    run(list(model), states)
    loss = rank_loss_of(model)
    assert loss is not None
    optimizer = torch.optim.Adam([p for each in predictors for p in each.parameters()], lr=3e-3)
    first = loss.item()
    for _ in range(20):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run(list(model), STATES)
        loss = rank_loss_of(model)
        assert loss is not None
    assert loss.item() < 0.8 * first
    with torch.no_grad():
        run(list(model), STATES)
    assert rank_loss_of(model) is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dim": 0}, "dim must be an integer"),
        ({"dim": 30}, "dim=30 is no multiple of num_heads=4"),
        ({"num_kv_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"window": [5, 2]}, "local"),
        ({"layer_idx": -1}, "layer_idx must be an integer of at least 0"),
        ({"layer_idx": "0"}, "layer_idx must be an integer"),
        ({"num_heads": "a"}, "num_heads must be an integer of at least 1"),
        ({"num_heads": True}, "num_heads must be an integer"),
        ({"num_kv_heads": "a"}, "num_kv_heads must be an integer"),
        ({"head_dim": 4.0}, "head_dim must be an integer"),
        ({"local": "a"}, "local must be an integer"),
        ({"sinks": 1.5}, "sinks must be an integer"),
        ({"window": 3.5}, "window must be an integer"),
    ],
)
def test_sizes_are_checked(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=complaint):
        layer(**options)


def test_an_additive_mask_is_refused_and_a_float_mask_of_ones_is_not() -> None:
    additive = torch.zeros(2, 24)
    for mask in (additive, additive.index_fill(1, torch.tensor([0]), -1e9), torch.full((2, 24), float("nan"))):
        with pytest.raises(InvalidInputError, match="1 for a real token and 0 for padding"):
            layer()(STATES, mask)
    padded = torch.ones(2, 24)
    padded[0, :5] = 0
    torch.testing.assert_close(layer()(STATES, padded), layer()(STATES, padded.long()), rtol=0, atol=0)


def test_inputs_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="hidden_states must be"):
        layer()(STATES[0])
    with pytest.raises(InvalidInputError, match="attention_mask covers"):
        layer()(STATES, torch.ones(2, 5))
    with pytest.raises(InvalidInputError, match="this cache was made for windows"):
        layer()(STATES, cache=dynamask.BoundedCache(windows=[8], local=2, sinks=1))
    with pytest.raises(InvalidInputError, match="layer_idx 0, 1, 2"):
        new_cache([layer(layer_idx=1)])


@pytest.mark.parametrize("shape", [(0, 9, 32), (2, 0, 32)])
def test_empty_tensors_give_an_empty_result(shape: tuple[int, ...]) -> None:
    layer = dynamask.DynamicMaskAttention(32, window=8)
    assert layer(torch.randn(shape)).shape == shape
