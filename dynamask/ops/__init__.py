"""The operators: scores to intervals, attention over intervals, and their kernels.

| folder or file | holds |
| --- | --- |
| `expiry.py` | which queries see which key |
| `bias.py` | scores as biases on logits |
| `interval/` | attention over intervals: interface, definition, CPU path, `torch.library` operators |
| `future_attention.py` | the largest weight that a later query gives each key: what learned ranks predict |
| `triton/` | the GPU kernels, in Triton |
| `hopper/` | the same passes for Hopper GPUs, in Gluon |
| `ragged_decode.py` | a few queries over a ragged cache: one pool of keys, a length per head |
| `context_parallel/` | a sequence split over processes |
| `cache_insert.py`, `cache_contest.py` | a new key into a ragged cache: on tensors, and on the host by a heap |
| `nsa/` | Native Sparse Attention, a rival |
"""

from dynamask.ops.bias import finite_bias
from dynamask.ops.context_parallel import context_parallel, context_parallel_attention, split_sequence
from dynamask.ops.expiry import key_expiry
from dynamask.ops.future_attention import future_attention
from dynamask.ops.interval.api import BACKENDS, attend, dynamic_mask_attention, interval_attention
from dynamask.ops.interval.operators import triton_available

__all__ = [
    "BACKENDS",
    "attend",
    "context_parallel",
    "context_parallel_attention",
    "dynamic_mask_attention",
    "finite_bias",
    "future_attention",
    "interval_attention",
    "key_expiry",
    "split_sequence",
    "triton_available",
]
