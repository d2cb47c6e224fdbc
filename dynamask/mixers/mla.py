"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1): a compressed key/value cache.

Keys and values of all heads are linear in one latent vector per position; position enters through a small
rotated key that all heads share. Only those two are cached.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from dynamask.mixers.base import Mixer, RMSNorm, SequenceInfo
from dynamask.mixers.mha import dense_attention


class MultiHeadLatentAttention(Mixer):
    """Dense causal attention over a latent of `kv_lora_rank` numbers per position.

    At decoding (one new token, a cache) the up-projections are absorbed into the query and the output, so that
    attention runs in the latent space, as one key/value head of width kv_lora_rank + qk_rope_head_dim, and the
    keys and values of the past are never built.
    """

    sub_configuration: ClassVar[str | None] = "mla"

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.num_heads = config.num_attention_heads
        self.nope_dim, self.rope_dim = config.mla["qk_nope_head_dim"], config.mla["qk_rope_head_dim"]
        self.value_dim, self.rank = config.mla["v_head_dim"], config.mla["kv_lora_rank"]
        query_dim, query_rank = self.num_heads * (self.nope_dim + self.rope_dim), config.mla["q_lora_rank"]
        if query_rank:
            self.q_down: nn.Module = nn.Linear(config.hidden_size, query_rank, bias=False)
            self.q_norm: nn.Module = RMSNorm(query_rank, config.rms_norm_eps)
            self.q_proj = nn.Linear(query_rank, query_dim, bias=False)
        else:
            self.q_down, self.q_norm = nn.Identity(), nn.Identity()
            self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=False)
        self.kv_down = nn.Linear(config.hidden_size, self.rank + self.rope_dim, bias=False)
        self.kv_norm = RMSNorm(self.rank, config.rms_norm_eps)
        self.kv_up = LatentProjection(self.rank, self.num_heads, self.nope_dim, self.value_dim)
        self.o_proj = nn.Linear(self.num_heads * self.value_dim, config.hidden_size, bias=False)
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5

    @classmethod
    def default_dimensions(cls, config: Any, given: dict[str, Any]) -> dict[str, int | None]:
        """Choose dimensions that give the layer as many parameters as grouped-query attention of the same config.

        Heads keep their width, a quarter of which (at least 16, even) is rotated. What the two query and
        output projections leave of the grouped-query budget buys the latent's rank.
        """
        hidden, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
        rope = given.get("qk_rope_head_dim") or min(dim // 2, max(16, dim // 4))
        nope = given.get("qk_nope_head_dim") or dim - rope
        value = given.get("v_head_dim") or dim
        # kv_down and kv_up share the budget of k_proj and v_proj, give or take what the widths changed.
        budget = 2 * hidden * (heads + config.num_key_value_heads) * dim
        query_dim, query_rank = heads * (nope + rope), given.get("q_lora_rank")
        queries = hidden * query_rank + query_rank + query_rank * query_dim if query_rank else hidden * query_dim
        budget -= queries + hidden * heads * value + hidden * rope
        rank = max(8, round(budget / (hidden + heads * (nope + value)) / 8) * 8)
        return {
            "kv_lora_rank": given.get("kv_lora_rank") or rank,
            "q_lora_rank": query_rank,
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": rope,
            "v_head_dim": value,
        }

    @property
    def rotary_dim(self) -> int:
        """Return the width of the part of a head that carries the position."""
        return self.rope_dim

    @classmethod
    def cache_layer(cls, config: Any, layer_idx: int) -> CacheLayerMixin:
        """Make a `LatentLayer`."""
        return LatentLayer()

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        batch, new, _ = hidden_states.shape
        query = self.q_proj(self.q_norm(self.q_down(hidden_states)))
        query = query.view(batch, new, self.num_heads, self.nope_dim + self.rope_dim).transpose(1, 2)
        q_nope, q_rope = query.split([self.nope_dim, self.rope_dim], dim=-1)
        q_rope = self.rotated(q_rope, sequence)
        latent, k_rope = self.kv_down(hidden_states).split([self.rank, self.rope_dim], dim=-1)
        latent = self.kv_norm(latent).unsqueeze(1)  # (B, 1, N, rank): one head, so that any cache can hold it
        k_rope = self.rotated(k_rope.unsqueeze(1), sequence)
        if cache is not None:
            latent, k_rope = self.remember(cache, latent, k_rope, sequence)
        # Adapters and quantisers replace the projection by modules that only multiply.
        absorbs = new == 1 and latent.shape[2] > 1 and isinstance(self.kv_up, LatentProjection)
        attend = self._absorbed if absorbs else self._expanded
        output = attend(q_nope, q_rope, latent, k_rope, sequence)
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, sequence: SequenceInfo
    ) -> Tensor:
        """Build keys and values of every head from the latent: cheapest where queries are as many as keys.

        By default a head's key is as wide as its value, which every backend of SDPA takes; `dense_attention` sees to
        other widths.
        """
        batch, _, length, _ = latent.shape
        rows = self.kv_up(latent.squeeze(1)).view(batch, length, self.num_heads, self.nope_dim + self.value_dim)
        k_nope, value = rows.transpose(1, 2).split([self.nope_dim, self.value_dim], dim=-1)
        key = torch.cat([k_nope, k_rope.expand(-1, self.num_heads, -1, -1)], dim=-1)
        return dense_attention(torch.cat([q_nope, q_rope], dim=-1), key, value, sequence, scale=self.scale)

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, sequence: SequenceInfo
    ) -> Tensor:
        """Attend in the latent space: q·(W c) = (Wᵀ q)·c, and the sum over W c is W times the sum over c."""
        query = torch.cat([self.kv_up(q_nope, absorb="query"), q_rope], dim=-1)
        key = torch.cat([latent, k_rope], dim=-1)
        mask = None
        if sequence.key_mask is not None:
            mask = sequence.key_mask[:, None, None]
            mask = mask | ~mask.any(-1, keepdim=True)  # a row of padding alone: numbers without meaning, not NaN
        # SDPA rather than interval attention: one query needs no intervals, and at this head width (768 in the
        # largest preset) the GPU kernels' tiles would not fit.
        mixed = F.scaled_dot_product_attention(query, key, latent, attn_mask=mask, scale=self.scale, enable_gqa=True)
        return self.kv_up(mixed, absorb="value")  # type: ignore[no-any-return]


