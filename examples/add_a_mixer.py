"""Add a mixer: one class, one registry line. Every command, class and cache then takes it by name."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask import BoundedCache, DynamaskConfig, DynamaskForCausalLM
from dynamask.cache import BoundedLayer, bounded_layer
from dynamask.mixers import GroupedQueryMixer, SequenceInfo, register
from dynamask.mixers.base import recency_expiry
from dynamask.ops import interval_attention


class EveryOtherWindow(GroupedQueryMixer):
    """A sliding window whose width alternates between the KV heads: near heads beside far ones."""

    bounded: ClassVar[bool] = True  # so that BoundedCache serves it

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.windows = self.widths(config, layer_idx)

    @staticmethod
    def widths(config: Any, layer_idx: int) -> tuple[int, ...]:
        """Windows of the KV heads; `mixer_options` holds what a mixer needs beyond the configuration's fields."""
        factor = (config.mixer_options or {}).get("narrowing", 2)
        return tuple(w // factor if g % 2 else w for g, w in enumerate(config.head_windows[layer_idx]))

    @classmethod
    def cache_layer(cls, config: Any, layer_idx: int) -> CacheLayerMixin:
        """The cache layer that `generate()` and `BoundedCache` make for it."""
        return BoundedLayer(cls.widths(config, layer_idx), local=0, sinks=config.sinks)

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        layer = None if cache is None else bounded_layer(cache, self.layer_idx)
        if layer is not None:  # equal ranks: the newest keys stay
            layer.check_fits(self.windows, local=0, sinks=self.sinks)
            return self.merge_heads(layer.attend(query, key, value, None, key_mask=sequence.new_key_mask()))
        if cache is not None:  # transformers' caches; `remember` leaves out the slots that a static one has not filled
            key, value = self.remember(cache, key, value, sequence)
        expiry = recency_expiry(key, self.windows, sequence, sinks=self.sinks)
        return self.merge_heads(interval_attention(query, key, value, expiry))


register("every_other", EveryOtherWindow)

if __name__ == "__main__":
    config = DynamaskConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        windows=8,
        attention="every_other",
        mixer_options={"narrowing": 4},
    )
    model = DynamaskForCausalLM(config).eval()
    tokens = torch.randint(0, 100, (1, 40))
    with torch.no_grad():
        before = model(tokens).logits
        changed = tokens.clone()
        changed[:, 30:] = 0
        torch.testing.assert_close(model(changed).logits[:, :30], before[:, :30])
        cache = BoundedCache(config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([25, 14, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), before)
    generated = model.generate(tokens, max_new_tokens=5, pad_token_id=0)
    print("the new mixer is causal, and decodes from a cache of its windows;", generated.shape[1], "tokens in all")
