"""Future attention: the largest attention weight that a later query gives each key.

This is what a learned rank predicts (design section 1). `future_attention_by_definition` materialises every weight
and serves reading and tests; the CPU path walks blocks of queries; the GPU path is
`dynamask.ops.triton.future_attention`.
"""

from __future__ import annotations

import math
import operator
from functools import partial
from typing import SupportsFloat

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.ops.autocast import autocast_dtype, without_autocast
from dynamask.ops.checks import check_key_mask, check_segment_ids, check_tensor
from dynamask.ops.interval.api import choose_backend
from dynamask.ops.positions import segment_bounds

_TILE_ELEMENTS = 1 << 22
"""Logits that the CPU path holds at once: few enough to stay near the caches, enough for whole products."""


def future_attention(
    query: Tensor,
    key: Tensor,
    *,
    local: int = 0,
    first_query: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the largest attention weight that any later query gives each key.

        weight[h, i, j] = softmax_j( scale · query[h, i]·key[g, j] )     over the real keys j <= i of i's segment
        result[g, j]    = max weight[h, i, j]     over i >= max(j + local, first_query) and the heads h of g

    The result of a key without such a query is 0. Nothing is differentiated.

    Args:
        query: (B, H, N, D), float64, float32, bfloat16 or float16. H is a multiple of G; query head h reads key/value
            head h // (H / G). Under autocast query and key take its dtype.
        key: (B, G, N, D), dtype and device of the query.
        local: distance from the key to the first query that counts, at least 0.
        first_query: position of the first query that counts, at least 0.
        segment_ids: (B, N) integers, non-decreasing along N: packed documents. A query sees its own segment only.
        key_mask: (B, N) bool, True for a real token. A padding position gives no weight and gets 0.
        scale: factor on the query-key products, default D**-0.5.
        backend: "reference" (materialises all weights), "torch" (blocks of queries), "triton" (GPU kernels, not for
            float64) or "auto": triton for CUDA tensors where Triton is installed, torch otherwise.

    Returns:
        (B, G, N) float32 in [0, 1]; float64 for float64 inputs. Products are summed in that dtype. Where a counted
        query has a NaN or +inf logit, or -inf logits only, its weights are NaN, and so is the result of each key
        that it sees; a logit of -inf beside finite ones has the weight 0. Values at padding positions have no
        influence, whatever they are.

    Raises:
        InvalidInputError: shapes, dtypes or devices that do not fit, a negative `local` or `first_query`, a scale
            that is not finite, or an unknown or unavailable backend.

    Cost: two matrix products per visible pair on a GPU, one on a CPU; memory O(N) beyond the inputs.

    Source: dynamask's; the target of the learned ranks.
    """
    return future_attention_with_lse(
        query,
        key,
        None,
        local=local,
        first_query=first_query,
        segment_ids=segment_ids,
        key_mask=key_mask,
        scale=scale,
        backend=backend,
    )


def future_attention_with_lse(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    *,
    local: int = 0,
    first_query: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute `future_attention` for a caller that has the log-sum-exp of the logits already.

    Args:
        lse: (B, H, N) float: `logsumexp_j( scale · query[h, i]·key[g, j] )` over what query i sees. It spares the GPU
            path half of its work. None: it is computed. The other backends ignore it.

    The rest as in `future_attention`.
    """
    check_tensor("query", query, "(batch, heads, length, head_dim)")
    check_tensor("key", key, "(batch, num_key_value_heads, length, head_dim)")
    narrow = autocast_dtype(query)
    if narrow is not None:
        compute = partial(
            future_attention_with_lse,
            lse=lse,
            local=local,
            first_query=first_query,
            segment_ids=segment_ids,
            key_mask=key_mask,
            scale=scale,
            backend=backend,
        )
        return without_autocast(compute, query, key, dtype=narrow)
    _check_arguments(query, key, lse, segment_ids, key_mask)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else _finite(scale)
    backend = _choose_backend(backend, query)
    # Larger numbers mean the same, and the kernels count in 32 bits.
    local = min(_position(local, "local"), query.shape[2])
    first_query = min(_position(first_query, "first_query"), query.shape[2])
    query, key = query.detach(), key.detach()
    lse = None if lse is None else lse.detach()
    return future_attention_op(query, key, lse, local, first_query, segment_ids, key_mask, scale, backend)


@torch.library.custom_op("dynamask::future_attention", mutates_args=())
def future_attention_op(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    local: int,
    first_query: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    """Compute `future_attention` after its checks, as an operator: torch.compile calls it whole."""
    if query.numel() == 0 or max(local, first_query) >= query.shape[2]:
        wide = torch.promote_types(query.dtype, torch.float32)
        return torch.zeros(key.shape[:3], dtype=wide, device=query.device)
    if backend == "triton":
        from dynamask.ops.triton.future_attention import future_attention_launch

        return future_attention_launch(query, key, lse, local, first_query, segment_ids, key_mask, scale)
    if backend == "reference":
        return future_attention_by_definition(
            query, key, local=local, first_query=first_query, segment_ids=segment_ids, key_mask=key_mask, scale=scale
        )
    return _blocked(query, key, local, first_query, segment_ids, key_mask, scale)


@future_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    local: int,
    first_query: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    return query.new_empty(key.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


def future_attention_by_definition(
    query: Tensor,
    key: Tensor,
    *,
    local: int = 0,
    first_query: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `future_attention` from the materialised weights: O(N²) memory, for tests.

    Arguments and result are those of `future_attention`; nothing is checked.
    """
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.detach().to(wide).unflatten(1, (groups, heads // groups))
    logits = torch.einsum("bgrid,bgjd->bgrij", grouped, key.detach().to(wide))
    logits = logits * (dim**-0.5 if scale is None else scale)
    position = torch.arange(length, device=query.device)
    i, j = position[:, None], position[None, :]
    same = torch.ones(batch, length, length, dtype=torch.bool, device=query.device)
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
    real = torch.ones(batch, length, dtype=torch.bool, device=query.device) if key_mask is None else key_mask
    seen = (j <= i) & same & real[:, None, :] & real[:, :, None]
    weights = logits.masked_fill(~seen[:, None, None], -math.inf).softmax(-1)
    counted = seen & (i >= j + local) & (i >= first_query)
    weights = torch.where(counted[:, None, None], weights, 0.0)
    return weights.flatten(2, 3).amax(2) if length else weights.new_zeros(batch, groups, 0)


def _blocked(
    query: Tensor,
    key: Tensor,
    local: int,
    first_query: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    rows: int | None = None,
) -> Tensor:
    """Compute the same block of queries by block of queries; `rows` per block, by default as memory allows.

    A block meets the keys from the start of its first query's segment to its own end, so half of a dense product is
    never computed, and its rows are whole: one product gives both the sums and the weights.
    """
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    ratio = heads // groups
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(wide).transpose(-1, -2)
    grouped = query.unflatten(1, (groups, ratio))
    position = torch.arange(length, device=query.device)
    start = None if segment_ids is None else segment_bounds(segment_ids, batch, length, query.device)[0]
    result = torch.zeros(batch, groups, length, dtype=wide, device=query.device)
    if rows is None:
        rows = min(256, max(1, _TILE_ELEMENTS // (batch * heads * length)))
    # A query before `local` is later than no key by that much.
    for begin in range(max(first_query, local), length, rows):
        end = min(begin + rows, length)
        low = 0 if start is None else int(start[:, begin].min())
        block = grouped[:, :, :, begin:end].to(wide).reshape(batch, groups, ratio * (end - begin), dim)
        logits = torch.matmul(block * scale, keys[..., low:end]).view(batch, groups, ratio, end - begin, end - low)
        # Without segments and padding the masks are needed near the diagonal only.
        plain = start is None and key_mask is None
        near, late = (begin, max(begin - local + 1, 0)) if plain else (low, low)
        i, j = position[begin:end, None], position[low:end]
        hidden = (j[near - low :] > i)[None]
        if start is not None:
            hidden = hidden | (j < start[:, begin:end, None])
        if key_mask is not None:
            hidden = hidden | ~key_mask[:, None, low:end]
        logits[..., near - low :].masked_fill_(hidden[:, None, None], -math.inf)
        weights = logits.softmax(-1)
        ignored = (j[late - low :] + local > i)[None]
        if not plain:
            ignored = ignored | hidden
        if key_mask is not None:
            ignored = ignored | ~key_mask[:, begin:end, None]
        weights[..., late - low :].masked_fill_(ignored[:, None, None], 0.0)
        result[:, :, low:end] = torch.maximum(result[:, :, low:end], weights.amax((2, 3)))
    return result


def _choose_backend(backend: str, query: Tensor) -> str:
    backend = choose_backend(backend, query)
    if backend == "triton" and query.dtype == torch.float64:
        raise InvalidInputError(
            "backend='triton' takes float32, bfloat16 or float16 inputs; got float64: use backend='torch'"
        )
    return backend


def _finite(scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, SupportsFloat) or not math.isfinite(float(scale)):
        raise InvalidInputError(f"scale must be a finite number; got {scale!r}")
    return float(scale)


def _position(value: object, name: str) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise InvalidInputError(f"{name} must be an integer of at least 0; got {value!r}")
    return number


def _check_arguments(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise InvalidInputError(
                f"{name} must be a float tensor of shape (batch, heads, length, head_dim); "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    batch, heads, length, dim = query.shape
    groups = key.shape[1]
    if key.shape != (batch, groups, length, dim):
        raise InvalidInputError(
            f"key must be (batch={batch}, num_key_value_heads, length={length}, head_dim={dim}), as the query; "
            f"got {tuple(key.shape)}"
        )
    if dim == 0:
        raise InvalidInputError("head_dim must be at least 1; got 0")
    if groups == 0 or heads == 0 or heads % groups:
        raise InvalidInputError(
            f"the number of query heads ({heads}) must be a positive multiple of the number of key/value heads "
            f"({groups})"
        )
    if query.dtype != key.dtype:
        raise InvalidInputError(f"query and key must share one dtype; got {query.dtype} and {key.dtype}")
    if lse is not None and (lse.shape != (batch, heads, length) or not lse.is_floating_point()):
        raise InvalidInputError(
            f"lse must be a float tensor of shape {(batch, heads, length)}; got {lse.dtype} of shape {tuple(lse.shape)}"
        )
    tensors = {"query": query, "key": key, "lse": lse, "segment_ids": segment_ids, "key_mask": key_mask}
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if len(set(devices.values())) > 1:
        raise InvalidInputError(f"all tensors must be on one device; got {devices}")
    check_segment_ids(segment_ids, batch, length, query.device)
    check_key_mask(key_mask, batch, length, query.device)


__all__ = ["future_attention", "future_attention_by_definition", "future_attention_with_lse"]
