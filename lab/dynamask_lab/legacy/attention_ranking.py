"""Ranks that predict attention: what teaches a gate which keys will be looked at, kept or not.

The contest for the window has no gradient of its own. In the paper's form the ranks are the scores on the logits, which
training moves to where attention should go now, not to what should be kept for later. Here a few queries of every
training batch attend to their whole prefix, and the ranks learn, by cross-entropy, the share of that attention which
each key gets: the best static ranks are those by expected attention. The attention itself is not trained by this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_QUERIES = 32
"""Queries of a batch's rows that look at everything: 1.6% of dense attention at 2048 tokens."""

_WEIGHT = 0.1
"""Of this loss in the gradient. Only ranks get it, and Adam is indifferent to it; clipping by norm is not."""


def learn_ranks(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    ranks: Tensor,
    *,
    window: int,
    local: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    power: float = 1.0,
) -> Tensor:
    """`output` as it is, whose backward pass also teaches the ranks.

    The queries asked are drawn from those that have dropped keys, or, in rows too short for that, from the later half:
    what they look at says what longer rows had better keep.

    Args:
        output: of the attention, any shape.
        query: (B, H, N, D); key (B, G, N, D).
        bias: (B, G, N), added to the logits.
        ranks: (B, G, N), differentiable.
        window, local: as of `key_expiry`.
        segment_ids: (B, N) int64 or None.
        key_mask: (B, N) bool or None.
        scale: factor on the logits.
        power: of the attention that is learned, see `attention_loss`.
    """
    length = key.shape[2]
    first = min(window, length // 2)
    rows = torch.randint(first, length, (min(_QUERIES, length - first),), device=key.device)
    loss = attention_loss(
        query,
        key,
        bias,
        ranks,
        rows,
        local=local,
        segment_ids=segment_ids,
        key_mask=key_mask,
        scale=scale,
        power=power,
    )
    return _Attach.apply(output, loss * _WEIGHT)  # type: ignore[no-untyped-call, no-any-return]


def attention_loss(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    ranks: Tensor,
    rows: Tensor,
    *,
    local: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    power: float = 1.0,
) -> Tensor:
    """Cross-entropy of the ranks' softmax to the attention of `rows`, over the keys that contest the window.

    Args:
        rows: (S,) int64, queries; the others as in `learn_ranks`.
        power: of the attention. Above 1, a key that few queries look at sharply counts for more than one that many
            glance at: to the power 4, one query that gives it a half for as much as 25**4 that give it a fiftieth.

    Returns:
        () float32: mean over batch, heads and rows, each row weighted by how much it attends beyond `local`.
    """
    batch, groups, length, dim = key.shape
    with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        taken = query[:, :, rows].reshape(batch, groups, -1, dim).float()
        logits = (taken @ key.float().mT * scale).view(batch, groups, -1, len(rows), length)
        position = torch.arange(length, device=key.device)
        seen = (position <= rows[:, None])[None]
        if segment_ids is not None:
            seen = seen & (segment_ids[:, None, :] == segment_ids[:, rows, None])
        if key_mask is not None:
            seen = seen & key_mask[:, None, :]
        seen = seen[:, None]
        logits = logits + bias.float()[:, :, None, None]
        attention = logits.masked_fill(~seen[:, :, None], torch.finfo(torch.float32).min).softmax(-1).mean(2)
        contest = seen & (position <= rows[:, None] - local)
        attention = (attention * contest) ** power
    # Not -inf: a row without contest would be NaN, times no attention NaN still.
    guess = ranks.float().unsqueeze(2).masked_fill(~contest, torch.finfo(torch.float32).min).log_softmax(-1)
    return -(attention * guess.masked_fill(~contest, 0.0)).sum() / (batch * groups * len(rows))


class _Attach(torch.autograd.Function):
    """Hand a tensor through and send a gradient of one into a loss beside it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = (loss.dtype, loss.device)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss
        return grad, torch.ones((), dtype=dtype, device=device)
