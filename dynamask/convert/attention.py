"""Attention of converted models: an architecture's attention module, with dynamic mask attention in its middle.

The module keeps its projections, norms, rotary embedding and scale. It gives query, key and value to the function that
`config._attn_implementation` names, and that function is `converted_attention` here. Two things are added around it:
the ranks, which come from the hidden state that the module reads, and a stand-in for the cache that leaves keys and
values as they are, because what a cache keeps is decided by the ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from dynamask.cache import bounded_layer, dropping_layers
from dynamask.errors import InvalidInputError
from dynamask.mixers.base import SequenceInfo, recency_expiry, starts_over
from dynamask.mixers.head_shard import HeadShard
from dynamask.mixers.mha import dense_attention
from dynamask.mixers.rank_loss import RankLosses, rank_loss, rank_target
from dynamask.mixers.rank_predictor import RankPredictor, sloped_ranks
from dynamask.models.generation import check_not_empty
from dynamask.ops.checks import check_attention_mask, check_position_ids
from dynamask.ops.context_parallel.api import context_parallel_attention
from dynamask.ops.context_parallel.shards import ContextShards, context_shards, current_group
from dynamask.ops.expiry import key_expiry
from dynamask.ops.interval.api import attend
from dynamask.ops.looks import looks_allowed
from dynamask.ops.ranked_attention import ranked_attention
from dynamask.packed_ranks import check_carries_ranks, pack_ranks, unpack_ranks

IMPLEMENTATION = "dynamask_converted"
"""Name of converted models' attention in transformers' registry."""

_CACHE_NAMES = ("past_key_values", "cache", "layer_past")
"""Names under which decoder layers hand their cache to the attention module."""

_LEARNING_ROWS = 4
"""Of so many rows of a training batch one teaches the ranks, at least one: future attention costs as much as dense
attention."""


@dataclass
class Projected:
    """What an observer of a layer sees, see `CallFacts.observer`.

    Attributes:
        module: the attention module, with `rank_predictor` (None in layers that do not rank) and `layer_idx`.
        hidden_states: (B, N, hidden) that the module reads.
        query: (B, H, N, D), rotated; key, value: (B, G, N, D), the key rotated.
        output: (B, H, N, D) of dense attention.
        scale: factor on the logits.
    """

    module: Any
    hidden_states: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scale: float


class LayerRules(NamedTuple):
    """Which keys a layer keeps.

    Attributes:
        windows: keys that a query of each key/value head keeps; None: all (a layer left dense).
        slopes: how much each head's ranks rise per token, in nats; None: not at all.
        local: newest positions that are always kept.
        sinks: first positions that are always kept.
    """

    windows: tuple[int, ...] | None
    slopes: tuple[float, ...] | None
    local: int
    sinks: int


class TensorRules(NamedTuple):
    """`LayerRules` for a compiled layer: what differs between layers is in tensors, so that one graph serves them all.

    Attributes:
        windows: (G,) int64 on the CPU.
        slopes: (G,) float32.
        local, sinks: as in `LayerRules`.
        losses: gets the loss of the ranks, if they learn.
        kept: gets key, value, ranks and expiry, where a cache is to be filled with them.
    """

    windows: Tensor
    slopes: Tensor
    local: int
    sinks: int
    losses: list[Tensor] | None
    kept: list[Tensor] | None = None


@dataclass
class CallFacts:
    """Facts about one call of the model that all of its layers need.

    Attributes:
        length: N, past positions and those of this call.
        key_mask: (B, N) bool, True for a real token, or None where nothing is padding.
        segment_ids: (B, N) non-decreasing integers of packed documents, or None; only without a past.
        position_ids: (B, Nq).
        ages: (B, Nq), the positions that slopes of ranks count from: `position_ids` where given, otherwise real tokens
            before each one, up to a constant.
        observer: where given, every layer attends densely (a sliding layer within its window) and shows the observer
            what it has computed.
        shards: how the sequence is split over processes, where it is.
        losses: where given, layers append the losses of their ranks.
        rules: `ConvertedConfig.layer_rules`, read once for all layers; None: each layer reads its own.
        tensor_rules: those of the one layer that is called, where it is compiled (`dynamask.convert.compiled_layers`).
        held: what `_holds_newest` has found, by window and length, so that the layers of a call look once.
    """

    length: int
    key_mask: Tensor | None
    segment_ids: Tensor | None
    position_ids: Tensor
    ages: Tensor
    observer: Callable[[Projected], None] | None = None
    shards: ContextShards | None = None
    losses: RankLosses | None = field(default=None, repr=False)
    rules: tuple[LayerRules, ...] | None = None
    tensor_rules: TensorRules | None = None
    held: dict[tuple[int, int], bool] = field(default_factory=dict, repr=False)

    def sequence(self) -> SequenceInfo:
        """Return the same facts in the form that `dense_attention` takes."""
        return SequenceInfo(self.position_ids, self.segment_ids, self.key_mask, self.length)


def call_facts(
    batch: int,
    new: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: int,
    device: torch.device,
    *,
    cached: bool = False,
) -> CallFacts:
    """Collect the facts of a call.

    Args:
        batch: B.
        new: Nq, positions of this call.
        attention_mask: (B, past + Nq), 1 for a real token, or None.
        position_ids: (B or 1, Nq), or None: counted on from the past.
        past: positions in the cache.
        device: of the mask and the positions.
        cached: whether the call fills or continues a cache. With a cache or a mask, packed documents begin where a
            position does not rise, otherwise also behind a gap (`starts_over`).

    Raises:
        InvalidInputError: a mask that is not (B, past + Nq) or additive, or packed documents behind a past.
    """
    check_position_ids(position_ids, batch, new)
    if attention_mask is not None and attention_mask.shape != (batch, past + new):
        raise InvalidInputError(
            f"attention_mask must be (batch, past + new) = {(batch, past + new)}, 1 for a real token; got shape "
            f"{tuple(attention_mask.shape)}. For packed documents pass position_ids that start over."
        )
    # An exported or recorded graph cannot look at the data.
    blind = torch.compiler.is_exporting() or (not looks_allowed() and not torch.compiler.is_compiling())
    if attention_mask is not None:
        check_attention_mask(attention_mask)
    key_mask = None if attention_mask is None else attention_mask.to(device=device, dtype=torch.bool)
    if key_mask is not None and not blind and bool(key_mask.all()):
        key_mask = None
    counted = position_ids is None
    if (group := current_group()) is not None:
        if past or key_mask is not None:
            raise InvalidInputError(
                "a sequence that is split over processes (context_parallel) has neither a cache nor padding: leave "
                "past_key_values out, and pack documents instead of padding them"
            )
        shards = context_shards(group, batch, new, device, position_ids=position_ids)
        positions = shards.positions(batch, new, device) if position_ids is None else position_ids.expand(batch, new)
        return CallFacts(new, None, shards.segment_ids, positions, positions, shards=shards)
    if position_ids is None:
        position_ids = torch.arange(past, past + new, device=device)[None]
    position_ids = position_ids.to(device).expand(batch, new)
    ages = position_ids
    if counted and key_mask is not None:
        ages = (key_mask.cumsum(-1) - 1)[:, past:]
    segments = None
    if not counted and new > 1 and not (past and blind):
        new_mask = None if key_mask is None else key_mask[:, past:]
        starts = starts_over(position_ids, new_mask, gaps_split=attention_mask is None and not cached and not past)
        if blind or bool(starts.any()):
            if past:
                raise InvalidInputError(
                    "position_ids start over (packed documents) behind a cache that holds keys: run packed documents "
                    "without a cache"
                )
            segments = starts.long().cumsum(-1)
    return CallFacts(past + new, key_mask, segments, position_ids, ages)


@dataclass
class _Call:
    """What the wrapped module hands to `converted_attention`."""

    facts: CallFacts
    cache: Cache | None
    hidden_states: Tensor


class _PassThrough:
    """A cache whose `update` gives keys and values back; everything else is the cache's."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def check_implementation(name: Any) -> None:
    """Refuse another attention function than that of converted models.

    Raises:
        InvalidInputError: `name` is another.
    """
    if name != IMPLEMENTATION:
        raise InvalidInputError(
            f"a converted model cannot run with attn_implementation={name!r}: it would see all keys again, or none of "
            "what its cache keeps"
        )


