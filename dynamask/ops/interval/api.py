"""The public functions of interval attention, and the checks of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.integers import check_window
from dynamask.ops.autocast import autocast_dtype, without_autocast
from dynamask.ops.bias import finite_bias
from dynamask.ops.checks import Window, check_tensor, needs_reference, refuse_transforms
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
    """Compute attention in which key j is visible exactly to the queries `j <= i < expiry[j]`.

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
            A key with the bias -inf has no weight.
        scale: factor on the query-key products, default D**-0.5.
        backend: "reference" (materialised mask), "torch" (O(N·w), memory-lean), "triton" (GPU kernels) or
            "auto": triton for CUDA tensors where Triton is installed, torch otherwise.

    Returns:
        (B, H, Nq, Dv) in the query's dtype. A query that sees no key, or keys of bias -inf alone, gets zeros and
        zero gradients. A NaN reaches the queries that see it and no others. Empty tensors give an empty result.
        Differentiable in query, key, value and bias (once; the reference backend any number of times). Under
        `torch.func.grad`, `vjp` and `jvp` "auto" takes the reference, and the other backends are refused.

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
    max_live: int | tuple[int, ...] = 0,
) -> Tensor:
    """Compute `interval_attention` for callers who know how many keys a query sees at most.

    Args:
        max_live: that number, one for all key/value heads or one for each of the G, or 0 if unknown. It spares the
            GPU path a look at the data, and must be right: a query that sees more keys would lose some.

    The rest as in `interval_attention`. Under autocast query, key and value take its dtype, as in SDPA.
    """
    narrow = autocast_dtype(query) if isinstance(query, Tensor) else None
    if narrow is not None:
        attend_so = partial(attend, expiry=expiry, bias=bias, scale=scale, backend=backend, max_live=max_live)
        return without_autocast(attend_so, query, key, value, dtype=narrow)
    _check_attention_arguments(query, key, value, expiry, bias)
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)
    automatic, backend = backend == "auto", choose_backend(backend, query)
    if query.shape[0] == 0 or query.shape[2] == 0:
        empty = query.new_zeros(*query.shape[:3], value.shape[3])
        return empty + 0 * (query.sum() + key.sum() + value.sum())  # no number, but autograd finds the inputs
    if automatic and needs_reference(query, key, value, bias):
        backend = "reference"
    if backend == "reference":
        return interval_attention_reference(query, key, value, expiry, bias, scale)
    refuse_transforms(query, key, value, bias)
    limits = _limits(max_live, key.shape[1])
    return interval_attention_op(query, key, value, expiry, bias, scale, backend, limits)[0]


def dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    window: Window,
    *,
    local: int = 0,
    sinks: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute dynamic mask attention: each query keeps the `window` best-scored keys of its prefix.

    The scores rank the keys (`key_expiry`, not differentiated) and are added to the logits of the kept keys,
    which is how they get their gradient. A score that is NaN or infinite ranks its key (NaN lowest), but is not
    added to a logit (`finite_bias`).

    Args:
        query: (B, H, Nq, D); key (B, G, N, D); value (B, G, N, Dv). The queries are the last Nq positions.
        scores: (B, G, N) float, one score per key.
        window: keys each query keeps: an integer, or G integers, one per key/value head.
        local: how many of them are the newest positions.
        sinks: how many of them are the first positions of the segment. local + sinks <= min(window).
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
    check_inputs(query, key, value)
    check_per_key("scores", scores, query, key, value)
    windows = check_window(window, local, sinks, groups=key.shape[1])
    expiry = key_expiry(scores, windows, local=local, sinks=sinks, segment_ids=segment_ids, key_mask=key_mask)
    bias = finite_bias(scores)
    return attend(query, key, value, expiry, bias=bias, scale=scale, backend=backend, max_live=tuple(windows))


def _limits(max_live: int | tuple[int, ...], groups: int) -> list[int]:
    """One number of keys for each key/value head; none if unknown."""
    limits = list(max_live) if isinstance(max_live, (list, tuple)) else [max_live] * groups
    if len(limits) != groups or any(live < 0 for live in limits):
        raise InvalidInputError(
            f"max_live must be one number, or one for each of the {groups} key/value heads, and not negative; got "
            f"{max_live}"
        )
    return limits if all(limits) else []


