"""What every head of a model keeps of one text, and what generated tokens attend to."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamask.errors import InvalidInputError
from dynamask.inspect.key_ranks import RankedLayer, RankRecorder
from dynamask.mixers.base import GroupedQueryMixer, Mixer
from dynamask.mixers.mha import MultiHeadAttention
from dynamask.mixers.mla import MultiHeadLatentAttention
from dynamask.mixers.swa import SlidingWindowAttention
from dynamask.models.decoder import attention_of, decoder_of
from dynamask.ops.expiry import key_expiry

TOP_KEYS = 8
"""Keys whose attention weights are kept for each generated token, layer and head."""


@dataclass(frozen=True)
class LayerView:
    """One layer on one text.

    Attributes:
        kind: "ranked" (dynamic mask attention), "sliding" or "dense".
        windows: keys that a query of each key/value head keeps; None: all of them.
        local, sinks: newest and first positions that are always kept.
        expiry: (G, N) int32; key j is visible to the queries j <= i < expiry[j].
        ranks: (G, N) float32, the higher is kept longer; None where the layer does not rank.
    """

    kind: str
    windows: tuple[int, ...] | None
    local: int
    sinks: int
    expiry: Tensor
    ranks: Tensor | None


@dataclass(frozen=True)
class AttentionView:
    """Attention weights of the queries that produced the generated tokens.

    Attributes:
        first_query: position of the first query; query t produced the token at `first_query + t + 1`.
        mean: (T, N) float32, mean weight of each key over all layers and heads.
        top_keys: (T, L, G, K) int64, the keys with the largest weights, the largest first; a weight of 0 means no key.
        top_weights: (T, L, G, K) float32, mean weight over the query heads of each key/value head.
    """

    first_query: int
    mean: Tensor
    top_keys: Tensor
    top_weights: Tensor


@dataclass(frozen=True)
class Inspection:
    """What `inspect_text` found.

    Attributes:
        input_ids: N token ids, generated ones included.
        prompt: how many of them were given.
        layers: one entry per layer.
        attention: of the generated tokens; None where none were generated or a layer hides its queries.
        not_recorded: why `attention` is None although tokens were generated; else None.
    """

    input_ids: list[int]
    prompt: int
    layers: list[LayerView]
    attention: AttentionView | None
    not_recorded: str | None = None

    @property
    def heads(self) -> int:
        """Return the number of key/value heads of a layer."""
        return self.layers[0].expiry.shape[0]

    def alive(self, position: int) -> Tensor:
        """Return which keys the query at `position` can see, (L, G, N) bool.

        Raises:
            InvalidInputError: a position outside of the text.
        """
        length = len(self.input_ids)
        if not 0 <= position < length:
            raise InvalidInputError(f"position must be in 0..{length - 1}; got {position}")
        key = torch.arange(length)
        return torch.stack([(key <= position) & (layer.expiry > position) for layer in self.layers])


@torch.no_grad()
def inspect_text(model: Any, input_ids: Tensor, *, new_tokens: int = 0) -> Inspection:
    """Find which keys every head keeps of a text, and what newly generated tokens attend to.

    Args:
        model: a causal LM of dynamask, native or converted, in evaluation mode.
        input_ids: (1, N) int64 tokens.
        new_tokens: tokens to generate greedily behind the text; fewer where the model ends its text.

    Returns:
        The layers' key lifetimes and ranks over the text and what was generated.

    Raises:
        InvalidInputError: tokens of another shape, or a model all of whose layers keep every key, or one whose dropped
            keys return (nsa).
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise InvalidInputError(f"input_ids must be (1, N) with N >= 1; got shape {tuple(input_ids.shape)}")
    if new_tokens < 0:
        raise InvalidInputError(f"new_tokens must be at least 0; got {new_tokens}")
    modules = _attention_modules(model)
    prompt = input_ids.shape[1]
    if new_tokens:
        pad = getattr(model.generation_config, "pad_token_id", None)
        input_ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad if pad is not None else 0,
        )
    length = input_ids.shape[1]
    ranked = RankRecorder(model)
    projected: dict[int, _Projected] = {}
    try:
        if length > prompt:
            with _recorded(model, modules, slice(prompt - 1, length - 1), projected):
                decoder_of(model)(input_ids, use_cache=False)
        else:
            decoder_of(model)(input_ids, use_cache=False)
    finally:
        ranked.remove()
    by_layer = {each.layer: each for each in ranked.found}
    layers = [_view(model, module, by_layer.get(index), length) for index, module in enumerate(modules)]
    attention, not_recorded = None, None
    if length > prompt:
        hidden = [index for index in range(len(layers)) if index not in projected]
        if hidden:
            kind = type(modules[hidden[0]]).__name__
            not_recorded = f"layer {hidden[0]} ({kind}) has no query and key per head to record"
        else:
            attention = _attention(prompt - 1, layers, projected)
    return Inspection(input_ids[0].tolist(), prompt, layers, attention, not_recorded)