class LatentProjection(nn.Linear):
    """Keys and values of all heads from the latent, or the same product from the other side.

    All three are one module's forward, so that hooks which bring its weight to the device see every use of it.

    Args:
        rank: width of the latent.
        heads: query heads H.
        key_dim, value_dim: of a head.
    """

    def __init__(self, rank: int, heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__(rank, heads * (key_dim + value_dim), bias=False)
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim

    def forward(self, input: Tensor, absorb: str | None = None) -> Tensor:
        """Project.

        Args:
            input: (..., rank); with `absorb`, (B, H, N, key_dim or rank).
            absorb: None: latent to keys and values. "query": queries into the latent space, so that their products with
                latents are those with keys. "value": mixed latents to mixed values.

        Returns:
            (..., H * (key_dim + value_dim)), (B, H, N, rank) or (B, H, N, value_dim).
        """
        if absorb is None:
            return super().forward(input)
        up = self.weight.view(self.heads, self.key_dim + self.value_dim, self.in_features)
        up_key, up_value = up.split([self.key_dim, self.value_dim], dim=1)
        if absorb == "query":
            return torch.einsum("bhnd,hdr->bhnr", input, up_key)
        return torch.einsum("bhnr,hvr->bhnv", input, up_value)


class LatentLayer(DynamicLayer):
    """A growing cache layer that holds the latent (B, 1, N, kv_lora_rank) as keys and k_rope as values."""
