"""Dynamic mask attention over a sequence that is split over processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynamask.errors import InvalidInputError
from dynamask.integers import check_window
from dynamask.ops.autocast import autocast_dtype, narrowed
from dynamask.ops.bias import finite_bias
from dynamask.ops.checks import Window
from dynamask.ops.context_parallel.exchange import Loan, borrow_keys, return_gradients
from dynamask.ops.context_parallel.live_keys import text_order
from dynamask.ops.context_parallel.shards import ContextShards, Mesh, context_shards
from dynamask.ops.expiry import key_expiry
from dynamask.ops.interval.api import check_inputs, check_per_key, choose_backend
from dynamask.ops.interval.operators import interval_attention_backward_op, interval_attention_op


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranks: Tensor | None,
    window: Window,
    *,
    mesh: Mesh | None = None,
    shards: ContextShards | None = None,
    local: int = 0,
    sinks: int = 0,
    segment_ids: Tensor | None = None,
    bias_is_rank: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute dynamic mask attention of a sequence whose shards lie in several processes.

    Every process holds a contiguous shard, in the order of the processes, and gets the outputs of its own queries:
    those of `dynamic_mask_attention` (`bias_is_rank`) or of `interval_attention` with `key_expiry` over the whole
    sequence. A process needs from all before it the live keys at its left boundary alone, at most `window[g]` per head,
    so the bytes on the wire do not depend on the length: see `exchange`. All processes must call this, and run its
    backward pass, in the same order.

    Args:
        query: (B, H, n, D), this process's shard; n may differ between processes. H is a multiple of G.
        key: (B, G, n, D); value: (B, G, n, Dv), dtype and device of the query.
        ranks: (B, G, n) float, the higher is kept longer, NaN lowest, on equal ranks the later position; None: the
            newest keys are kept.
        window: keys each query keeps: an integer, or G integers, one per key/value head.
        mesh: the processes that share the sequence, see `context_shards`; or
        shards: what `context_shards` returned for this batch, which spares an exchange per layer.
        local: newest keys that are always kept.
        sinks: first keys of each document that are always kept. local + sinks <= min(window).
        segment_ids: with `mesh`: (B, n) integers of packed documents, non-decreasing over the whole sequence.
        bias_is_rank: whether the ranks are also added to the logits of their keys (the paper's form), which is how they
            get a gradient. A rank that is not finite adds nothing.
        scale: factor on the query-key products, default D**-0.5.
        backend: "torch", "triton" or "auto", as in `interval_attention`.

    Returns:
        (B, H, n, Dv) in the query's dtype. Differentiable in query, key, value and, with `bias_is_rank`, ranks.
        Gradients of borrowed keys return to the process that owns them.

    Raises:
        InvalidInputError: shapes or dtypes that do not fit, both or neither of mesh and shards, segment_ids beside
            shards, or shards of another length.

    Source: the merge of live sets is dynamask's (design section 2); ring attention (arXiv 2310.01889), its dense
    counterpart, sends every key to every process.
    """
    if (mesh is None) == (shards is None):
        raise InvalidInputError("give exactly one of mesh and shards")
    if shards is not None and segment_ids is not None:
        raise InvalidInputError("shards hold the segment_ids already: give them to context_shards instead")
    check_inputs(query, key, value)
    batch, groups, length = key.shape[:3]
    if query.shape[2] != length:
        raise InvalidInputError(
            f"query and key must be of the same shard; got {query.shape[2]} queries and {length} keys"
        )
    if ranks is None:
        ranks = torch.zeros(1, 1, 1, device=key.device).expand(batch, groups, length)
    check_per_key("ranks", ranks, query, key, value)
    windows = check_window(window, local, sinks, groups=groups)
    if shards is None:
        shards = context_shards(mesh, batch, length, key.device, segment_ids=segment_ids)
    if shards.lengths[shards.rank] != length:
        raise InvalidInputError(
            f"shards were made for {shards.lengths[shards.rank]} tokens in this process; got {length}"
        )
    narrow = autocast_dtype(query)
    if narrow is not None:
        query, key, value = (narrowed(tensor, narrow) for tensor in (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise InvalidInputError(
            f"query, key and value must share one dtype; got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    backend = choose_backend("torch" if backend == "reference" else backend, query)
    with torch.autocast(query.device.type, enabled=False):
        output: Tensor = _ContextAttention.apply(
            query, key, value, ranks, shards, windows, int(local), int(sinks), bias_is_rank, scale, backend
        )
    return output


class _ContextAttention(torch.autograd.Function):
    """Borrow, find the intervals, attend; and back. One node, so that every process takes part in every exchange."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ranks: Tensor,
        shards: ContextShards,
        windows: tuple[int, ...],
        local: int,
        sinks: int,
        bias_is_rank: bool,
        scale: float,
        backend: str,
    ) -> Tensor:
        batch, _, length = key.shape[:3]
        device = key.device
        borrowed, loan = borrow_keys(key, value, ranks, shards, windows, local=local, sinks=sinks)
        segments, mask, there, order = shards.segment_ids, None, None, None
        width = 0
        if borrowed is not None:
            width = borrowed.position.shape[-1]
            packed = shards.document is not None
            uneven = len({min(window, width) for window in windows}) > 1
            old_key, old_value, old_rank, position = borrowed
            if packed or uneven:
                order, empty = text_order(position, shards.first_document(batch, device), sinks)
                there = position.gather(-1, order) >= 0
                rows = order[..., None]
                # Places without a key hold whatever was there, which no query may meet.
                old_key = old_key.gather(2, rows.expand_as(old_key)).masked_fill(~there[..., None], 0.0)
                old_value = old_value.gather(2, rows.expand_as(old_value)).masked_fill(~there[..., None], 0.0)
                old_rank = old_rank.gather(-1, order).masked_fill(~there, float("nan"))
                if packed:
                    past = torch.arange(width, device=device) >= empty[:, None]
                    mask = torch.cat([past, past.new_ones(batch, length)], -1)
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
            ranks = torch.cat([old_rank, ranks], 2)
            if segments is not None:
                segments = torch.cat([segments[:, :1].expand(-1, width), segments], 1)
        expiry = key_expiry(ranks.detach(), windows, local=local, sinks=sinks, segment_ids=segments, key_mask=mask)
        if there is not None:
            column = torch.arange(width, dtype=torch.int32, device=device)
            expiry[..., :width] = torch.where(there, expiry[..., :width], column)
        bias = finite_bias(ranks) if bias_is_rank else None
        output, top, rest = interval_attention_op(query, key, value, expiry, bias, scale, backend, list(windows))
        ctx.save_for_backward(query, key, value, ranks, expiry, output, top, rest, order, there)
        ctx.shards, ctx.loan, ctx.width = shards, loan, width
        ctx.bias_is_rank, ctx.scale, ctx.backend, ctx.windows = bias_is_rank, scale, backend, windows
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, ranks, expiry, output, top, rest, order, there = ctx.saved_tensors
        loan: Loan = ctx.loan
        bias = finite_bias(ranks) if ctx.bias_is_rank else None
        dq, dk, dv, dbias = interval_attention_backward_op(
            grad_output.contiguous(),
            query,
            key,
            value,
            expiry,
            bias,
            output,
            top,
            rest,
            ctx.scale,
            ctx.backend,
            list(ctx.windows),
        )
        width = ctx.width
        whole = [dk, dv] if bias is None else [dk, dv, dbias[..., None]]
        like = tuple(each.new_empty(*each.shape[:2], 0, each.shape[3]) for each in whole)
        lent = None
        if width:
            lent = []
            for each in whole:
                part = each[:, :, :width]
                if order is not None:
                    rows = order[..., None].expand_as(part)
                    part = torch.zeros_like(part).scatter_(2, rows, part.masked_fill(~there[..., None], 0.0))
                lent.append(part)
        returned = return_gradients(lent, loan, ctx.shards, like)
        own = [each[:, :, width:] for each in whole]
        if returned is not None:
            assert loan.lent is not None
            for each, extra in zip(own, returned, strict=True):
                rows = loan.lent[..., None].expand_as(extra)
                each.scatter_add_(2, rows, extra.to(each.dtype))  # the tensor is this function's
        dranks = None
        if bias is not None:
            finite = ranks[:, :, width:].isfinite()
            dranks = own[2][..., 0].masked_fill(~finite, 0.0).to(ranks.dtype)
        return dq, own[0], own[1], dranks, None, None, None, None, None, None, None
