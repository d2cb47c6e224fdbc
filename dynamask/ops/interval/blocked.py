"""Interval attention in plain torch with O(N·w) work and O(block·(w + block)) memory, for CPUs.

The queries are walked in blocks of M. The keys a block can see are those born before its end that expire after
its start: at most `window` survivors plus the M new ones. They are gathered, and the rest is dense attention on
a (M, w + M) tile. The list of survivors is carried from block to block, so building all lists costs
O(N·(w + M)/M), not O(N²/M).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

DEFAULT_BLOCK = 256
"""Queries per block: a small multiple of what fills a core's vector units, well under a typical window."""


def key_lists(expiry: Tensor, num_queries: int, block: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each block of queries, the positions of the keys it can see.

    Args:
        expiry: (B, G, N) int32.
        num_queries: Nq; the queries are the last Nq positions.
        block: queries per block.

    Yields:
        `start, stop` (absolute positions of the block's queries), `index` (B, G, L) int64, the positions in
        increasing order, and `listed` (B, G, L) bool, False where a shorter list is padded.
    """
    batch, groups, length = expiry.shape
    device = expiry.device
    first = length - num_queries
    live = torch.arange(first, device=device).expand(batch, groups, first)
    listed = torch.ones_like(live, dtype=torch.bool)
    for start in range(first, length, block):
        stop = min(start + block, length)
        new = torch.arange(start, stop, device=device).expand(batch, groups, stop - start)
        index = torch.cat([live, new], dim=-1)
        listed = torch.cat([listed, torch.ones_like(new, dtype=torch.bool)], dim=-1)
        # A key that is dead on arrival, or that expired before this block, is seen by none of its queries.
        listed = listed & (expiry.gather(-1, index) > torch.clamp(index, min=start))
        if not bool(listed.all()):
            count = int(listed.sum(-1).max())
            order = (~listed).to(torch.int8).sort(dim=-1, stable=True).indices[..., :count]
            index, listed = index.gather(-1, order), listed.gather(-1, order)
        yield start, stop, index, listed
        live = index


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (B, G, N, D) at index (B, G, L) -> (B, G, L, D)."""
    return rows.gather(2, index.unsqueeze(-1).expand(*index.shape, rows.shape[-1]))


def _tile(
    grouped: Tensor, key: Tensor, expiry: Tensor, bias: Tensor | None, scale: float, block: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    """One block: its queries (B, G, R·M, D), gathered keys (B, G, L, D) and masked logits (B, G, R, M, L)."""
    start, stop, index, listed, first = block
    batch, groups, ratio, _, dim = grouped.shape
    rows = stop - start
    q = grouped[:, :, :, start - first : stop - first].reshape(batch, groups, ratio * rows, dim)
    k = _gather(key, index).to(q.dtype)
    logits = torch.matmul(q * scale, k.transpose(-1, -2))
    if bias is not None:
        logits += bias.gather(-1, index).to(q.dtype).unsqueeze(2)
    query_position = torch.arange(start, stop, device=index.device)[:, None]
    alive = expiry.gather(-1, index)[:, :, None, :]
    seen = (index[:, :, None, :] <= query_position) & (query_position < alive) & listed[:, :, None, :]
    seen = seen.unsqueeze(2)
    logits = logits.view(batch, groups, ratio, rows, -1).masked_fill_(~seen, float("-inf"))
    return q, k, logits


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    scale: float,
    block: int = DEFAULT_BLOCK,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of interval attention.

    Args:
        query: (B, H, Nq, D); key (B, G, N, D); value (B, G, N, Dv); expiry (B, G, N); bias (B, G, N) or None.
        scale: factor on the query-key products.
        block: queries per tile.

    Returns:
        output (B, H, Nq, Dv) in the query's dtype and lse (B, H, Nq) in float32 (float64 for float64), -inf
        where a query sees no key.
    """
    batch, heads, num_queries, dim = query.shape
    groups, length = key.shape[1], key.shape[2]
    ratio, first = heads // groups, length - num_queries
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).view(batch, groups, ratio, num_queries, dim)
    output = torch.zeros(batch, groups, ratio, num_queries, value.shape[-1], dtype=wide, device=query.device)
    lse = torch.full((batch, groups, ratio, num_queries), float("-inf"), dtype=wide, device=query.device)
    for start, stop, index, listed in key_lists(expiry, num_queries, block):
        if index.shape[-1] == 0:
            continue
        _, _, logits = _tile(grouped, key, expiry, bias, scale, (start, stop, index, listed, first))
        row_lse = torch.logsumexp(logits, dim=-1)
        # exp(-inf - finite) = 0 is what a row without keys needs; -inf - -inf would be NaN.
        weights = logits.sub_(_finite(row_lse).unsqueeze(-1)).exp_()
        v = _gather(value, index).to(wide).unsqueeze(2)
        rows = slice(start - first, stop - first)
        shape = (batch, groups, 1, ratio * (stop - start), -1)
        tile = torch.matmul(weights.reshape(shape), v)
        output[:, :, :, rows] = tile.view(batch, groups, ratio, stop - start, -1)
        lse[:, :, :, rows] = row_lse
    return output.view(batch, heads, num_queries, -1).to(query.dtype), lse.view(batch, heads, num_queries)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    block: int = DEFAULT_BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward` to query, key, value and bias; each tile of weights is computed again from lse.

    Shapes as in `forward`; `grad_output` has the output's. Returns gradients in the inputs' dtypes; that of
    the bias is float32 (float64) zeros-shaped (B, G, N) even where bias is None.
    """
    batch, heads, num_queries, dim = query.shape
    groups, length = key.shape[1], key.shape[2]
    ratio, first = heads // groups, length - num_queries
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).view(batch, groups, ratio, num_queries, dim)
    grad = grad_output.to(wide).view(batch, groups, ratio, num_queries, -1)
    # sum_j p_ij · dp_ij = do_i · o_i, the same identity FlashAttention uses.
    delta = (grad * output.to(wide).view_as(grad)).sum(-1)
    row_lse = _finite(lse).view(batch, groups, ratio, num_queries)
    dq = torch.zeros_like(grouped)
    dk = torch.zeros(key.shape, dtype=wide, device=key.device)
    dv = torch.zeros(value.shape, dtype=wide, device=key.device)
    dbias = torch.zeros(expiry.shape, dtype=wide, device=key.device)
    for start, stop, index, listed in key_lists(expiry, num_queries, block):
        if index.shape[-1] == 0:
            continue
        tile = (start, stop, index, listed, first)
        q, k, logits = _tile(grouped, key, expiry, bias, scale, tile)
        rows = slice(start - first, stop - first)
        weights = logits.sub_(row_lse[:, :, :, rows].unsqueeze(-1)).exp_()
        flat = (batch, groups, ratio * (stop - start), -1)
        weights = weights.reshape(flat)
        do = grad[:, :, :, rows].reshape(flat)
        v = _gather(value, index).to(wide)
        dlogits = torch.matmul(do, v.transpose(-1, -2))
        dlogits.sub_(delta[:, :, :, rows].reshape(flat)).mul_(weights)
        dq[:, :, :, rows] = (torch.matmul(dlogits, k) * scale).view(batch, groups, ratio, stop - start, dim)
        _scatter_add(dv, index, torch.matmul(weights.transpose(-1, -2), do))
        _scatter_add(dk, index, torch.matmul(dlogits.transpose(-1, -2), q) * scale)
        dbias.scatter_add_(-1, index, dlogits.sum(2))
    return dq.view_as(query).to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dbias


def _scatter_add(total: Tensor, index: Tensor, rows: Tensor) -> None:
    total.scatter_add_(2, index.unsqueeze(-1).expand_as(rows), rows)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == float("-inf"), 0.0)
