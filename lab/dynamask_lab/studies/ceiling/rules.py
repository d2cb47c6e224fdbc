"""Rules that choose the keys of each query of a pretrained dense model, in place of its attention.

| rule | keys of a query | may read |
| --- | --- | --- |
| `dense` | all of its prefix | |
| `newest` | sinks and the newest | position |
| `learned` | sinks, the newest, the best by a rank that a predictor gave when the key was written | the past |
| `static` | the same, the rank being the largest attention that a later query gives the key | the future |
| `query` | those with the most attention from this query | this query |

`static` knows what `learned` predicts, so it shows what is left to win for better predictions. `query` is not static:
it needs a cache of all keys, and shows what is left to win for a choice that follows the query. Every layer chooses
from the queries and keys of the model as it runs, so errors of early layers reach later ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from dynamask.convert.allocate_windows import counts_above_threshold
from dynamask.errors import InvalidInputError
from dynamask.ops import future_attention, interval_attention, key_expiry

IMPLEMENTATION = "dynamask_ceiling"
"""Name in transformers' registry of attention functions."""

RULES = ("dense", "newest", "learned", "static", "query")
SINKS = 4
_LOCAL = 128
_CHUNK = 512
"""Queries of `query` whose logits exist at once."""


def local_of(budget: int) -> int:
    """Newest keys that ranks do not contest, for a mean window: at most half of it."""
    return min(_LOCAL, budget // 2)


@dataclass
class Choice:
    """What the attention of every layer follows.

    Attributes:
        rule: one of `RULES`.
        windows: keys per layer and key/value head, empty for `dense`.
        local, sinks: always kept, for `newest`, `learned` and `static`.
        predictors: per layer, hidden states -> ranks (B, G, N); for `learned`.
        observer: where given, attention is dense, and it receives the layer, query and key of every call.
    """

    rule: str = "dense"
    windows: Sequence[Sequence[int]] = ()
    local: int = _LOCAL
    sinks: int = SINKS
    predictors: dict[int, nn.Module] = field(default_factory=dict)
    observer: Any = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InvalidInputError(f"rule must be one of {', '.join(RULES)}; got {self.rule!r}")
        least = min((window for layer in self.windows for window in layer), default=None)
        if self.rule != "dense" and (least is None or least < self.local + self.sinks):
            raise InvalidInputError(
                f"rule {self.rule!r} needs windows of at least local + sinks = {self.local + self.sinks}; got {least}"
            )


class Chooser:
    """Run a dense model under one `Choice` after another.

    Args:
        model: a causal LM of transformers whose attention goes through `AttentionInterface`. Its implementation is
            changed for good.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.choice = model, Choice()
        model.config._attn_implementation = IMPLEMENTATION
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        module._ceiling = (self, hidden)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and key/value heads."""
        config = self.model.config
        return config.num_hidden_layers, config.num_key_value_heads

    def even(self, budget: int) -> list[list[int]]:
        """The same window for every head."""
        layers, heads = self.shape
        return [[budget] * heads for _ in range(layers)]

    @torch.no_grad()
    def allocate(self, blocks: Iterable[Tensor], budgets: Sequence[int]) -> dict[int, list[list[int]]]:
        """Allocate windows per head by one threshold on the true future attention of dense attention.

        Args:
            blocks: (B, N) token ids each.
            budgets: mean windows.

        Returns:
            Windows per layer and head for every budget; the mean of each is exactly the budget.
        """
        _, heads = self.shape
        found: dict[int, list[Tensor]] = {budget: [] for budget in budgets}
        locals_ = {local_of(budget) for budget in budgets}
        for block in blocks:
            ranks: dict[int, list[Tensor]] = {budget: [] for budget in budgets}

            def observe(layer: int, query: Tensor, key: Tensor, scale: float, ranks: Any = ranks) -> None:
                weights = {local: future_attention(query, key, local=local, scale=scale) for local in locals_}
                for budget in budgets:
                    local = local_of(budget)
                    ranks[budget].append(weights[local][:, :, SINKS : key.shape[2] - local].log())

            self.choice = Choice(observer=observe)
            self.model.model(input_ids=block, use_cache=False)
            for budget in budgets:
                found[budget].append(torch.cat(ranks[budget], 1).transpose(0, 1).clamp(min=-60.0).cpu())
        self.choice = Choice()
        made = {}
        for budget in budgets:
            least = local_of(budget) + SINKS
            counts = [least + count for count in counts_above_threshold(found[budget], budget - least)]
            made[budget] = [counts[start : start + heads] for start in range(0, len(counts), heads)]
        return made


def choose_and_attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: (B, H, N, D) and (B, G, N, D) -> (B, N, H, D)."""
    chooser, hidden = module._ceiling
    choice: Choice = chooser.choice
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if choice.observer is not None:
        choice.observer(module.layer_idx, query, key, scale)
    if choice.rule == "dense":
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    elif choice.rule == "query":
        output = best_keys_of_each_query(query, key, value, choice.windows[module.layer_idx], scale)
    else:
        if choice.rule == "newest":
            ranks = torch.zeros(key.shape[:3], device=key.device)
        elif choice.rule == "static":
            ranks = future_attention(query, key, local=choice.local, scale=scale)
        else:
            ranks = choice.predictors[module.layer_idx](hidden)
        windows = [int(window) for window in choice.windows[module.layer_idx]]
        expiry = key_expiry(ranks, windows, local=choice.local, sinks=choice.sinks)
        output = interval_attention(query, key, value, expiry, scale=scale)
    return output.transpose(1, 2).contiguous(), None


def best_keys_of_each_query(
    query: Tensor, key: Tensor, value: Tensor, windows: Sequence[int], scale: float, chunk: int = _CHUNK
) -> Tensor:
    """Attention of each query to the keys of its prefix that its group's heads give the most dense attention.

    Args:
        query: (B, H, N, D); key, value: (B, G, N, D). Each row of the batch is chosen for by itself.
        windows: keys that a query of each of the G heads sees. Equal weights at the edge are all seen.
        scale: factor on the logits.
        chunk: queries whose logits exist at once.

    Returns:
        (B, H, N, D).
    """
    heads, length = query.shape[1:3]
    groups = key.shape[1]
    grouped = query.unflatten(1, (groups, heads // groups)).float()
    parts = []
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        logits = torch.einsum("bghnd,bgmd->bghnm", grouped[:, :, :, first:last] * scale, key[:, :, :last].float())
        place = torch.arange(first, last, device=query.device)
        future = torch.arange(last, device=query.device) > place[:, None]
        weights = logits.masked_fill_(future, -torch.inf).softmax(-1)
        total = weights.sum(2)  # (B, G, n, last)
        for group, window in enumerate(windows):
            if window < last:
                edge = total[:, group].topk(int(window), sorted=False).values.amin(-1, keepdim=True)
                weights[:, group].mul_((total[:, group] >= edge).unsqueeze(1))
        weights /= weights.sum(-1, keepdim=True)
        parts.append(torch.einsum("bghnm,bgmd->bghnd", weights, value[:, :, :last].float()))
    return torch.cat(parts, 3).flatten(1, 2).to(query.dtype)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Attention is causal and rows have no padding."""
    return None


AttentionInterface.register(IMPLEMENTATION, choose_and_attend)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
