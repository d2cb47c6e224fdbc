"""Add a mixer of your own: subclass, register, and every command and class knows it by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from dynamask import DynamaskConfig, DynamaskForCausalLM, interval_attention
from dynamask.mixers import GroupedQueryMixer, SequenceInfo, register
from dynamask.mixers.base import recency_expiry


class SinkAttention(GroupedQueryMixer):
    """A sliding window that also keeps the first keys ("attention sinks", arXiv 2309.17453): one more interval."""

    SINKS = 4

    @classmethod
    def cache_layer(cls, config: Any) -> CacheLayerMixin:
        """Keeps every key; a bounded one would be the next step."""
        return DynamicLayer()

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        batch, groups, length = key.shape[:3]
        expiry = recency_expiry(batch, groups, length, self.layer_window, sequence, key.device)
        whole = recency_expiry(batch, groups, length, length, sequence, key.device)
        sink = sequence.key_position_ids(length)[:, None] < self.SINKS
        return self.merge_heads(interval_attention(query, key, value, torch.where(sink, whole, expiry)))


register("sink", SinkAttention)

config = DynamaskConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    window=8,
    attention="sink",
)
model = DynamaskForCausalLM(config).eval()
tokens = torch.randint(0, 100, (1, 40))
with torch.no_grad():
    before = model(tokens).logits
    changed = tokens.clone()
    changed[:, 30:] = 0
    torch.testing.assert_close(model(changed).logits[:, :30], before[:, :30])
print("the new mixer is causal;", model.generate(tokens, max_new_tokens=5, pad_token_id=0).shape[1], "tokens generated")
