"""Interval attention by its definition: build the mask, softmax, multiply. O(N²) memory; for reading and tests."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamask.ops.interval.weighted_sum import weighted_sum


def visible(expiry: Tensor, num_queries: int) -> Tensor:
    """Materialise the mask of an expiry.

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
    """Compute interval attention over a materialised mask, differentiable by autograd (twice, too).

    Arguments as in `dynamask.interval_attention`. Computes in float32, or float64 for float64 inputs.
    """
    batch, heads, num_queries, dim = query.shape
    groups = key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    seen = visible(expiry, num_queries)[:, :, None]
    grouped = query.to(wide).view(batch, groups, heads // groups, num_queries, dim)
    # A query or key that is not finite makes the logits NaN in which it takes part, and no gradients but those.
    bad_query, bad_key = (~t.isfinite().all(-1) for t in (grouped, key))
    bad = bad_query[..., None] | bad_key[:, :, None, None, :]
    grouped = grouped.masked_fill(bad_query[..., None], 0.0)
    finite_key = key.to(wide).masked_fill(bad_key[..., None], 0.0)
    logits = scale * torch.einsum("bghid,bgjd->bghij", grouped, finite_key)
    if bias is not None:
        # A query's weights depend on the differences of the biases it sees alone: taken first, they are exact.
        relative = bias.to(torch.promote_types(bias.dtype, wide))[:, :, None, None, :]
        relative = relative - _largest(relative.expand(*seen.shape), seen)
        logits = logits + relative.to(wide)
    logits = logits.masked_fill(bad, float("nan")).masked_fill(~seen, float("-inf"))
    weights = (logits - _largest(logits, seen)).exp()
    total = weights.sum(-1, keepdim=True)
    # A row that sees nothing, or keys at -inf alone, has zero output and zero gradient instead of 0/0.
    weights = (weights / total.masked_fill(total == 0, 1.0)).masked_fill(~seen, 0.0)
    output = weighted_sum(weights, value.to(wide)[:, :, None], seen)
    return output.reshape(batch, heads, num_queries, value.shape[-1]).to(query.dtype)


def _largest(logits: Tensor, seen: Tensor) -> Tensor:
    """The largest logit (..., M, 1) that each row of (..., M, L) sees, 0 where that is -inf. Not differentiated."""
    largest = logits.detach().masked_fill(~seen, float("-inf")).amax(-1, keepdim=True)
    return largest.masked_fill(largest == float("-inf"), 0.0)
