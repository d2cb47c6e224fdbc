"""Interval attention on a GPU, in Triton.

| file | holds |
| --- | --- |
| `inputs.py` | what every launch takes, in one tuple |
| `lists.py` | which keys a block of queries can see, gathered into one list per block |
| `tables.py` | small tables of integers on the device |
| `forward.py` | attention of a block of queries over its list |
| `backward.py` | gradients over the same lists |
| `backward_walk.py` | the order of a walk over each key's queries, and the walk itself for deterministic mode |
| `future_attention.py` | the largest weight that a later query gives each key |
| `expiry.py` | scores to intervals |
| `decode.py` | a few queries over many keys, split along the keys |
| `ragged_decode.py` | a few queries over a pool of keys with a length per head, split in proportion |
| `predict_ranks.py` | the rank predictor on a few positions |
| `cache_insert.py` | a new key into a full bounded cache |
| `cache_keep.py` | the keys that survive a call, packed into the pools of a bounded cache |
| `decode_step.py` | a token through a decoder layer, but for its attention |

On Hopper GPUs `dynamask.ops.hopper` takes the place of the forward and backward passes.
`TRITON_INTERPRET=1` runs all of it on a CPU, which is how it is tested without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dynamask.ops.hopper.dispatch import hopper
from dynamask.ops.hopper.self_check import check_first_use
from dynamask.ops.triton.backward import backward_kernel_launch, walks
from dynamask.ops.triton.decode import MAX_QUERIES, decode
from dynamask.ops.triton.forward import forward_kernel_launch
from dynamask.ops.triton.inputs import AttentionInputs
from dynamask.ops.triton.lists import KeyLists, block_of, build_lists, rows_of


def is_available() -> bool:
    """Whether the kernels can run: a CUDA device, or Triton's interpreter."""
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def interval_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    scale: float,
    max_live: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the output and the log-sum-exp in two parts; shapes as in `dynamask.ops.interval.blocked.forward`.

    Args:
        max_live: no query sees more keys of a head than this, one number for each of the G heads; empty if unknown,
            which costs one look at the data.
    """
    inputs = AttentionInputs.of(query, key, value, expiry, bias, scale)
    if inputs.num_queries <= MAX_QUERIES:
        return decode(inputs)
    check_first_use("forward", query, value, bias, _small_forward)
    lists = forward_lists(query, value, inputs.expiry, max_live)
    forward_hopper = hopper("forward", query, value)
    launch = forward_kernel_launch if forward_hopper is None else forward_hopper.forward_kernel_launch
    return launch(inputs, lists)


def forward_lists(query: Tensor, value: Tensor, expiry: Tensor, max_live: Sequence[int]) -> KeyLists:
    """The lists that `interval_forward` takes on these inputs, whose kernel decides the queries of a block."""
    forward_hopper = hopper("forward", query, value)
    ratio = query.shape[1] // value.shape[1]
    if forward_hopper is None:
        block = block_of(ratio, rows_of(max(query.shape[3], value.shape[3]), query.element_size()))
    else:
        block = forward_hopper.block_of(ratio)
    return build_lists(expiry, query.shape[2], block, max_live)


def interval_backward(
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
    max_live: Sequence[int],
    deterministic: bool,
    walk_from: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute gradients to query, key, value (their dtypes) and bias (float32).

    Args:
        deterministic: the same bits every time.
        walk_from: as in `backward_kernel_launch`.
    """
    inputs = AttentionInputs.of(query, key, value, expiry, bias, scale)
    if deterministic or walks(query):  # else atomic sums in the portable pass give the gradients
        check_first_use("backward", query, value, bias, _small_backward)
    parts = (top.contiguous(), rest.contiguous())
    return backward_kernel_launch(
        inputs, grad_output.contiguous(), output.contiguous(), parts, max_live, deterministic, walk_from
    )


def _small_forward(
    _gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    """Compute the output of `check_first_use`'s problem."""
    return (interval_forward(query, key, value, expiry, bias, scale, ())[0],)


def _small_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    """Compute the gradients of `check_first_use`'s problem to query, key and value."""
    parts = interval_forward(query, key, value, expiry, bias, scale, ())
    # The problem has fewer queries than the walk is for, and is there to check it.
    return interval_backward(gradient, query, key, value, expiry, bias, *parts, scale, (), False, walk_from=0)[:3]
