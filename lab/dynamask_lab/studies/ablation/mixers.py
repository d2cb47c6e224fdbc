"""Dynamic mask attention with one thing about it changed. Known as mixers only inside `ablation_mixers()`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from dynamask.errors import InvalidInputError
from dynamask.mixers import MIXERS, SequenceInfo, register
from dynamask.ops.expiry import key_expiry
from dynamask.ops.interval.api import attend
from dynamask_lab.legacy import OldDynamicMask, OldGate
from dynamask_lab.legacy.alibi import slopes


class _RandomGate(OldGate):
    """A gate that chooses by content from the start: a gate at zero that gets no gradient would stay a window."""

    def initialize_parameters(self) -> None:
        super().initialize_parameters()
        init.normal_(self.gate)


class _Ablated(OldDynamicMask):
    """The mixer without a cache: ablations are trained and their loss measured, nothing is generated."""

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`. Raises InvalidInputError for a cache."""
        if cache is not None:
            raise InvalidInputError(
                "a mixer of the ablation decodes from no cache: call the model with use_cache=False"
            )
        query, key, value = self.project(hidden_states, sequence)
        scores = self.gate(value, sequence.position_ids)
        return self.merge_heads(self.mix(query, key, value, scores, sequence))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, sequence: SequenceInfo) -> Tensor:
        """(B, H, N, D) of the projected heads and the scores (B, G, N)."""
        bias = self.bias(scores, sequence)
        return attend(query, key, value, self.expiry(scores, sequence), bias=bias, max_live=self.most_live)

    @property
    def most_live(self) -> int:
        """Keys that a query sees, at most."""
        return self.max_window

    def expiry(self, scores: Tensor, sequence: SequenceInfo) -> Tensor:
        """Which queries see which key, (B, G, N)."""
        ranks = self.gate.ranks(scores)
        facts = (sequence.segment_ids, sequence.key_mask)
        return key_expiry(ranks, self.max_window, local=self.layer_local, segment_ids=facts[0], key_mask=facts[1])

    def bias(self, scores: Tensor, sequence: SequenceInfo) -> Tensor:
        """What is added to the logits of the kept keys, (B, G, N)."""
        return scores


class RandomStart(_Ablated):
    """Gates A drawn from a normal distribution, trained as ever: what the next two are compared with."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate = _RandomGate(
            self.num_key_value_heads,
            self.head_dim,
            score_form=config.mixer_options["score_form"],
            recency=config.mixer_options["recency"],
            recency_spread=config.mixer_options["recency_spread"],
        )


class DetachedScores(RandomStart):
    """Scores in the logits that pass no gradient: gates stay random."""

    def bias(self, scores: Tensor, sequence: SequenceInfo) -> Tensor:
        """The scores, cut off from what made them."""
        return scores.detach()


class UnbiasedLogits(RandomStart):
    """Scores that choose, and are absent from the logits but for the recency term: gates stay random."""

    def bias(self, scores: Tensor, sequence: SequenceInfo) -> Tensor:
        """Recency alone."""
        if not self.gate.recency:
            return torch.zeros_like(scores)
        return (self.gate.log_recency.float().exp()[:, None] * sequence.position_ids.unsqueeze(1)).expand_as(scores)


class LeakyWholeSequence(_Ablated):
    """DELIBERATELY WRONG: the best `window` keys of the WHOLE SEQUENCE, the future included, for every query.

    What released implementations did. A query learns from the mask which of its keys will still rank high at the end;
    and it sees fewer of them than `window`, those that lie before it, and always itself and the newest `local`.
    """

    @property
    def most_live(self) -> int:
        """The chosen, and the newest."""
        return self.max_window + max(1, self.layer_local)

    def expiry(self, scores: Tensor, sequence: SequenceInfo) -> Tensor:
        """To the end for the chosen, as a short window's for the others."""
        length, window = scores.shape[-1], self.max_window
        survivors = key_expiry(scores, window) == length  # later positions win ties, as in the exact selection
        position = torch.arange(length, device=scores.device)
        short = (position + max(1, self.layer_local)).clamp(max=length)
        return torch.where(survivors, length, short).to(torch.int32)


class QueryHeadGates(_Ablated):
    """A gate per query head instead of per key/value head: every query head has a mask of its own."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads = self.num_heads
        self.gate.delta = nn.Linear(self.num_key_value_heads * self.head_dim, heads, bias=False)
        self.gate.gate = nn.Parameter(torch.zeros(heads))
        if self.gate.recency:
            initial = slopes(heads, self.gate.recency, self.gate.recency_spread).log()
            self.gate.log_recency = nn.Parameter(initial)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, sequence: SequenceInfo) -> Tensor:
        """Keys and values once per query head."""
        repeat = self.num_heads // self.num_key_value_heads
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        return super().mix(query, key, value, scores, sequence)


ABLATIONS: dict[str, type[_Ablated]] = {
    "dma-random-start": RandomStart,
    "dma-detached-scores": DetachedScores,
    "dma-unbiased-logits": UnbiasedLogits,
    "dma-LEAKY-whole-sequence": LeakyWholeSequence,
    "dma-query-head-gates": QueryHeadGates,
}


@contextlib.contextmanager
def ablation_mixers() -> Iterator[None]:
    """Make `ABLATIONS` mixers by their names, for as long as the context lasts: nobody else should build them."""
    added = [name for name in ABLATIONS if name not in MIXERS]
    for name in added:
        register(name, ABLATIONS[name])
    try:
        yield
    finally:
        for name in added:
            del MIXERS[name]
