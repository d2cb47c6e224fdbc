"""Doge's attention module, with dynamic mask attention between its projections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dynamask.convert.attention import call_facts, check_holds
from dynamask.mixers.dma import dynamic_mask_mix
from dynamask.mixers.gate import DynamicMaskGate
from dynamask.models.generation import check_not_empty


class DogeAttention(nn.Module):
    """The projections of Doge's attention module, with dynamic mask attention between them.

    Args:
        original: the module it replaces; its projections and head norms are taken over, not copied.
        config: the converted model's configuration.
        layer_idx: index of the layer.
    """

    def __init__(self, original: Any, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = original.head_dim, original.scaling
        self.q_proj, self.k_proj = original.q_proj, original.k_proj
        self.v_proj, self.o_proj = original.v_proj, original.o_proj
        self.q_norm, self.k_norm = original.q_norm, original.k_norm
        self.gate = DynamicMaskGate(config.num_key_value_heads, self.head_dim, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, Nq, hidden) -> (B, Nq, hidden), and no attention weights: they are never materialised."""
        check_not_empty(hidden_states.shape, "a converted model")
        cache = past_key_values if cache is None else cache
        batch, new = hidden_states.shape[:2]
        query, key, value = self.project(hidden_states, position_embeddings)
        past = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
        cached = cache is not None
        if cache is not None and self.layer_idx == 0:
            check_holds(cache, self.config, None, new)
        facts = call_facts(batch, new, attention_mask, position_ids, past, hidden_states.device, cached=cached)
        output = dynamic_mask_mix(
            query,
            key,
            value,
            self.gate(value),
            facts.sequence(),
            windows=self.config.head_windows[self.layer_idx],
            local=self.config.local,
            sinks=self.config.sinks,
            cache=cache,
            layer_idx=self.layer_idx,
            scale=self.scaling,
            gate=self.gate,
        )
        return self.o_proj(output.transpose(1, 2).flatten(2)), None

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, N, hidden) to query (B, H, N, D), key and value (B, G, N, D), query and key rotated."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        return query, key, value


def convert_layer(layer: Any, config: Any, initialize: Callable[[nn.Module], None]) -> None:
    """Exchange the attention module of a Doge decoder layer, in place."""
    layer.self_attn = DogeAttention(layer.self_attn, config, layer.self_attn.layer_idx)
    layer.self_attn.gate.apply(initialize)
    if getattr(config, "is_moe", False) and not doge_layer_unpacks_experts():
        layer.mlp.register_forward_hook(first_output)


@functools.cache
def doge_layer_unpacks_experts() -> bool:
    """Whether this transformers' Doge layer takes the hidden states out of its experts' (hidden, router) pair.

    Some releases do not, and cannot run Doge's mixture of experts at all.
    """
    from transformers import DogeConfig
    from transformers.models.doge.modeling_doge import DogeDecoderLayer

    config = DogeConfig(
        hidden_size=4,
        intermediate_size=4,
        num_attention_heads=1,
        num_key_value_heads=1,
        is_moe=True,
        num_experts=4,
        num_experts_per_tok=1,
    )
    config._attn_implementation = "eager"
    layer = DogeDecoderLayer(config, 0)
    try:
        layer(torch.zeros(1, 1, 4), position_embeddings=(torch.ones(1, 1, 4), torch.zeros(1, 1, 4)))
    except TypeError:
        return False
    return True


def first_output(module: nn.Module, inputs: Any, output: Any) -> Tensor:
    """Return the hidden states of the experts' pair (a forward hook)."""
    return output[0]
