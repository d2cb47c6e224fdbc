"""The public functions of interval attention, and the checks of their arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.ops.autocast import autocast_dtype
from dynamask.ops.expiry import key_expiry
from dynamask.ops.interval.operators import interval_attention_op, triton_available
from dynamask.ops.interval.reference import interval_attention_reference

BACKENDS = ("auto", "reference", "torch", "triton")


def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention in which key j is visible exactly to the queries `j <= i < expiry[j]`.

        out[i] = softmax_j( scale · query[i]·key[j] + bias[j] ) value[j]   over the visible j

    Dense causal attention is `expiry = N`, a sliding window `expiry = j + window`, packed documents
    `expiry <= end of the document`, dynamic mask attention `expiry = key_expiry(scores, window)`.

    Args:
        query: (B, H, Nq, D), float64, float32, bfloat16 or float16. The queries are the last Nq of the N
            positions. H is a multiple of G; query head h reads key/value head h // (H / G).
        key: (B, G, N, D), dtype and device of the query.
        value: (B, G, N, Dv), dtype and device of the query.
        expiry: (B, G, N) int32.
        bias: (B, G, N) float, added to the logits of key j for every query, kept in its own dtype. None: zero.
        scale: factor on the query-key products, default D**-0.5.
        backend: "reference" (materialised mask), "torch" (O(N·w), memory-lean), "triton" (GPU kernels) or
            "auto": triton for CUDA tensors where Triton is installed, torch otherwise.

    Returns:
        (B, H, Nq, Dv) in the query's dtype. A query that sees no key gets zeros and zero gradients.
        Differentiable in query, key, value and bias (once; the reference backend any number of times).

    Raises:
        InvalidInputError: shapes, dtypes or devices that do not fit, or an unknown or unavailable backend.

    Source: arXiv 2508.02124, equation (9) with the mask in interval form.
    """
    return attend(query, key, value, expiry, bias=bias, scale=scale, backend=backend)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    max_live: int = 0,
) -> Tensor:
    """`interval_attention` for callers who know how many keys a query sees at most.

    Args:
        max_live: that number, or 0 if unknown. It spares the GPU path a look at the data, and must be right: a
            query that sees more keys would lose some.

    The rest as in `interval_attention`. Under autocast query, key and value take its dtype, as in SDPA.
    """
    narrow = autocast_dtype(query)
    if narrow is not None:
        # Norms with float32 weights leave query and key wider than value. Autocast is off inside: sums stay float32.
        inputs = (query, key, value)
        query, key, value = [t.to(narrow) if t.is_floating_point() and t.dtype != torch.float64 else t for t in inputs]
        with torch.autocast(query.device.type, enabled=False):
            return attend(query, key, value, expiry, bias=bias, scale=scale, backend=backend, max_live=max_live)
    _check_attention_arguments(query, key, value, expiry, bias)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    backend = _choose_backend(backend, query)
    if backend == "reference":
        return interval_attention_reference(query, key, value, expiry, bias, scale)
    return interval_attention_op(query, key, value, expiry, bias, scale, backend, max_live)[0]


def dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    window: int,
    *,
    local: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dynamic mask attention: each query keeps the `window` best-scored keys of its prefix.

    The scores rank the keys (`key_expiry`, not differentiated) and are added to the logits of the kept keys,
    which is how they get their gradient.

    Args:
        query: (B, H, Nq, D); key (B, G, N, D); value (B, G, N, Dv). The queries are the last Nq positions.
        scores: (B, G, N) float, one score per key.
        window: keys each query keeps.
        local: how many of them are the newest positions.
        segment_ids: (B, N) non-decreasing integers of packed documents.
        key_mask: (B, N) bool, True for a real token.
        scale: factor on the query-key products, default D**-0.5.
        backend: as in `interval_attention`.

    Returns:
        (B, H, Nq, Dv) in the query's dtype.

    Raises:
        InvalidInputError: as `key_expiry` and `interval_attention`.

    Source: arXiv 2508.02124, equations (5) to (9).
    """
    expiry = key_expiry(scores.detach(), window, local=local, segment_ids=segment_ids, key_mask=key_mask)
    return attend(query, key, value, expiry, bias=scores, scale=scale, backend=backend, max_live=window)


def _choose_backend(backend: str, query: Tensor) -> str:
    if backend not in BACKENDS:
        raise InvalidInputError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "auto":
        return "triton" if query.is_cuda and query.dtype != torch.float64 and triton_available() else "torch"
    if backend == "triton" and not triton_available():
        raise InvalidInputError(
            "backend='triton' needs a CUDA device and the triton package (or TRITON_INTERPRET=1 for tests on a "
            "CPU); use backend='torch' here"
        )
    return backend


def _check_attention_arguments(query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise InvalidInputError(
                f"{name} must be a float tensor of shape (batch, heads, length, head_dim); "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    batch, heads, num_queries, dim = query.shape
    groups, length = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != dim:
        raise InvalidInputError(
            f"key must be (batch={batch}, num_key_value_heads, length, head_dim={dim}); got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise InvalidInputError(
            f"value must agree with key in batch, heads and length {tuple(key.shape[:3])}; got {tuple(value.shape)}"
        )
    if groups == 0 or heads % groups:
        raise InvalidInputError(
            f"the number of query heads ({heads}) must be a multiple of the number of key/value heads ({groups})"
        )
    if num_queries > length:
        raise InvalidInputError(
            f"there are {num_queries} queries but only {length} keys: the queries are the last positions of the keys"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise InvalidInputError(
            f"query, key and value must share one dtype; got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if expiry.shape != (batch, groups, length) or expiry.dtype != torch.int32:
        raise InvalidInputError(
            f"expiry must be int32 of shape {(batch, groups, length)}; got {expiry.dtype} of shape "
            f"{tuple(expiry.shape)}"
        )
    if bias is not None and (bias.shape != (batch, groups, length) or not bias.is_floating_point()):
        raise InvalidInputError(
            f"bias must be a float tensor of shape {(batch, groups, length)}; got {bias.dtype} of shape "
            f"{tuple(bias.shape)}"
        )
    tensors = {"query": query, "key": key, "value": value, "expiry": expiry, "bias": bias}
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise InvalidInputError(f"all tensors must be on one device; got {devices}")