def _attention_modules(model: Any) -> list[Any]:
    """The attention module of every layer; refuses models that have no lifetimes to show."""
    config, kind = model.config, type(model).__name__
    if not hasattr(config, "head_windows"):
        raise InvalidInputError(
            f"{kind} is a dense model: every head keeps every key, so there is nothing to inspect. Convert it first, "
            "with `dynamask convert upcycle` or dynamask.convert.upcycle"
        )
    modules = [attention_of(layer) for layer in decoder_of(model).layers]
    kinds = [_kind(config, module) for module in modules]
    if "blocks" in kinds:
        raise InvalidInputError(
            f"layer {kinds.index('blocks')} of this {kind} selects blocks of keys anew for every query (nsa): its keys "
            "have no lifetime to show"
        )
    if set(kinds) == {"dense"}:
        raise InvalidInputError(f"every layer of this {kind} is dense and keeps every key: there is nothing to inspect")
    return modules


def _kind(config: Any, module: Any) -> str:
    """Which keys a layer keeps: ranked, sliding, dense, or blocks that return."""
    if isinstance(module, Mixer):
        if isinstance(module, MultiHeadAttention | MultiHeadLatentAttention):
            return "dense"
        if isinstance(module, SlidingWindowAttention):
            return "sliding"
        return "ranked" if type(module).bounded else "blocks"
    if config.head_windows[module.layer_idx] is None:
        return "dense"
    return "sliding" if config.layer_slides(module.layer_idx) else "ranked"


def _view(model: Any, module: Any, ranked: RankedLayer | None, length: int) -> LayerView:
    """The lifetimes of one layer's keys."""
    config, kind = model.config, _kind(model.config, module)
    groups = config.num_key_value_heads
    if kind == "ranked":
        assert ranked is not None
        ranks = ranked.ranks.float()
        expiry = key_expiry(ranks, ranked.windows, local=ranked.local, sinks=ranked.sinks)
        return LayerView(kind, ranked.windows, ranked.local, ranked.sinks, expiry[0].cpu(), ranks[0].cpu())
    if kind == "dense":
        return LayerView(kind, None, 0, 0, torch.full((groups, length), length, dtype=torch.int32), None)
    windows = tuple(config.head_windows[module.layer_idx])
    sinks = module.sinks if isinstance(module, Mixer) else 0
    expiry = key_expiry(torch.zeros(1, groups, length), windows, sinks=sinks)
    return LayerView(kind, windows, min(windows) - sinks, sinks, expiry[0], None)


@dataclass
class _Projected:
    """Queries (1, H, T, D) of the generated tokens and keys (1, G, N, D) of one layer; bias (1, G, N) or None."""

    query: Tensor
    key: Tensor
    scale: float
    bias: Tensor | None = None


_recording: contextvars.ContextVar[Callable[[Any, Tensor, Tensor, float], None] | None] = contextvars.ContextVar(
    "_recording", default=None
)


