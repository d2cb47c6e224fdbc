"""vLLM's models with the attention of dynamask.

Each class is vLLM's model of the architecture whose attention modules get two things: the rank predictor, which reads
what the module reads, and `BoundedAttention` in the place of vLLM's paged attention.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.granite import GraniteForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from dynamask.mixers.gate import DynamicMaskGate
from dynamask.mixers.rank_predictor import RankPredictor
from dynamask.serving.state import LayerState
from dynamask.serving.vllm.attention import BoundedAttention, SequenceState
from dynamask.serving.vllm.names import STATE


class RankedAttention(nn.Module):
    """Mixed in before an attention class of vLLM: ranks the keys of a call before the class attends.

    Attributes:
        attn: in the place of vLLM's attention.
        rank_predictor: None where the newest keys are kept, or values rank the keys.
        slopes: (G,) float32, how much the ranks of each head rise per token, or None.
    """

    attn: BoundedAttention
    rank_predictor: RankPredictor | None
    slopes: Tensor | None

    def forward(self, positions: Tensor, hidden_states: Tensor, **kwargs: Any) -> Any:
        """(T,) and (T, hidden) -> (T, hidden), as the class itself."""
        if self.rank_predictor is not None:
            ranks = self.rank_predictor(hidden_states[None])[0].transpose(0, 1)
            if self.slopes is not None:  # `sloped_ranks`, with a tensor that a compiler sees
                ranks = ranks + self.slopes * positions[:, None].to(ranks.dtype)
            self.attn.ranks = ranks
        output = super().forward(positions=positions, hidden_states=hidden_states, **kwargs)
        self.attn.ranks = None
        return output


@functools.cache
def _ranked_class(original: type) -> type:
    return type(f"Ranked{original.__name__}", (RankedAttention, original), {"__module__": __name__})


def _served_layers(config: Any) -> list[tuple[LayerState, bool]]:
    """Return what each layer keeps, and whether it ranks its keys."""
    native = hasattr(config, "layer_mixers")
    layers: list[tuple[LayerState, bool]] = []
    first = 0
    for index, windows in enumerate(config.head_windows):
        if native:
            ranks = config.layer_mixers[index] == "dma"
            local, sinks = config.local if ranks else min(windows) - config.sinks, config.sinks
        else:
            ranks = config.ranks_layer(index)
            local, sinks = config.layer_locals[index], config.layer_sinks[index]
        paper = ranks and config.ranking == "paper"
        layer = LayerState(windows, local=local, sinks=sinks, first=first, scale=1.0, bias_is_rank=paper)
        layers.append((layer, ranks))
        first = layer.last
    return layers


def attach(model: Any, vllm_config: VllmConfig) -> None:
    """Give a model of vLLM the attention of dynamask, in place.

    Args:
        model: freshly made, with `model.layers` whose `self_attn` has vLLM's attention as `attn`.
        vllm_config: its configuration; the state is added to its table of layers.
    """
    config, dtype = vllm_config.model_config.hf_config, vllm_config.model_config.dtype
    table = vllm_config.compilation_config.static_forward_context
    served = _served_layers(config)
    modules = [layer.self_attn for layer in model.model.layers]
    dim = modules[0].attn.head_size
    state = SequenceState([layer for layer, _ in served], dim, dim, dtype)
    for index, (module, (layer, ranks)) in enumerate(zip(modules, served, strict=True)):
        paged = module.attn
        del table[paged.layer_name]
        layer.scale = float(paged.impl.scale)
        module.attn = BoundedAttention(state, index, paged.num_heads, paged.num_kv_heads)
        module.rank_predictor = None
        slopes = config.head_slopes[index] if hasattr(config, "head_slopes") else None
        slope = None if slopes is None else torch.tensor(slopes, dtype=torch.float32)
        module.register_buffer("slopes", slope, persistent=False)
        if layer.bias_is_rank:
            module.gate = DynamicMaskGate(paged.num_kv_heads, dim)
            module.attn.gate = (module.gate,)
        elif ranks:
            width = getattr(config, "rank_predictor_width", None)
            predictor = RankPredictor(config.hidden_size, paged.num_kv_heads, width=width)
            # As transformers does, which keeps predictors in float32 in a model of float16.
            module.rank_predictor = predictor.to(torch.float32 if dtype == torch.float16 else dtype)
        module.__class__ = _ranked_class(type(module))  # type: ignore[arg-type]
    table[STATE] = state


class _Served:
    """What the served classes share, mixed in before vLLM's class.

    The two flags are those of vLLM's protocols `HasInnerState` and `IsAttentionFree`, which cannot be mixed in: a
    protocol's constructor would hide that of vLLM's class.
    """

    has_inner_state: ClassVar[Literal[True]] = True
    is_attention_free: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        attach(self, vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of one sequence's state: keys, values, ranks and positions."""
        config = vllm_config.model_config.hf_config
        slots = _served_layers(config)[-1][0].last
        dim = vllm_config.model_config.get_head_size()
        return (slots, dim), (slots, dim), (slots,), (slots,)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Return the dtypes of one sequence's state: keys, values, ranks and positions."""
        dtype = vllm_config.model_config.dtype
        return dtype, dtype, torch.float32, torch.int32


class DynamaskLlamaForCausalLM(_Served, LlamaForCausalLM):
    """A converted Llama."""


class DynamaskMistralForCausalLM(_Served, MistralForCausalLM):
    """A converted Mistral."""


class DynamaskQwen2ForCausalLM(_Served, Qwen2ForCausalLM):
    """A converted Qwen2."""


class DynamaskQwen3ForCausalLM(_Served, Qwen3ForCausalLM):
    """A converted Qwen3."""


class DynamaskGemma2ForCausalLM(_Served, Gemma2ForCausalLM):
    """A converted Gemma 2."""


class DynamaskGemma3ForCausalLM(_Served, Gemma3ForCausalLM):
    """A converted Gemma 3, text only."""


class DynamaskPhi3ForCausalLM(_Served, Phi3ForCausalLM):
    """A converted Phi-3."""


class DynamaskGraniteForCausalLM(_Served, GraniteForCausalLM):
    """A converted Granite."""


_NATIVE_NAMES = {
    ".mixer_norm.": ".input_layernorm.",
    ".mlp_norm.": ".post_attention_layernorm.",
    ".mixer.": ".self_attn.",
}


class DynamaskForCausalLM(_Served, Qwen3ForCausalLM):
    """A native dynamask model, which is a Qwen3 by other names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        vllm_config.model_config.hf_config.hidden_act = "silu"
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of a checkpoint; return the names of the parameters they filled."""
        return super().load_weights((_renamed(name), weight) for name, weight in weights)


def _renamed(name: str) -> str:
    """Return the name that vLLM's Qwen3 has for a parameter of a native model."""
    for ours, theirs in _NATIVE_NAMES.items():
        name = name.replace(ours, theirs)
    return name
