"""One more token through a converted model of the Llama kind, in six launches per layer instead of some fifty.

A step of one token is a long list of short operations, and their number decides its time: by CUDA graph on the GPU,
without one on the host. The whole step is written out here for architectures whose layers are alike (`_KINDS`), on the
kernels of `dynamask.ops.triton.decode_step`. Everything else runs through transformers' modules.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from dynamask.cache import BoundedCache, BoundedLayer
from dynamask.convert.attention import ConvertedAttention
from dynamask.mixers.rank_predictor import RANK_GRID, CastingLinear, RankHead, RankPredictor, slope_tensor
from dynamask.ops.interval.operators import triton_available

_KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""transformers' model_type -> the prefix of its classes. Their decoder layers differ by biases and norms of heads."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_plans: weakref.WeakKeyDictionary[nn.Module, _Plan | None] = weakref.WeakKeyDictionary()


class _Plan:
    """The modules that a step reads, and what they must be for it."""

    def __init__(self, model: Any) -> None:
        decoder = model.model
        self.modules: list[tuple[nn.Module, type]] = [
            (module, type(module)) for module in model.modules() if module is not model
        ]
        self.layers = [(layer, layer.self_attn, layer.mlp) for layer in decoder.layers]

    def stands(self, model: nn.Module) -> bool:
        """Whether the model still consists of these modules, and no call of them would do something else."""
        registry = nn.modules.module
        if registry._global_forward_hooks or registry._global_forward_pre_hooks:
            return False
        for module, kind in self.modules:
            if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
                return False
            if "forward" in module.__dict__ or "_hf_hook" in module.__dict__:
                return False
        modules = iter(model.modules())
        next(modules)
        return all(next(modules, None) is module for module, _ in self.modules) and next(modules, None) is None


def decode_step(model: Any, cache: BoundedCache, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
    """Compute logits (B, 1, vocab) of one more token; None, with nothing changed, where the model must run itself.

    Args:
        model: a converted causal LM without gradients, in evaluation.
        cache: what holds the past; takes the token.
        input_ids: (B, 1), all real tokens.
        position_ids: (B, 1).
    """
    from dynamask.ops.triton.decode_step import MOST_ROWS

    if input_ids.shape[0] > MOST_ROWS or not triton_available():
        return None
    if model not in _plans:
        _plans[model] = _Plan(model) if _is_of_a_kind(model) else None
    plan = _plans[model]
    if plan is not None and not plan.stands(model):
        del _plans[model]
        plan = _plans[model] = _Plan(model) if _is_of_a_kind(model) else None
        if plan is None or not plan.stands(model):
            return None
    if plan is None or len(cache.layers) != len(plan.layers):
        return None
    dtype, device = model.model.embed_tokens.weight.dtype, input_ids.device
    rules = model.config.layer_rules
    if not _weights_fit(plan, model, dtype, device):
        return None
    if not all(
        _cache_fits(layer, parts[1], input_ids.shape[0], dtype, device)
        for layer, parts in zip(cache.layers, plan.layers, strict=True)
    ):
        return None
    for layer, rule in zip(cache.layers, rules, strict=True):
        layer.check_fits(rule.windows, local=rule.local, sinks=rule.sinks, slopes=rule.slopes)  # type: ignore[attr-defined]
    return _run(plan, model, cache, rules, input_ids, position_ids)


def _run(
    plan: _Plan, model: Any, cache: BoundedCache, rules: Any, input_ids: Tensor, position_ids: Tensor
) -> Tensor | None:
    from dynamask.ops.triton.decode_step import (
        Pools,
        Projections,
        RankHeadWeights,
        begin,
        norm_and_gate,
        norm_and_project,
        project_and_add,
        rotate_and_insert,
    )

    decoder = model.model
    embedded = decoder.embed_tokens(input_ids)
    cos, sin = decoder.rotary_emb(embedded, position_ids)
    cos, sin = cos[:, 0].contiguous(), sin[:, 0].contiguous()
    if cos.shape[-1] != plan.layers[0][1].head_dim or cos.dtype != embedded.dtype:
        return None
    residual = begin(embedded[:, 0])
    lifts = _lifts(rules, position_ids)
    for index, (layer, attention, mlp) in enumerate(plan.layers):
        held: Any = cache.layers[index]
        own = attention._modules
        predictor = own["rank_predictor"]
        query, key, value = own["q_proj"], own["k_proj"], own["v_proj"]
        biases = None if query.bias is None else (query.bias, key.bias, value.bias)
        weights = Projections(query.weight, key.weight, value.weight, biases, predictor.up.weight)
        norm = layer.input_layernorm
        pools = Pools._make((*held.room_for_a_token(), held.local, held.sinks))
        projected, active, contest = norm_and_project(residual, norm.weight, norm.variance_epsilon, weights, pools)
        norms, epsilon = None, 0.0
        if "q_norm" in own:
            norms, epsilon = (own["q_norm"].weight, own["k_norm"].weight), own["q_norm"].variance_epsilon
        lift = None if lifts is None else lifts[index]
        assert active is not None
        ranks = RankHeadWeights(active, predictor.down.weight, predictor.down.bias, lift, RANK_GRID)
        rotated = rotate_and_insert(projected, cos, sin, norms, epsilon, ranks, pools, contest)
        held.advance()
        mixed = held.attend_to_slots(rotated, attention.scaling)
        out = own["o_proj"]
        residual = project_and_add(mixed.flatten(1), out.weight, out.bias, residual)
        norm, parts = layer.post_attention_layernorm, mlp._modules
        gated = norm_and_gate(
            residual, norm.weight, norm.variance_epsilon, parts["gate_proj"].weight, parts["up_proj"].weight
        )
        residual = project_and_add(gated, parts["down_proj"].weight, None, residual)
    hidden = decoder.norm(residual.rows[:, None])
    return model.lm_head(hidden)  # type: ignore[no-any-return]


def _lifts(rules: Any, position_ids: Tensor) -> Tensor | None:
    """(layers, B, G) float32, what slopes add to the ranks of a token at these positions."""
    if not any(rule.slopes and any(rule.slopes) for rule in rules):
        return None
    flat = tuple(slope for rule in rules for slope in rule.slopes or (0.0,) * len(rule.windows))
    slopes = slope_tensor(flat, position_ids.device).view(len(rules), 1, -1)
    return slopes * position_ids.to(torch.float32)


@functools.cache
def _classes(prefix: str, kind: str) -> tuple[Any, ...]:
    """Decoder layer, attention, MLP, RMS norm and decoder of an architecture."""
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    return tuple(getattr(module, prefix + name) for name in ("DecoderLayer", "Attention", "MLP", "RMSNorm", "Model"))


def _is_of_a_kind(model: Any) -> bool:
    """Whether a model is one of transformers' classes that the step is written out for, unchanged."""
    config = model.config
    kind = str(config.model_type).removeprefix("dynamask_")
    if kind not in _KINDS or config.hidden_act != "silu" or config.ranking != "learned":
        return False
    if len(config.ranked_layers) != config.num_hidden_layers:
        return False
    layer_class, attention_class, mlp_class, norm_class, decoder_class = _classes(_KINDS[kind], kind)
    decoder: Any = model.model
    if type(decoder) is not decoder_class or type(decoder.embed_tokens) is not nn.Embedding:
        return False
    if type(decoder.norm) is not norm_class or type(model.lm_head) is not nn.Linear:
        return False
    if len(decoder.layers) != config.num_hidden_layers:
        return False
    for layer in decoder.layers:
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        linear = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if kind == "qwen3":
            norms += [attention.q_norm, attention.k_norm]
        predictor = attention.rank_predictor
        if (
            type(layer) is not layer_class
            or type(attention).__mro__[1:3] != (ConvertedAttention, attention_class)
            or type(mlp) is not mlp_class
            or any(type(each) is not nn.Linear for each in linear)
            or any(type(norm) is not norm_class for norm in norms)
            or type(predictor) is not RankPredictor
            or type(predictor.up) is not CastingLinear
            or type(predictor.down) is not RankHead
            or any(each.bias is not None for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            or len({each.bias is None for each in linear[:3]}) != 1
            or attention.head_group is not None
            or attention.head_dim % 2
        ):
            return False
    return True


def _weights_fit(plan: _Plan, model: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all weights are plain, contiguous and of one dtype, but for the predictors'."""
    if dtype not in _DTYPES:
        return False
    for layer, attention, mlp in plan.layers:
        own, parts = attention._modules, mlp._modules
        read = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        read += [own[name].weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        read += [parts[name].weight for name in ("gate_proj", "up_proj", "down_proj")]
        read += [own[name].weight for name in ("q_norm", "k_norm") if name in own]
        if any(not _is_plain(weight, device) or weight.dtype != dtype for weight in read):
            return False
        predictor = own["rank_predictor"]
        ranked = [predictor.up.weight, predictor.down.weight, predictor.down.bias]
        if any(not _is_plain(weight, device) or weight.dtype not in _DTYPES for weight in ranked):
            return False
    return _is_plain(model.model.embed_tokens.weight, device) and _is_plain(model.lm_head.weight, device)


def _is_plain(weight: Any, device: torch.device) -> bool:
    return type(weight) is nn.Parameter and weight.device == device and weight.is_contiguous()


def _cache_fits(layer: Any, attention: Any, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a layer of a cache holds what this attention's keys can be put beside."""
    if not isinstance(layer, BoundedLayer) or not layer.is_initialized:
        return False
    keys, values = layer.keys, layer.values
    groups = attention.k_proj.out_features // attention.head_dim
    return (
        keys.dtype == values.dtype == dtype
        and keys.device == device
        and keys.shape[0] == batch
        and keys.shape[2] == values.shape[2] == attention.head_dim
        and layer.clock.shape[1] == groups
        and layer.ranks.dtype == torch.float32
    )


__all__ = ["decode_step"]
