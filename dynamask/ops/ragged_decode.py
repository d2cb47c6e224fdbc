"""Attention of a few new queries over a ragged cache: one flat pool of keys, with as many slots per head as it needs.

The slots of key/value head g are the rows `offsets[g]` to `offsets[g + 1]` of the pool. Every query sees every live
slot of its head: which keys a cache holds is decided when they are written.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.ops.interval.api import choose_backend

_BACKENDS = ("auto", "torch", "triton")


def ragged_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    live: Tensor | None,
    offsets: tuple[int, ...],
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from every query to the live slots of its key/value head.

        out[b, h] = softmax_s( scale · query[b, h]·keys[b, s] + bias[b, s] ) values[b, s]
                    over the live s with offsets[g] <= s < offsets[g + 1],  g = h // (H / G)

    Args:
        query: (B, H, Nq, D), float64, float32, bfloat16 or float16. H is a multiple of G.
        keys: (B, S, D), dtype and device of the query: the pool of all heads.
        values: (B, S, Dv), dtype and device of the query.
        live: (B, S) bool, False for a slot that holds no key. None: all of them hold one.
        offsets: G + 1 integers that never fall, from 0 to at most S. A head may have no slots.
        bias: (B, S) float, added to the logits of a slot. None: zero.
        scale: factor on the query-key products, default D**-0.5.
        backend: "torch", "triton" (GPU, or the interpreter) or "auto": triton for CUDA tensors where Triton is
            installed, torch otherwise.

    Returns:
        (B, H, Nq, Dv) in the query's dtype. A query without a live slot, or whose slots are all at bias -inf, gets
        zeros. Whatever dead slots hold, NaN too, changes nothing. The torch backend is differentiable.

    Raises:
        InvalidInputError: shapes, dtypes, devices or offsets that do not fit, or an unknown or unavailable backend.
    """
    offsets = tuple(int(offset) for offset in offsets)
    _check(query, keys, values, live, offsets, bias)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if choose_backend(backend, query, _BACKENDS) == "triton":
        return ragged_decode_op(query, keys, values, live, list(offsets), bias, scale)
    return ragged_decode_reference(query, keys, values, live, offsets, bias, scale)


def ragged_decode_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    live: Tensor | None,
    offsets: tuple[int, ...],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute `ragged_decode` head by head with torch operations, in float32 (float64 for float64 inputs)."""
    batch, heads, num_queries, dim = query.shape
    groups = len(offsets) - 1
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, groups, -1, dim)
    outputs = []
    for group, (start, stop) in enumerate(itertools.pairwise(offsets)):
        value = values[:, start:stop].to(wide)
        logits = torch.matmul(grouped[:, group] * scale, keys[:, start:stop].to(wide).transpose(1, 2))
        if bias is not None:
            logits = logits + bias[:, None, start:stop].to(wide)
        if live is not None:
            here = live[:, start:stop]
            # A product with zero would pass NaN on.
            value = value.masked_fill(~here[:, :, None], 0.0)
            logits = logits.masked_fill(~here[:, None], float("-inf"))
        none = (logits == float("-inf")).all(-1, keepdim=True)
        weights = logits.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0)
        outputs.append(torch.matmul(weights, value))
    output = torch.stack(outputs, 1)
    return output.reshape(batch, heads, num_queries, values.shape[-1]).to(query.dtype)


@torch.library.custom_op("dynamask::ragged_decode", mutates_args=())
def ragged_decode_op(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    live: Tensor | None,
    offsets: list[int],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Run the Triton kernels of `ragged_decode`; no gradient."""
    from dynamask.ops.triton.ragged_decode import ragged_decode_launch

    return ragged_decode_launch(query, keys, values, live, tuple(offsets), bias, scale)


@ragged_decode_op.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    live: Tensor | None,
    offsets: list[int],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    return query.new_empty(*query.shape[:-1], values.shape[-1])


def _check(
    query: Tensor, keys: Tensor, values: Tensor, live: Tensor | None, offsets: tuple[int, ...], bias: Tensor | None
) -> None:
    if query.dim() != 4 or not query.is_floating_point():
        raise InvalidInputError(
            f"query must be a float tensor of shape (batch, heads, queries, head_dim); got {query.dtype} of shape "
            f"{tuple(query.shape)}"
        )
    batch, heads, _, dim = query.shape
    if keys.dim() != 3 or keys.shape[0] != batch or keys.shape[2] != dim:
        raise InvalidInputError(
            f"keys must be one pool of shape (batch={batch}, slots, head_dim={dim}); got {tuple(keys.shape)}"
        )
    slots = keys.shape[1]
    if values.dim() != 3 or values.shape[:2] != keys.shape[:2]:
        raise InvalidInputError(
            f"values must be one pool of shape (batch={batch}, slots={slots}, value_dim); got {tuple(values.shape)}"
        )
    if not query.dtype == keys.dtype == values.dtype:
        raise InvalidInputError(
            f"query, keys and values must share one dtype; got {query.dtype}, {keys.dtype}, {values.dtype}"
        )
    if live is not None and (live.shape != (batch, slots) or live.dtype != torch.bool):
        raise InvalidInputError(
            f"live must be bool of shape {(batch, slots)}; got {live.dtype} of shape {tuple(live.shape)}"
        )
    if bias is not None and (bias.shape != (batch, slots) or not bias.is_floating_point()):
        raise InvalidInputError(
            f"bias must be a float tensor of shape {(batch, slots)}; got {bias.dtype} of shape {tuple(bias.shape)}"
        )
    falls = any(after < before for before, after in itertools.pairwise(offsets))
    if len(offsets) < 2 or offsets[0] < 0 or offsets[-1] > slots or falls:
        raise InvalidInputError(
            f"offsets must be the first slot of each key/value head and the end of the last, from 0 to at most "
            f"{slots} and never falling; got {offsets}"
        )
    groups = len(offsets) - 1
    if heads % groups:
        raise InvalidInputError(
            f"the number of query heads ({heads}) must be a multiple of the number of key/value heads ({groups}), "
            f"which is the number of offsets less one"
        )
    tensors = {"query": query, "keys": keys, "values": values, "live": live, "bias": bias}
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise InvalidInputError(f"all tensors must be on one device; got {devices}")


__all__ = ["ragged_decode", "ragged_decode_reference"]