class ConvertedAttention(nn.Module):
    """Mixed in before an architecture's attention class, see `convert_attention`."""

    config: Any
    layer_idx: int
    rank_predictor: RankPredictor | None
    head_group: Any = None
    """Processes that hold the other heads of this layer (tensor parallelism)."""
    rank_losses: RankLosses | None = None
    """Where a trainer computes the loss, it collects the ranks' losses here, see `training.add_rank_loss`."""

    def forward(self, hidden_states: Tensor, *args: Any, dynamask: CallFacts | None = None, **kwargs: Any) -> Any:
        """(B, Nq, hidden) -> (B, Nq, hidden), and no attention weights: they are never materialised."""
        check_implementation(self.config._attn_implementation)
        name = next((each for each in _CACHE_NAMES if kwargs.get(each) is not None), _CACHE_NAMES[0])
        cache = kwargs.get(name)
        if dynamask is None:  # the decoder was called without the causal LM around it
            if current_group() is not None:
                raise InvalidInputError(
                    "context_parallel: call the causal LM, not its decoder, which would count positions from 0 in "
                    "every shard"
                )
            past = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
            mask = kwargs.get("attention_mask")
            check_not_empty(hidden_states.shape, "a converted model")
            batch, new = hidden_states.shape[:2]
            positions, cached = kwargs.get("position_ids"), cache is not None
            dynamask = call_facts(batch, new, mask, positions, past, hidden_states.device, cached=cached)
            if cache is not None and self.layer_idx == 0:
                check_holds(cache, self.config, dynamask, new)
        if cache is not None:
            kwargs[name] = _PassThrough(cache)
        call = _Call(dynamask, cache, hidden_states)
        return super().forward(hidden_states, *args, dynamask_call=call, **kwargs)  # type: ignore[misc]

    def hold_heads(self, shard: HeadShard, group: Any) -> None:
        """Take over a part of the heads, after the projections have been split over the processes of a group."""
        self.head_group = group  # windows and slopes come from the configuration, which knows the shard

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the original's class: the class of this module is made at run time and has no importable name."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _empty, (type(self).__bases__[1],), *reduced[2:]

    @property
    def windows(self) -> tuple[int, ...] | None:
        """Keys that a query of each key/value head keeps; None: all (a layer left dense)."""
        return self.config.head_windows[self.layer_idx]  # type: ignore[no-any-return]

    @property
    def slopes(self) -> tuple[float, ...] | None:
        """How much each key/value head's ranks rise per token, in nats; None: not at all."""
        return self.config.head_slopes[self.layer_idx]  # type: ignore[no-any-return]


