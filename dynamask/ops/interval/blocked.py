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

from dynamask.ops.interval.weighted_sum import weighted_sum

DEFAULT_BLOCK = 256
"""Queries per block: a small multiple of what fills a core's vector units, well under a typical window."""

_STEEP = 64.0
"""Biases above this are subtracted from each other before anything is added to them."""


def key_lists(expiry: Tensor, num_queries: int, block: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """List, for each block of queries, the positions of the keys it can see.

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
    grouped: Tensor, key: Tensor, expiry: Tensor, bias: Tensor | None, scale: float, block: tuple, top: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """One block: its queries (B, G, R·M, D), gathered keys (B, G, L, D), logits (B, G, R, M, L), what is seen
    (B, G, 1, M, L), and the bias (B, G, 1, M) that the logits count from.

    Args:
        top: that bias, (B, G, 1, M). None: the largest bias that each query sees, if any bias of the call is steep.
    """
    start, stop, index, listed, first, steep = block
    batch, groups, ratio, _, dim = grouped.shape
    rows = stop - start
    q = grouped[:, :, :, start - first : stop - first].reshape(batch, groups, ratio * rows, dim)
    k = _gather(key, index).to(q.dtype)
    logits = torch.matmul(q * scale, k.transpose(-1, -2)).view(batch, groups, ratio, rows, -1)
    query_position = torch.arange(start, stop, device=index.device)[:, None]
    alive = expiry.gather(-1, index)[:, :, None, :]
    seen = (index[:, :, None, :] <= query_position) & (query_position < alive) & listed[:, :, None, :]
    seen = seen.unsqueeze(2)
    if bias is not None:
        relative = bias.gather(-1, index)[:, :, None, None, :]
        if steep:
            # Differences of large biases are exact, their sums with the products are not.
            relative = relative.to(torch.promote_types(bias.dtype, q.dtype))
            if top is None:
                top = _finite(relative.masked_fill(~seen, float("-inf")).amax(-1))
            relative = relative - top.unsqueeze(-1)
        logits += relative.to(q.dtype)
    return q, k, logits.masked_fill_(~seen, float("-inf")), seen, top if steep else None


def _fused_tile(
    grouped: Tensor, key: Tensor, value: Tensor, expiry: Tensor, scale: float, block: tuple
) -> tuple[Tensor, Tensor] | None:
    """One block by torch's fused attention: output (B, G, R, M, D) and log-sum-exp (B, G, R, M).

    Args:
        grouped: (B, G, R, Nq, D); key, value, expiry: as in `forward`.
        block: as in `_tile`.

    Returns:
        None where the output is not finite: unseen values that are not finite spoil it.
    """
    start, stop, index, listed, first, _ = block
    queries = grouped[:, :, :, start - first : stop - first]
    shape, dtype = queries.shape, grouped.dtype
    ratio, rows = shape[2], stop - start
    # Heads of a group share keys, values and mask, which are expanded, not copied.
    k, v = (_gather(each, index).to(dtype).flatten(0, 1)[:, None].expand(-1, ratio, -1, -1) for each in (key, value))
    query_position = torch.arange(start, stop, device=index.device)[:, None]
    alive = expiry.gather(-1, index)[:, :, None, :]
    seen = ((index[:, :, None, :] <= query_position) & (query_position < alive) & listed[:, :, None, :]).flatten(0, 1)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    mask = mask[:, None].expand(-1, ratio, -1, -1)
    queries = queries.flatten(0, 1)
    if queries.stride(-1) != 1:  # the kernel reads rows as if their numbers were neighbours, and does not check
        queries = queries.contiguous()
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, k, v, attn_mask=mask, scale=scale)
    if not bool(output.isfinite().all()):
        return None
    lse = lse.masked_fill(~seen.any(-1)[:, None], float("-inf"))
    return output.view(*shape[:3], rows, -1), lse.view(*shape[:3], rows)


def _is_steep(bias: Tensor | None) -> bool:
    return bias is not None and bool((bias.abs() > _STEEP).any())


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    scale: float,
    block: int = DEFAULT_BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the output of interval attention, and its log-sum-exp in two parts.

    Args:
        query: (B, H, Nq, D); key (B, G, N, D); value (B, G, N, Dv); expiry (B, G, N); bias (B, G, N) or None.
        scale: factor on the query-key products.
        block: queries per tile.

    Returns:
        output (B, H, Nq, Dv) in the query's dtype; top and rest (B, H, Nq) in float32 (float64 for float64), whose
        sum is the log-sum-exp of a query's logits. top is 0, or the largest bias that the query sees where biases
        are steep: in the sum, large biases would round the rest away. rest is -inf where a query sees no key.
    """
    batch, heads, num_queries, dim = query.shape
    groups, length = key.shape[1], key.shape[2]
    ratio, first = heads // groups, length - num_queries
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).view(batch, groups, ratio, num_queries, dim)
    output = torch.zeros(batch, groups, ratio, num_queries, value.shape[-1], dtype=wide, device=query.device)
    top = torch.zeros((batch, groups, ratio, num_queries), dtype=wide, device=query.device)
    rest = torch.full_like(top, float("-inf"))
    steep = _is_steep(bias)
    fusible = bias is None and query.device.type == "cpu" and dim == value.shape[-1]
    for start, stop, index, listed in key_lists(expiry, num_queries, block):
        if index.shape[-1] == 0:
            continue
        tile = (start, stop, index, listed, first, steep)
        rows = slice(start - first, stop - first)
        fused = _fused_tile(grouped, key, value, expiry, scale, tile) if fusible else None
        if fused is not None:
            output[:, :, :, rows], rest[:, :, :, rows] = fused
            continue
        _, _, logits, seen, block_top = _tile(grouped, key, expiry, bias, scale, tile, None)
        largest = logits.amax(-1)
        # exp(-inf - finite) = 0 is what a row without keys needs; -inf - -inf would be NaN.
        weights = logits.sub_(_finite(largest).unsqueeze(-1)).exp_()
        total = weights.sum(-1)
        v = _gather(value, index).to(wide)
        mixed = torch.matmul(weights.view(batch, groups, ratio * (stop - start), -1), v).view(*total.shape, -1)
        if not bool(mixed.isfinite().all()):
            mixed = weighted_sum(weights, v.unsqueeze(2), seen)
        output[:, :, :, rows] = mixed / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
        rest[:, :, :, rows] = largest + total.log()
        if block_top is not None:
            top[:, :, :, rows] = block_top.to(wide)
    shape = (batch, heads, num_queries)
    return output.view(*shape, -1).to(query.dtype), top.view(shape), rest.view(shape)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    output: Tensor,
    top: Tensor,
    rest: Tensor,
    scale: float,
    block: int = DEFAULT_BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward` to query, key, value and bias; tiles of weights are computed again.

    Shapes as in `forward`; `grad_output` has the output's; `top` and `rest` are those of `forward`. Returns
    gradients in the inputs' dtypes; that of the bias is float32 (float64) zeros-shaped (B, G, N) even where bias is
    None.
    """
    arguments = (grad_output, query, key, value, expiry, bias, output, top, rest, scale, block)
    gradients = _gradients(*arguments, careful=False)
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        gradients = _gradients(*arguments, careful=True)
    return gradients


def _gradients(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    output: Tensor,
    top: Tensor,
    rest: Tensor,
    scale: float,
    block: int,
    careful: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward`; `careful` keeps numbers that are not finite out of the gradients of what does not see them."""
    batch, heads, num_queries, dim = query.shape
    groups, length = key.shape[1], key.shape[2]
    ratio, first = heads // groups, length - num_queries
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).view(batch, groups, ratio, num_queries, dim)
    grad = grad_output.to(wide).view(batch, groups, ratio, num_queries, -1)
    # sum_j p_ij · dp_ij = do_i · o_i, the same identity FlashAttention uses.
    delta = (grad * output.to(wide).view_as(grad)).sum(-1)
    rest = _finite(rest).view(batch, groups, ratio, num_queries)
    top = top.view(batch, groups, ratio, num_queries)[:, :, :1]
    dq = torch.zeros_like(grouped)
    dk = torch.zeros(key.shape, dtype=wide, device=key.device)
    dv = torch.zeros(value.shape, dtype=wide, device=key.device)
    dbias = torch.zeros(expiry.shape, dtype=wide, device=key.device)
    steep = _is_steep(bias)

    def product(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        return weighted_sum(weights, values, seen) if careful else torch.matmul(weights, values)

    for start, stop, index, listed in key_lists(expiry, num_queries, block):
        if index.shape[-1] == 0:
            continue
        tile = (start, stop, index, listed, first, steep)
        rows = slice(start - first, stop - first)
        q, k, logits, seen, _ = _tile(grouped, key, expiry, bias, scale, tile, top[:, :, :, rows])
        weights = logits.sub_(rest[:, :, :, rows].unsqueeze(-1)).exp_()
        flat = (batch, groups, ratio * (stop - start), -1)
        weights = weights.reshape(flat)
        do = grad[:, :, :, rows].reshape(flat)
        v = _gather(value, index).to(wide)
        dlogits = torch.matmul(do, v.transpose(-1, -2))
        dlogits.sub_(delta[:, :, :, rows].reshape(flat)).mul_(weights)
        if careful:
            seen = seen.expand(batch, groups, ratio, stop - start, -1).reshape(flat)
            weights.masked_fill_(~seen, 0.0)
            dlogits.masked_fill_(~seen, 0.0)
        seen_by = seen.transpose(-1, -2)
        dq[:, :, :, rows] = (product(dlogits, k, seen) * scale).view(batch, groups, ratio, stop - start, dim)
        _scatter_add(dv, index, product(weights.transpose(-1, -2), do, seen_by))
        _scatter_add(dk, index, product(dlogits.transpose(-1, -2), q, seen_by) * scale)
        dbias.scatter_add_(-1, index, dlogits.sum(2))
    return dq.view_as(query).to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dbias


def _scatter_add(total: Tensor, index: Tensor, rows: Tensor) -> None:
    total.scatter_add_(2, index.unsqueeze(-1).expand_as(rows), rows)


def _finite(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits == float("-inf"), 0.0)
