"""Attention from ranks to output as one operator, for compiled layers.

`key_expiry` and `interval_attention` take windows as integers, which a compiled graph has baked in: every layer, with
windows of its own, would be compiled by itself. This operator takes them as a tensor on the CPU, so that one graph
serves all layers of a model. Nothing in it looks at data on a GPU.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dynamask.ops.autocast import autocast_dtype, without_autocast
from dynamask.ops.checks import refuse_transforms
from dynamask.ops.expiry import run_key_expiry
from dynamask.ops.interval.api import choose_backend
from dynamask.ops.interval.operators import empty_forward, run_backward, run_forward


def ranked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranks: Tensor,
    windows: Tensor,
    *,
    local: int,
    sinks: int,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute attention in which each query keeps the `windows[g]` best-ranked keys of its prefix.

    For layers whose arguments have been checked: it checks none.

    Args:
        query: (B, H, N, D); key (B, G, N, D); value (B, G, N, Dv). Under autocast they take its dtype.
        ranks: (B, G, N) float, not differentiated.
        windows: (G,) int64 on the CPU.
        local, sinks, segment_ids, key_mask: see `dynamask.key_expiry`.
        scale: factor on the query-key products.

    Returns:
        (B, H, N, Dv) in the query's dtype, differentiable in query, key and value, and the expiry (B, G, N) int32.
    """
    narrow = autocast_dtype(query)
    if narrow is not None:
        compute = partial(
            ranked_attention,
            ranks=ranks,
            windows=windows,
            local=local,
            sinks=sinks,
            segment_ids=segment_ids,
            key_mask=key_mask,
            scale=scale,
        )
        return without_autocast(compute, query, key, value, dtype=narrow)
    refuse_transforms(query, key, value)
    backend = choose_backend("auto", query)
    output, _, _, expiry = ranked_attention_op(
        query, key, value, ranks.detach(), windows, local, sinks, segment_ids, key_mask, scale, backend
    )
    return output, expiry


@torch.library.custom_op("dynamask::ranked_attention", mutates_args=())
def ranked_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranks: Tensor,
    windows: Tensor,
    local: int,
    sinks: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the output, the log-sum-exp in two parts, and the expiry."""
    limits = windows.tolist()
    expiry = run_key_expiry(ranks, limits, local, sinks, segment_ids, key_mask)
    output, top, rest = run_forward(query, key, value, expiry, None, scale, backend, limits)
    return output, top, rest, expiry


@ranked_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranks: Tensor,
    windows: Tensor,
    local: int,
    sinks: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_forward(query, value), query.new_empty(key.shape[:-1], dtype=torch.int32)


@torch.library.custom_op("dynamask::ranked_attention_backward", mutates_args=())
def ranked_attention_backward_op(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Tensor,
    output: Tensor,
    top: Tensor,
    rest: Tensor,
    expiry: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients to query, key and value."""
    limits = windows.tolist()
    dq, dk, dv, _ = run_backward(
        grad_output, query, key, value, expiry, None, output, top, rest, scale, backend, limits
    )
    return dq, dk, dv


@ranked_attention_backward_op.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Tensor,
    output: Tensor,
    top: Tensor,
    rest: Tensor,
    expiry: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, _, windows, *_, scale, backend = inputs
    ctx.save_for_backward(query, key, value, windows, *output)
    ctx.scale, ctx.backend = scale, backend
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_output, *_):  # type: ignore[no-untyped-def]
    gradients = ranked_attention_backward_op(grad_output.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.backend)
    return (*gradients, *(None,) * 8)


ranked_attention_op.register_autograd(_backward, setup_context=_setup_context)

__all__ = ["ranked_attention"]