def choose_backend(backend: str, query: Tensor, known: Sequence[str] = BACKENDS) -> str:
    """Return the backend that a call runs on: `backend` itself, or what "auto" stands for.

    Args:
        backend: as it was given.
        query: its device and dtype are read.
        known: what an operator has.

    Raises:
        InvalidInputError: an unknown backend, or "triton" where it cannot run.
    """
    if backend not in known:
        raise InvalidInputError(f"backend must be one of {', '.join(known)}; got {backend!r}")
    if backend == "auto":
        return "triton" if query.is_cuda and query.dtype != torch.float64 and triton_available() else "torch"
    if backend == "triton" and not triton_available():
        raise InvalidInputError(
            "backend='triton' needs a CUDA device and the triton package (or TRITON_INTERPRET=1 for tests on a "
            "CPU); use backend='torch' here"
        )
    return backend


def _check_attention_arguments(query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, bias: Tensor | None) -> None:
    check_inputs(query, key, value)
    if not query.dtype == key.dtype == value.dtype:
        raise InvalidInputError(
            f"query, key and value must share one dtype; got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    check_per_key("expiry", expiry, query, key, value)
    if bias is not None:
        check_per_key("bias", bias, query, key, value)
    tensors = {"query": query, "key": key, "value": value, "expiry": expiry, "bias": bias}
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise InvalidInputError(f"all tensors must be on one device; got {devices}")


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise `InvalidInputError` unless the shapes of query, key and value fit each other."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, "(batch, heads, length, head_dim)")
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise InvalidInputError(
                f"{name} must be a float tensor of shape (batch, heads, length, head_dim); "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    batch, heads, num_queries, dim = query.shape
    groups, length = key.shape[1:3]
    problem = None
    if key.shape[0] != batch or key.shape[3] != dim:
        problem = f"key must be (batch={batch}, num_key_value_heads, length, head_dim={dim}); got {tuple(key.shape)}"
    elif value.shape[:3] != key.shape[:3]:
        problem = (
            f"value must agree with key in batch, heads and length {tuple(key.shape[:3])}; got {tuple(value.shape)}"
        )
    elif groups == 0 or heads % groups:
        problem = f"the number of query heads ({heads}) must be a multiple of the number of key/value heads ({groups})"
    elif num_queries > length:
        problem = (
            f"there are {num_queries} queries but only {length} keys: the queries are the last positions of the keys"
        )
    if problem is not None:
        raise InvalidInputError(problem + _layout_hint(query, key, value))


def check_per_key(name: str, tensor: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise `InvalidInputError` unless `tensor` holds one number per key: expiry, bias or scores."""
    batch, groups, length = key.shape[:3]
    expected = (batch, groups, length)
    kind = "int32" if name == "expiry" else "a float tensor"
    check_tensor(name, tensor, expected)
    fits = tensor.dtype == torch.int32 if name == "expiry" else tensor.is_floating_point()
    if tensor.shape == expected and fits:
        return
    hint = ""
    if tensor.shape == (batch, query.shape[1], length) and tensor.shape != expected:
        hint = f": one number per key and key/value head ({groups}), not per query head ({query.shape[1]})"
    elif tensor.shape == (batch, length, groups) and tensor.shape != expected:
        # Either this tensor or all of the others have the length before the heads.
        hint = f"; if query, key and value are {_FOREIGN_LAYOUT}: {_TRANSPOSE}; if they are not, transpose {name}"
    raise InvalidInputError(
        f"{name} must be {kind} of shape (batch, num_key_value_heads, length) = {expected}; "
        f"got {tensor.dtype} of shape {tuple(tensor.shape)}{hint}"
    )


_FOREIGN_LAYOUT = "in the layout (batch, length, heads, head_dim) of flash-attention"
_TRANSPOSE = "dynamask takes (batch, heads, length, head_dim), so call .transpose(1, 2) on them"


def _layout_hint(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Name the layout (batch, length, heads, head_dim) where the shapes fit once it is transposed, else nothing."""

    def fit(query_shape: Sequence[int], key_shape: Sequence[int], value_shape: Sequence[int]) -> bool:
        batch, heads, num_queries, dim = query_shape
        key_batch, groups, length, key_dim = key_shape
        return (
            (batch, dim) == (key_batch, key_dim)
            and tuple(value_shape[:3]) == (batch, groups, length)
            and groups > 0
            and heads % groups == 0
            and 0 < num_queries <= length
        )

    def turned(tensor: Tensor) -> tuple[int, ...]:
        batch, second, third, dim = tensor.shape
        return (batch, third, second, dim)

    if fit(turned(query), turned(key), turned(value)):
        return f". query, key and value seem to be {_FOREIGN_LAYOUT}: {_TRANSPOSE}"
    if fit(turned(query), key.shape, value.shape):
        return (
            f". query seems to be {_FOREIGN_LAYOUT}: dynamask takes (batch, heads, length, head_dim), so call "
            "query.transpose(1, 2)"
        )
    return ""