@contextlib.contextmanager
def _recorded(model: Any, modules: list[Any], rows: slice, found: dict[int, _Projected]) -> Iterator[None]:
    """Record queries and keys of every layer that shows them, in the forward passes inside the `with` block."""

    def record(module: Any, query: Tensor, key: Tensor, scale: float) -> None:
        found[module.layer_idx] = _Projected(query[:, :, rows], key, scale)

    def of_mixer(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        hidden_states = inputs[0] if inputs else named["hidden_states"]
        if isinstance(module, GroupedQueryMixer):
            place = inputs[1] if len(inputs) > 1 else named["sequence"]
        else:  # of a model converted from Doge
            place = inputs[1] if len(inputs) > 1 else named["position_embeddings"]
        query, key, value = module.project(hidden_states, place)
        record(module, query, key, getattr(module, "scaling", query.shape[-1] ** -0.5))
        gate = getattr(module, "gate", None)
        if gate is not None:
            bias = gate(value)
            found[module.layer_idx].bias = torch.where(bias.isfinite(), bias, 0.0)

    mixers = [module for module in modules if hasattr(module, "project")]
    hooks = [mixer.register_forward_pre_hook(of_mixer, with_kwargs=True) for mixer in mixers]
    name = None if mixers else model.config._attn_implementation
    original = None if name is None else ALL_ATTENTION_FUNCTIONS[name]
    if name is not None:
        ALL_ATTENTION_FUNCTIONS[name] = _recorded_attention(original)
    token = _recording.set(record)
    try:
        yield
    finally:
        _recording.reset(token)
        if name is not None:
            ALL_ATTENTION_FUNCTIONS[name] = original
        for hook in hooks:
            hook.remove()


def _recorded_attention(original: Any) -> Any:
    """Wrap an attention function of transformers' registry: the recorder of this context sees query and key."""

    def attention(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        record, scaling = _recording.get(), kwargs.get("scaling")
        if record is not None:
            record(module, query, key, query.shape[-1] ** -0.5 if scaling is None else float(scaling))
        return original(module, query, key, *args, **kwargs)

    return attention


def _attention(first_query: int, layers: list[LayerView], projected: dict[int, _Projected]) -> AttentionView:
    """The weights of the recorded queries, over the keys that they can see."""
    total: Tensor | None = None
    keys, weights = [], []
    for index, layer in enumerate(layers):
        each = projected[index]
        weight = attention_weights(each.query, each.key, layer.expiry, first_query, each.scale, each.bias)
        top = weight.topk(min(TOP_KEYS, weight.shape[-1]), dim=-1)
        keys.append(top.indices)
        weights.append(top.values)
        mean = weight.mean(1)
        total = mean if total is None else total + mean
    assert total is not None
    return AttentionView(first_query, total / len(layers), torch.stack(keys, 1), torch.stack(weights, 1))


def attention_weights(
    query: Tensor, key: Tensor, expiry: Tensor, first_query: int, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Compute the attention weights of a few queries, averaged over the query heads of each key/value head.

    Args:
        query: (1, H, T, D), rotated, of the positions `first_query` to `first_query + T - 1`.
        key: (1, G, N, D), rotated.
        expiry: (G, N) int32.
        scale: factor on the logits.
        bias: (1, G, N), added to the logits, or None.

    Returns:
        (T, G, N) float32 on the CPU; 0 for keys that a query cannot see.
    """
    groups, length = key.shape[1:3]
    grouped = query[0].float().unflatten(0, (groups, -1))
    logits = torch.einsum("ghtd,gnd->ghtn", grouped, key[0].float()).cpu() * scale
    if bias is not None:
        logits = logits + bias[0].float().cpu()[:, None, None]
    row = torch.arange(first_query, first_query + query.shape[2])[:, None]
    seen = (torch.arange(length) <= row) & (row < expiry[:, None])
    weight = logits.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    return weight.mean(1).transpose(0, 1)
