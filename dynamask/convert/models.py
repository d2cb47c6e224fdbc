"""Models of other architectures whose attention runs on dynamask: Llama, Mistral, Qwen2, Qwen3, SmolLM3, Doge.

Each is the transformers class with its attention modules exchanged, under a model_type of its own
("dynamask_llama", ...), so that `save_pretrained` and `AutoModelForCausalLM.from_pretrained` keep the gates.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.doge.modeling_doge import DogeDecoderLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dynamask.cache import BoundedCache, BoundedLayer
from dynamask.errors import InvalidInputError
from dynamask.mixers.base import SequenceInfo, cached_rows, packed_segments
from dynamask.mixers.dma import dynamic_mask_mix
from dynamask.mixers.gate import DynamicMaskGate
from dynamask.mixers.mha import dense_attention
from dynamask.mixers.rank_predictor import RankPredictor
from dynamask.models.generation import OwnCacheGeneration


def _padding_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' mask hook: hand the 2-d padding mask through; the intervals do the rest."""
    return attention_mask


def _never_called(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("attention 'dynamask' belongs to converted models; use dynamask.convert to make one")


AttentionInterface.register("dynamask", _never_called)
AttentionMaskInterface.register("dynamask", _padding_mask)


class ConvertedAttention(nn.Module):
    """The projections of a transformers attention module, with dynamic mask attention between them, or, in a layer
    without a window, dense attention.

    Args:
        original: the module it replaces; its projections and head norms are taken over, not copied.
        config: the converted model's configuration.
        layer_idx: index of the layer.
    """

    def __init__(self, original: Any, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = original.head_dim
        self.scaling = original.scaling
        self.use_rope = bool(getattr(original, "use_rope", True))  # SmolLM3 leaves RoPE out of some layers
        self.window, self.local = config.layer_windows[layer_idx], config.layer_locals[layer_idx]
        self.q_proj, self.k_proj = original.q_proj, original.k_proj
        self.v_proj, self.o_proj = original.v_proj, original.o_proj
        self.q_norm = getattr(original, "q_norm", nn.Identity())
        self.k_norm = getattr(original, "k_norm", nn.Identity())
        self.sinks = config.sinks
        self.gate: DynamicMaskGate | None = None
        self.rank_predictor: RankPredictor | None = None
        if self.window is not None and config.ranking == "paper":
            bias = config.model_type == "dynamask_doge" and config.attention_bias
            self.gate = DynamicMaskGate(config.num_key_value_heads, self.head_dim, bias=bias)
        elif self.window is not None:
            self.rank_predictor = RankPredictor(config.hidden_size, config.num_key_value_heads)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, Nq, hidden) -> (B, Nq, hidden), and no attention weights: they are never materialised."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.use_rope:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        sequence = _sequence(hidden_states, attention_mask, position_ids, past_key_values, self.layer_idx)
        if self.window is None:
            if past_key_values is not None:
                key, value = cached_rows(past_key_values, key, value, self.layer_idx, sequence)
            output = dense_attention(query, key, value, sequence, scale=self.scaling)
        else:
            output = dynamic_mask_mix(
                query,
                key,
                value,
                self.gate(value) if self.gate is not None else self.rank_predictor(hidden_states.detach()),
                sequence,
                windows=(self.window,) * key.shape[1],
                local=self.local,
                sinks=self.sinks,
                cache=past_key_values,
                layer_idx=self.layer_idx,
                scale=self.scaling,
                gate=self.gate,
            )
        return self.o_proj(output.transpose(1, 2).flatten(2)), None


def _sequence(
    hidden_states: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None, layer_idx: int
) -> SequenceInfo:
    batch, new = hidden_states.shape[:2]
    if mask is not None and mask.dim() != 2:
        raise InvalidInputError(
            f"attention_mask must be (batch, length), 1 for a real token; got shape {tuple(mask.shape)}. "
            "For packed documents pass position_ids that start over."
        )
    if position_ids is None:
        raise InvalidInputError("the decoder passed no position_ids to its attention: transformers >= 5.10 does")
    position_ids = position_ids.expand(batch, new)
    past = cache.get_seq_length(layer_idx) if cache is not None else 0
    segment_ids = packed_segments(position_ids) if mask is None and past == 0 and new > 1 else None
    length = None if cache is None else int(past) + new
    return SequenceInfo(position_ids, segment_ids, None if mask is None else mask.bool(), length)


@functools.cache
def _doge_layer_unpacks_experts() -> bool:
    """Whether this transformers' Doge layer takes the hidden states out of its experts' (hidden, router) pair.

    Some releases forgot to, and cannot run Doge's mixture of experts at all.
    """
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


def _first_output(module: nn.Module, inputs: Any, output: Any) -> Tensor:
    return output[0]


class ConvertedModel(OwnCacheGeneration):
    """What the converted classes share, mixed in before the transformers class."""

    config: Any

    def __init__(self, config: Any) -> None:
        config._attn_implementation = "dynamask"
        super().__init__(config)  # type: ignore[call-arg]
        layers: Any = self.model.layers  # type: ignore[attr-defined]
        for index, layer in enumerate(layers):
            layer.self_attn = ConvertedAttention(layer.self_attn, config, index)
            for ranks in (layer.self_attn.gate, layer.self_attn.rank_predictor):
                if ranks is not None:
                    ranks.apply(self._init_weights)
            if getattr(config, "is_moe", False) and not _doge_layer_unpacks_experts():
                layer.mlp.register_forward_hook(_first_output)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, (DynamicMaskGate, RankPredictor)):
            module.initialize_parameters()

    def _new_cache(self) -> Cache:
        windows, locals_ = self.config.layer_windows, self.config.layer_locals
        if windows is None or None not in windows:
            return BoundedCache(self.config)
        kinds = zip(windows, locals_, strict=True)
        return Cache(
            layers=[DynamicLayer() if window is None else BoundedLayer(window, local=n) for window, n in kinds]
        )


