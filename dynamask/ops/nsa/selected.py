"""NSA's selected branch in flash-linear-attention's kernels, for any ratio of heads.

The kernels work on one query and all the query heads of its group, which their tile wants to be at least 16. A group
with fewer is filled up with zero queries inside the operators below. That changes nothing: which blocks a query reads
is decided before (`dynamask.ops.nsa.blocks`), heads do not meet in the softmax, and a filler's query and incoming
gradient are zero, so that it adds exact zeros to the gradients of key and value. Nothing padded outlives a call.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamask.ops.checks import refuse_transforms

SMALLEST_TILE = 16
"""Query heads that fill the kernels' tile: rows of the smallest product of tensor cores."""
PADDED_ELEMENTS = 1 << 27
"""Numbers in one padded tensor, a few of which exist at a time; a larger batch goes through in parts."""


@cache
def _installed() -> bool:
    """Whether fla is, from 0.6 on, which brought this module and, with it, the functions used below."""
    try:
        return importlib.util.find_spec("fla.ops.utils.csr") is not None
    except ModuleNotFoundError:
        return False


@torch.compiler.assume_constant_result
def _usable() -> bool:
    """Whether fla is installed, and its sums, in an order of chance, are allowed."""
    return _installed() and not torch.are_deterministic_algorithms_enabled()


def kernels_take(query: Tensor, key: Tensor, value: Tensor, block_size: int) -> bool:
    """Whether the kernels run these tensors and compute what the plain path computes.

    Args:
        query: (B, H, Nq, D); key (B, G, N, D); value (B, G, N, Dv).
        block_size: keys per block, a dimension of tiles: a power of two of at least 16.

    Returns:
        Whether all of it holds: a GPU; float16 or bfloat16 (float32 would be multiplied in TF32); as many queries as
        keys; head dimensions of 16 to 256; fla installed and deterministic algorithms not asked for. The ratio of heads
        and the number of selected blocks are free.
    """
    widths = (query.shape[-1], value.shape[-1])
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[2] == key.shape[2]
        and block_size >= 16
        and block_size & (block_size - 1) == 0
        and all(16 <= width <= 256 for width in widths)
        and _usable()
    )


def selected_attention(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, *, block_size: int, scale: float
) -> Tensor:
    """Attend from every query to the keys of its blocks, causally.

    Args:
        query: (B, H, N, D); key (B, G, N, D); value (B, G, N, Dv), what `kernels_take` takes.
        chosen: (B, G, N, S) integers, the blocks of each query, none twice; -1 for no block. Every query must see at
            least one key.
        block_size: keys per block.
        scale: factor on the query-key products.

    Returns:
        (B, H, N, Dv) in the query's dtype. Differentiable once in query, key and value.

    Source: arXiv 2502.11089, equations 11 and 12; fla-core 0.6.0, `fla.ops.nsa.parallel`.
    """
    refuse_transforms(query, key, value)
    return _selected_op(query, key, value, chosen.to(torch.int32), block_size, scale)[0]


@torch.library.custom_op("dynamask::nsa_selected", mutates_args=())
def _selected_op(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (B, H, N)."""
    from fla.ops.nsa.parallel import parallel_nsa_fwd

    groups = key.shape[1]
    outputs, sums = [], []
    for part in _parts(query, groups):
        indices = _indices(chosen[part])
        output, lse = parallel_nsa_fwd(
            q=_padded(query[part], groups),
            k=_by_position(key[part]),
            v=_by_position(value[part]),
            block_indices=indices,
            block_counts=indices.shape[-1],
            block_size=block_size,
            scale=scale,
        )
        outputs.append(_unpadded(output, query.shape[1], groups))
        sums.append(_unpadded(lse.unsqueeze(-1), query.shape[1], groups).squeeze(-1))
    return torch.cat(outputs).contiguous(), torch.cat(sums).contiguous()


@_selected_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dynamask::nsa_selected_backward", mutates_args=())
def _selected_backward_op(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    output: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value."""
    from fla.ops.nsa.parallel import parallel_nsa_bwd

    heads, groups = query.shape[1], key.shape[1]
    gradients = []
    for part in _parts(query, groups):
        indices = _indices(chosen[part])
        dq, dk, dv = parallel_nsa_bwd(
            q=_padded(query[part], groups),
            k=_by_position(key[part]),
            v=_by_position(value[part]),
            o=_padded(output[part], groups),
            # Zero for a filler, as its logits are: its weights are finite, and so times zero nothing.
            lse=_padded(lse[part].unsqueeze(-1), groups).squeeze(-1),
            do=_padded(grad_output[part].to(query.dtype), groups),
            block_indices=indices,
            block_counts=indices.shape[-1],
            block_size=block_size,
            scale=scale,
        )
        gradients.append((_unpadded(dq, heads, groups), dk.transpose(1, 2), dv.transpose(1, 2)))
    dq, dk, dv = (torch.cat(parts).contiguous() for parts in zip(*gradients, strict=True))
    return dq, dk, dv


@_selected_backward_op.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chosen: Tensor,
    output: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, chosen, block_size, scale = inputs
    ctx.save_for_backward(query, key, value, chosen, *output)
    ctx.block_size, ctx.scale = block_size, scale
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_output, _grad_lse):  # type: ignore[no-untyped-def]
    return (*_selected_backward_op(grad_output, *ctx.saved_tensors, ctx.block_size, ctx.scale), None, None, None)


_selected_op.register_autograd(_backward, setup_context=_setup_context)


def _width(heads: int, groups: int) -> int:
    """Query heads per group in the tile: a power of two."""
    return max(SMALLEST_TILE, 1 << (heads // groups - 1).bit_length())


def _parts(query: Tensor, groups: int) -> list[slice]:
    batch, heads, length, dim = query.shape
    rows = max(1, PADDED_ELEMENTS // (length * groups * _width(heads, groups) * dim))
    return [slice(start, start + rows) for start in range(0, batch, rows)]


def _by_position(tensor: Tensor) -> Tensor:
    """(B, G, N, D) -> (B, N, G, D), which is how fla lays out."""
    return tensor.transpose(1, 2).contiguous()


def _padded(tensor: Tensor, groups: int) -> Tensor:
    """(B, H, N, D) -> (B, N, G · width, D), zeros after the heads of each group."""
    heads = tensor.shape[1]
    missing = _width(heads, groups) - heads // groups
    by_group = tensor.transpose(1, 2).unflatten(2, (groups, heads // groups))
    return F.pad(by_group, (0, 0, 0, missing)).flatten(2, 3).contiguous()


def _unpadded(tensor: Tensor, heads: int, groups: int) -> Tensor:
    """The inverse of `_padded`."""
    by_group = tensor.unflatten(2, (groups, -1))[:, :, :, : heads // groups]
    return by_group.flatten(2, 3).transpose(1, 2)


def _indices(chosen: Tensor) -> Tensor:
    """(B, G, N, S) -> (B, N, G, S'), S' a power of two, -1 in what was added."""
    counts = chosen.shape[-1]
    missing = (1 << (counts - 1).bit_length()) - counts
    return F.pad(chosen.transpose(1, 2), (0, missing), value=-1).contiguous()
