"""Levers for length, one at a time: what may let a model find needles beyond the length that it was trained on.

| lever | in every layer that attends |
| --- | --- |
| `ssmax` | the query grows with the logarithm of its position, by a learned factor per head (arXiv 2501.19399) |
| `forget` | a key's logit falls by learned gates of all later tokens, as a key bias (arXiv 2503.02130) |
| `drope` | no rotary embedding; a model trained with it is recalibrated without (arXiv 2512.12167) |

A forgetting gate's decay between key j and query i is `c_i - c_j`, and the softmax does not see `c_i`: what is left is
a key bias `-c_j`, which ranks add as well, so that the contest is of decayed keys.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dynamask.errors import InvalidInputError
from dynamask.mixers import MIXERS, DynamicMaskAttention, Mixer, MultiHeadAttention, SequenceInfo
from dynamask.mixers.base import recency_expiry
from dynamask.mixers.rank_predictor import sloped_ranks
from dynamask.ops.expiry import key_expiry
from dynamask.ops.interval.api import attend
from dynamask_lab.language.engine import STATE_FOLDER

LEVERS = ("ssmax", "forget", "drope")
_OPEN = 6.0
"""What forgetting gates start from: a 400th of a nat per token."""


class _LengthScaled:
    """Queries times a learned factor per head and the logarithm of their position, of the trained length's at first."""

    num_heads: int
    config: Any

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.length_scale = nn.Parameter(torch.ones(self.num_heads))

    def project(self, hidden_states: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor, Tensor]:
        """See `GroupedQueryMixer.project`."""
        query, key, value = super().project(hidden_states, sequence)  # type: ignore[misc]
        logarithm = (sequence.position_ids + 2).float().log() / math.log(self.config.max_position_embeddings)
        factor = self.length_scale.float()[:, None] * logarithm[:, None]
        return (query * factor[..., None]).to(query.dtype), key, value


class _Unrotated:
    """Heads without rotary embedding."""

    def rotated(self, heads: Tensor, sequence: SequenceInfo) -> Tensor:
        """See `Mixer.rotated`."""
        return heads


class _Forgetting:
    """Logits that fall with what the tokens between key and query forget."""

    config: Any
    sinks: int
    local: int
    windows: tuple[int, ...]

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.forget_gate = nn.Linear(config.hidden_size, config.num_key_value_heads)
        nn.init.zeros_(self.forget_gate.bias)

    def forget_bias(self, hidden_states: Tensor) -> Tensor:
        """(B, G, N) float32: minus the sum of the logarithms of the gates up to each key, itself included."""
        gates = F.logsigmoid(self.forget_gate(hidden_states).float() + _OPEN)
        return -_accumulated(gates).transpose(1, 2).contiguous()


@torch.compiler.disable
def _accumulated(gates: Tensor) -> Tensor:
    """Sum (B, N, G) over the positions, outside of compiled graphs: torch 2.11 fails on this sum beside ranks."""
    return gates.cumsum(1)


class LengthScaledAttention(_LengthScaled, MultiHeadAttention):
    """Dense attention with `ssmax`."""


class LengthScaledDynamicMask(_LengthScaled, DynamicMaskAttention):
    """Learned ranks with `ssmax`."""


class UnrotatedAttention(_Unrotated, MultiHeadAttention):
    """Dense attention without rotary embedding."""


class UnrotatedDynamicMask(_Unrotated, DynamicMaskAttention):
    """Learned ranks without rotary embedding."""


class ForgettingAttention(_Forgetting, MultiHeadAttention):
    """Dense attention with `forget`, without a cache."""

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`. Raises InvalidInputError with a cache."""
        _without_cache(cache)
        query, key, value = self.project(hidden_states, sequence)
        expiry = recency_expiry(key, [key.shape[2]] * key.shape[1], sequence)
        return self.merge_heads(attend(query, key, value, expiry, bias=self.forget_bias(hidden_states)))


class ForgettingDynamicMask(_Forgetting, DynamicMaskAttention):
    """Learned ranks with `forget`, without a cache."""

    def forward(
        self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `Mixer.forward`. Raises InvalidInputError with a cache."""
        _without_cache(cache)
        assert self.rank_predictor is not None
        query, key, value = self.project(hidden_states, sequence)
        ranks, bias = self.rank_predictor(hidden_states.detach()), self.forget_bias(hidden_states)
        compared = ranks.detach() + bias.detach()
        if self.slopes is not None:
            compared = sloped_ranks(compared, self.slopes, sequence.position_ids)
        expiry = key_expiry(
            compared, self.windows, local=self.local, sinks=self.sinks, segment_ids=sequence.segment_ids
        )
        output = self.merge_heads(attend(query, key, value, expiry, bias=bias, max_live=tuple(self.windows)))
        return (output, self._rank_loss(query, key, ranks, sequence)) if sequence.learns else output


def _without_cache(cache: Cache | None) -> None:
    if cache is not None:
        raise InvalidInputError("forgetting gates are of this study alone: they keep no cache")


_MIXERS: dict[str, dict[str, type[Mixer]]] = {
    "ssmax": {"mha": LengthScaledAttention, "dma": LengthScaledDynamicMask},
    "forget": {"mha": ForgettingAttention, "dma": ForgettingDynamicMask},
    "drope": {"mha": UnrotatedAttention, "dma": UnrotatedDynamicMask},
}


@contextlib.contextmanager
def lever_mixers(lever: str) -> Iterator[None]:
    """Let `mha` and `dma` be those of a lever, and runs keep their states apart from those without; "" changes nothing.

    Raises:
        InvalidInputError: an unknown lever.
    """
    if not lever:
        yield
        return
    if lever not in _MIXERS:
        raise InvalidInputError(f"lever must be one of {', '.join(LEVERS)}; got {lever!r}")
    before, folder = dict(MIXERS), os.environ.get(STATE_FOLDER)
    MIXERS.update(_MIXERS[lever])
    os.environ[STATE_FOLDER] = os.path.join(folder or "runs/experiments", lever)
    try:
        yield
    finally:
        MIXERS.update(before)
        if folder is None:
            del os.environ[STATE_FOLDER]
        else:
            os.environ[STATE_FOLDER] = folder