def _register(config_class: type, model_class: type) -> tuple[type, type]:
    """Make, name and register the converted twin of a transformers configuration and model."""
    fields = {
        "window": (int, 2048),
        "local": (int, 0),
        "layer_windows": (list[int | None] | None, None),
        "layer_locals": (list[int] | None, None),
        "sinks": (int, 0),
        "ranking": (str, "paper"),
    }
    model_type = f"dynamask_{config_class.model_type}"  # type: ignore[attr-defined]
    body: dict[str, Any] = {name: default for name, (_, default) in fields.items()}
    body["__annotations__"] = {name: annotation for name, (annotation, _) in fields.items()}
    body |= {"model_type": model_type, "__module__": __name__, "base_model_tp_plan": {}}
    body["__doc__"] = f"`{config_class.__name__}` with the window of its dynamic mask attention."
    config: Any = strict(type(f"Dynamask{config_class.__name__}", (config_class,), body))
    model = type(
        f"Dynamask{model_class.__name__}",
        (ConvertedModel, model_class),
        {
            "config_class": config,
            "__module__": __name__,
            "__annotations__": {"config": config},
            "__doc__": f"`{model_class.__name__}` whose attention runs on dynamask.",
        },
    )
    globals()[config.__name__], globals()[model.__name__] = config, model  # picklable by name
    AutoConfig.register(model_type, config)
    AutoModelForCausalLM.register(config, model)
    return config, model


CONVERTED: dict[type, tuple[type, type]] = {
    original: _register(config, original)
    for config, original in (
        (LlamaConfig, LlamaForCausalLM),
        (MistralConfig, MistralForCausalLM),
        (Qwen2Config, Qwen2ForCausalLM),
        (Qwen3Config, Qwen3ForCausalLM),
        (SmolLM3Config, SmolLM3ForCausalLM),
        (DogeConfig, DogeForCausalLM),
    )
}
"""transformers class -> the converted configuration and model class."""
