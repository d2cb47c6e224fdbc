"""Attention over a ragged cache: by its definition, in its limits, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask.ops.ragged_decode import ragged_decode


def by_definition(query, keys, values, live, offsets, bias, scale):
    """One softmax per row over the slots that count, with no pool and no mask."""
    ratio = query.shape[1] // (len(offsets) - 1)
    output = torch.zeros(*query.shape[:-1], values.shape[-1], dtype=query.dtype)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            slots = range(offsets[h // ratio], offsets[h // ratio + 1])
            kept = [s for s in slots if live is None or live[b, s]]
            if kept:
                logits = scale * query[b, h] @ keys[b, kept].T + (0 if bias is None else bias[b, kept])
                output[b, h] = logits.softmax(-1) @ values[b, kept]
    return output


@pytest.mark.parametrize("offsets", [(0, 5, 6, 30), (0, 0, 17, 17), (3, 10, 20, 29)])
def test_definition_and_gradients(offsets: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, 2, 8, dtype=torch.float64, requires_grad=True)
    keys, values = torch.randn(2, 30, 8).double(), torch.randn(2, 30, 5).double()
    live, bias = torch.rand(2, 30) < 0.7, torch.randn(2, 30).double()
    for mask, added in ((None, None), (live, None), (live, bias)):
        actual = ragged_decode(query, keys, values, mask, offsets, bias=added, scale=0.3)
        expected = by_definition(query.detach(), keys, values, mask, offsets, added, 0.3)
        torch.testing.assert_close(actual, expected)
    assert torch.autograd.gradcheck(lambda q: ragged_decode(q, keys, values, live, offsets, bias), query)


def test_dead_slots_change_nothing() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 2, 1, 8), torch.randn(1, 20, 8), torch.randn(1, 20, 8)
    live = torch.ones(1, 20, dtype=torch.bool)
    live[0, [3, 19]] = False
    live[0, 5:10] = False
    expected = ragged_decode(query, keys, values, live, (0, 5, 20))
    keys[~live], values[~live] = float("nan"), float("nan")
    assert torch.equal(ragged_decode(query, keys, values, live, (0, 5, 20)), expected)
    live[0, :5] = False
    assert (ragged_decode(query, keys, values, live, (0, 5, 20))[:, 0] == 0).all()


@pytest.mark.parametrize("height", [-1e7, 1e7, torch.finfo(torch.float32).min])
def test_weights_sum_to_one_at_any_bias(height: float) -> None:
    query, keys, values = torch.randn(1, 2, 1, 8), torch.randn(1, 9, 8), torch.ones(1, 9, 4)
    bias = torch.full((1, 9), height)
    torch.testing.assert_close(ragged_decode(query, keys, values, None, (0, 4, 9), bias), torch.ones(1, 2, 1, 4))
    bias[:, :4] = float("-inf")
    assert (ragged_decode(query, keys, values, None, (0, 4, 9), bias)[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": (0, 9, 5)}, "never falling"),
        ({"offsets": (0, 5, 31)}, "at most 30"),
        ({"offsets": (0,)}, "first slot of each"),
        ({"offsets": (0, 5, 7, 9, 11, 30)}, "multiple of the number of key/value heads"),
        ({"keys": torch.zeros(1, 2, 30, 8)}, "keys must be one pool"),
        ({"values": torch.zeros(1, 29, 8)}, "values must be one pool"),
        ({"live": torch.ones(1, 30)}, "live must be bool"),
        ({"bias": torch.zeros(1, 29)}, "bias must be a float tensor"),
        ({"query": torch.zeros(4, 1, 8)}, "query must be a float tensor"),
        ({"query": torch.zeros(1, 4, 1, 8).half()}, "share one dtype"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    arguments = {
        "query": torch.zeros(1, 4, 1, 8),
        "keys": torch.zeros(1, 30, 8),
        "values": torch.zeros(1, 30, 8),
        "live": None,
        "offsets": (0, 5, 30),
    }
    with pytest.raises(InvalidInputError, match=message):
        ragged_decode(**(arguments | change))
