"""Interval attention by its definition: build the mask, softmax, multiply. O(N²) memory; for reading and tests."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(expiry: Tensor, num_queries: int) -> Tensor:
    """The mask an expiry stands for.

    Args:
        expiry: (B, G, N) int32.
        num_queries: Nq; the queries are the last Nq of the N positions.

    Returns:
        (B, G, Nq, N) bool, True where query i sees key j: `j <= i < expiry[j]`.
    """
    length = expiry.shape[-1]
    position = torch.arange(length, device=expiry.device)
    query = position[length - num_queries :, None]
    return (position <= query) & (query < expiry[:, :, None, :])


def interval_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Interval attention over a materialised mask, differentiable by autograd (twice, too).

    Arguments as in `dynamask.interval_attention`. Computes in float32, or float64 for float64 inputs.
    """
    batch, heads, num_queries, dim = query.shape
    groups = key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).view(batch, groups, heads // groups, num_queries, dim)
    logits = scale * torch.einsum("bghid,bgjd->bghij", grouped, key.to(wide))
    if bias is not None:
        logits = logits + bias.to(wide)[:, :, None, None, :]
    seen = visible(expiry, num_queries)[:, :, None]
    # A finite fill and a product with the mask, rather than -inf, so that a row that sees nothing has zero
    # output and zero gradient instead of 0/0.
    logits = logits.masked_fill(~seen, torch.finfo(wide).min)
    weights = logits.softmax(-1).masked_fill(~seen, 0.0)
    output = torch.einsum("bghij,bgjd->bghid", weights, value.to(wide))
    return output.reshape(batch, heads, num_queries, value.shape[-1]).to(query.dtype)
