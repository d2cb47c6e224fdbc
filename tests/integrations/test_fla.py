"""The layer with the call of flash-linear-attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dynamask import BoundedCache, InvalidInputError
from dynamask.cache import BoundedLayer
from dynamask.integrations.fla import DynamicMaskAttention
from dynamask.mixers import RankPredictor

STATES = torch.randn(1, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layer(index: int = 0) -> Any:
    torch.manual_seed(0)
    made = DynamicMaskAttention(32, 4, 2, index, window=[5, 9], local=2, sinks=1).double().eval()
    for module in made.modules():
        if isinstance(module, RankPredictor):
            torch.nn.init.normal_(module.down.weight, std=1.0)
    return made


def caches() -> dict[str, Any]:
    found: dict[str, Any] = {"none": lambda: None, "dynamic": DynamicCache}
    try:
        from fla.models.utils import Cache
    except ImportError:
        return found
    return found | {"fla": Cache}


@pytest.mark.parametrize("kind", caches())
def test_a_cache_goes_in_and_comes_out(kind: str) -> None:
    layers = [layer(0), layer(1)]
    cache = caches()[kind]()
    whole = STATES
    parts = []
    with torch.no_grad():
        for each in layers:
            output, weights, none = each(whole)
            assert (weights, none) == (None, None)
            whole = whole + output
        for piece in STATES.split([12, 1, 11], 1):
            states = piece
            for each in layers:
                output, _, cache = each(states, past_key_values=cache, use_cache=True)
                states = states + output
            parts.append(states)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert [type(place) for place in cache.layers] == [BoundedLayer] * 2
    assert cache.layers[1].keys_held.tolist() == [[5, 9]]


def test_packed_documents() -> None:
    attention = layer()
    with torch.no_grad():
        packed = attention(STATES, cu_seqlens=torch.tensor([0, 10, 24]))[0]
        apart = [attention(part)[0] for part in STATES.split([10, 14], 1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1))
    for borders, complaint in (([0, 10], "from 0 to 24"), ([0, 12, 10, 24], "not decrease")):
        with pytest.raises(InvalidInputError, match=complaint):
            attention(STATES, cu_seqlens=torch.tensor(borders))
    with pytest.raises(InvalidInputError, match="one row"):
        attention(STATES.expand(2, -1, -1), cu_seqlens=torch.tensor([0, 24]))
    with pytest.raises(InvalidInputError, match="leave no cache"):
        attention(STATES, cu_seqlens=torch.tensor([0, 24]), use_cache=True)


def test_what_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="output_attentions"):
        layer()(STATES, output_attentions=True)
    used = BoundedCache(windows=[6], local=2, sinks=1)
    used.layers[0].attend(*torch.randn(3, 1, 2, 4, 8).double(), None)
    with pytest.raises(InvalidInputError, match="this cache was made for windows"):
        layer()(STATES, past_key_values=used)