@functools.cache
def _converted_class(original: type) -> type:
    return type(f"Dynamask{original.__name__}", (ConvertedAttention, original), {"__module__": __name__})


def _empty(original: type) -> nn.Module:
    """Make a converted attention module without attributes, which unpickling fills."""
    module: nn.Module = object.__new__(_converted_class(original))
    return module


def convert_attention(module: Any, config: Any) -> None:
    """Make an attention module of transformers a `ConvertedAttention`, in place.

    Args:
        module: the attention module of a decoder layer, with `layer_idx`.
        config: the converted model's configuration; it says whether the layer ranks its keys.
    """
    module.__class__ = _converted_class(type(module))  # type: ignore[arg-type]
    ranks = config.ranks_layer(module.layer_idx)
    width, groups = config.rank_predictor_width, config.num_key_value_heads
    module.rank_predictor = RankPredictor(config.hidden_size, groups, width=width) if ranks else None


def converted_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dynamask_call: _Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from query (B, H, Nq, D) to key, value (B, G, Nq, D) and what the cache holds: (B, Nq, H, D).

    transformers calls it from the attention module, see `AttentionInterface`.
    """
    if dynamask_call is None:
        raise InvalidInputError(
            f"attn_implementation={IMPLEMENTATION!r} belongs to converted models: make one with "
            "dynamask.convert.upcycle"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _mix(module, query, key, value, scale, dynamask_call).transpose(1, 2), None


def _mix(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, call: _Call) -> Tensor:
    facts, cache, hidden_states = call.facts, call.cache, call.hidden_states
    if facts.tensor_rules is not None:
        return _mix_compiled(module, query, key, value, scale, hidden_states, facts, facts.tensor_rules)
    predictor = module.rank_predictor
    rules = module.config.layer_rules[module.layer_idx] if facts.rules is None else facts.rules[module.layer_idx]
    windows = rules.windows
    if facts.observer is not None:
        if cache is not None or facts.shards is not None:
            raise InvalidInputError("layers are observed over whole sequences, without a cache or context_parallel")
        sliding = module.config.layer_slides(module.layer_idx)
        output = _newest(query, key, value, windows[0] if sliding else None, facts, scale)
        facts.observer(Projected(module, hidden_states, query, key, value, output, scale))
        return output
    if predictor is None:
        return _without_ranks(module, query, key, value, windows, scale, call)

    # Ranks decide which keys are kept and are not differentiated: their own loss trains them.
    losses = facts.losses
    if losses is None and module.training and torch.is_grad_enabled():
        losses = module.rank_losses
    learns = losses is not None and cache is None
    short = cache is None and facts.shards is None and facts.length <= min(windows)
    ranks = None if short and not learns else predictor(hidden_states.detach())
    if learns and ranks is not None and ranks.requires_grad and losses is not None:
        losses.append(_rank_loss(query, key, ranks, facts, rules.local, scale, module.head_group))
    if short:
        return dense_attention(query, key, value, facts.sequence(), scale=scale)
    assert ranks is not None
    ranks = sloped_ranks(ranks.detach(), rules.slopes, facts.ages)
    if facts.shards is not None:
        kept = {"shards": facts.shards, "local": rules.local, "sinks": rules.sinks, "scale": scale}
        return context_parallel_attention(query, key, value, ranks, windows, **kept)
    if cache is not None:
        layer: Any = bounded_layer(cache, module.layer_idx)
        if layer is not None:
            layer.check_fits(windows, local=rules.local, sinks=rules.sinks, slopes=rules.slopes)
            return layer.attend(query, key, value, ranks, key_mask=_new_mask(facts), scale=scale)  # type: ignore[no-any-return]
        key, value, ranks = _updated(cache, module.layer_idx, key, value, ranks, facts)
    expiry = key_expiry(
        ranks,
        windows,
        local=rules.local,
        sinks=rules.sinks,
        segment_ids=facts.segment_ids,
        key_mask=facts.key_mask,
    )
    return attend(query, key, value, expiry, scale=scale, max_live=tuple(windows))


def _mix_compiled(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    hidden_states: Tensor,
    facts: CallFacts,
    rules: TensorRules,
) -> Tensor:
    """Do what `_mix` does for a layer that ranks, without a cache, beyond its windows."""
    ranks = module.rank_predictor(hidden_states.detach())
    if rules.losses is not None:
        rules.losses.append(_rank_loss(query, key, ranks, facts, rules.local, scale, module.head_group))
    ranks = ranks.detach()
    ranks = ranks + rules.slopes.to(ranks.dtype)[:, None] * facts.ages[:, None].to(ranks.dtype)
    options: dict[str, Any] = {"segment_ids": facts.segment_ids, "key_mask": facts.key_mask}
    options |= {"local": rules.local, "sinks": rules.sinks, "scale": scale}
    output, expiry = ranked_attention(query, key, value, ranks, rules.windows, **options)
    if rules.kept is not None:
        rules.kept.extend((key, value, ranks, expiry))
    return output


def _rank_loss(
    query: Tensor, key: Tensor, ranks: Tensor, facts: CallFacts, local: int, scale: float, group: Any
) -> Tensor:
    """() the distance of ranks from what they should be, over the rows that teach them."""
    rows = slice(None, None, _LEARNING_ROWS)
    segments, mask = (None if each is None else each[rows] for each in (facts.segment_ids, facts.key_mask))
    target, valid = rank_target(query[rows], key[rows], local, segments, mask, scale, shards=facts.shards, rows=rows)
    return rank_loss(ranks[rows], target, valid, group=group, shards=facts.shards)


def _without_ranks(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: tuple[int, ...] | None,
    scale: float,
    call: _Call,
) -> Tensor:
    """A layer that slides or is dense."""
    facts, cache, index = call.facts, call.cache, module.layer_idx
    if facts.shards is not None:
        if windows is None:
            raise InvalidInputError(
                f"layer {index} is dense: its keys cannot be split over processes by what is live (context_parallel)"
            )
        return context_parallel_attention(query, key, value, None, windows, shards=facts.shards, scale=scale)
    if cache is not None:
        layer: Any = bounded_layer(cache, index)
        if layer is not None:
            if windows is None:
                raise InvalidInputError(f"layer {index} is dense; a bounded cache does not keep what it sees")
            layer.check_fits(windows, local=windows[0])
            return layer.attend(query, key, value, None, key_mask=_new_mask(facts), scale=scale)  # type: ignore[no-any-return]
        key, value = _cut(cache.update(key, value, index), facts.length)
        _check_held(cache, index, key.shape[2], facts.length, windows, facts)
    return _newest(query, key, value, None if windows is None else windows[0], facts, scale)


def check_holds(cache: Cache, config: Any, facts: CallFacts | None, new: int) -> None:
    """Refuse a cache that drops keys which layers attend to, before the first layer writes to it.

    Args:
        cache: any transformers cache.
        config: the converted model's.
        facts: of the call; None with ranking="paper", where every layer chooses its keys.
        new: positions of the call.

    Raises:
        InvalidInputError: the cache has a sliding layer of transformers, which has dropped such a key or will, a
            bounded layer of other windows than the model's, or keys without ranks.
    """
    all_rules = config.layer_rules if facts is None or facts.rules is None else facts.rules
    for index in range(0 if torch.compiler.is_compiling() else config.num_hidden_layers):
        _check_layer(cache, index, config, all_rules[index], learned=facts is not None)
    for index, held, length in dropping_layers(cache, new):
        if index < config.num_hidden_layers:
            windows = all_rules[index].windows
            ranks = facts is None or (windows is not None and not config.layer_slides(index))
            _check_held(cache, index, held, length, windows, None if ranks else facts)


def _check_layer(cache: Cache, index: int, config: Any, rules: LayerRules, *, learned: bool) -> None:
    """Raise `InvalidInputError` unless a layer of the cache can serve a layer of the model."""
    layer = bounded_layer(cache, index)
    slides = config.layer_slides(index)
    if layer is None:
        if learned and rules.windows is not None and not slides:
            heads = config.num_attention_heads
            check_carries_ranks(cache, index, getattr(config, "head_dim", None) or config.hidden_size // heads)
    elif rules.windows is None:
        raise InvalidInputError(f"layer {index} is dense; a bounded cache does not keep what it sees")
    elif slides:
        layer.check_fits(rules.windows, local=rules.windows[0])
    else:
        layer.check_fits(rules.windows, local=rules.local, sinks=rules.sinks, slopes=rules.slopes)


def _check_held(
    cache: Cache, index: int, held: int, length: int, windows: tuple[int, ...] | None, facts: CallFacts | None
) -> None:
    """Raise `InvalidInputError` unless the newest `held` keys are all that a layer attends to.

    Args:
        cache: named in the message.
        index: of the layer.
        held: keys that the cache hands over.
        length: keys so far.
        windows: of a layer that slides; None: a dense layer.
        facts: of the call; None: the layer chooses its keys, so that it needs all.
    """
    if held >= length:
        return
    if facts is None:
        raise InvalidInputError(
            f"{type(cache).__name__} keeps {held} of {length} keys of layer {index}, which chooses its keys itself: "
            "use BoundedCache (the default of generate()), DynamicCache(), or StaticCache(config=model.config)"
        )
    if not _holds_newest(None if windows is None else windows[0], held, facts):
        raise InvalidInputError(
            f"layer {index} attends to {'all' if windows is None else f'the newest {windows[0]}'} real tokens, and "
            f"this {type(cache).__name__} has dropped some of them: it counts padding inside of a row as tokens. Pad "
            "rows on the left, or use BoundedCache (the default of generate()) or DynamicCache() without a config"
        )


def _holds_newest(window: int | None, length: int, facts: CallFacts) -> bool:
    """Whether the newest `length` positions have the newest `window` real tokens of each query.

    transformers' sliding cache layers hold the newest positions, padding among them.
    """
    new = facts.position_ids.shape[1]
    if window is None or length < window - 1 + new:
        return False
    if facts.key_mask is None or torch.compiler.is_exporting():
        return True
    if not looks_allowed() and not torch.compiler.is_compiling():
        return True
    if (window, length) not in facts.held:
        held = facts.key_mask[:, -length:]
        short = held[:, -new:] & (held.cumsum(-1)[:, -new:] < window)
        lost = short.any(-1) & facts.key_mask[:, :-length].any(-1)
        facts.held[window, length] = not bool(lost.any())
    return facts.held[window, length]


def _newest(query: Tensor, key: Tensor, value: Tensor, window: int | None, facts: CallFacts, scale: float) -> Tensor:
    """Dense attention, or attention to the newest `window` keys."""
    groups, length = key.shape[1:3]
    sequence = facts.sequence()
    if length < facts.length:  # a sliding cache layer of transformers holds the newest keys alone
        mask = None if facts.key_mask is None else facts.key_mask[:, -length:]
        sequence = SequenceInfo(facts.position_ids, None, mask, length)
    if window is None or window >= length:
        return dense_attention(query, key, value, sequence, scale=scale)
    expiry = recency_expiry(key, (window,) * groups, sequence)
    return attend(query, key, value, expiry, scale=scale, max_live=window)


def _new_mask(facts: CallFacts) -> Tensor | None:
    return None if facts.key_mask is None else facts.key_mask[:, -facts.position_ids.shape[1] :]


def _updated(
    cache: Cache, index: int, key: Tensor, value: Tensor, ranks: Tensor, facts: CallFacts
) -> tuple[Tensor, Tensor, Tensor]:
    """Add this call's keys, values and ranks to an ordinary cache; return all of them."""
    check_carries_ranks(cache, index, value.shape[-1], value.dtype)
    key, stored = _cut(cache.update(key, pack_ranks(value, ranks), index), facts.length)
    _check_held(cache, index, key.shape[2], facts.length, None, None)
    value, ranks = unpack_ranks(stored)
    return key, value, ranks


def _cut(rows: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Leave out the slots that a static cache has not written yet."""
    key, value = rows
    return (key, value) if key.shape[2] <= length else (key[:, :, :length], value[:, :, :length])


@functools.lru_cache(maxsize=64)
def no_mask(device: torch.device) -> Tensor:
    """Return an empty mask of four dimensions, which transformers' models hand to their layers as it is.

    Without a mask they look for packed documents, and wait for the device. Layers of converted models read `CallFacts`.
    """
    with torch.inference_mode(False):
        return torch.empty(0, 0, 0, 0, device=device)


def _padding_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Hand the 2-d padding mask through; the intervals do the rest."""
    return attention_mask


AttentionInterface.register(IMPLEMENTATION, converted_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)
