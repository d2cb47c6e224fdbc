"""Interval attention: every key is visible to one interval of queries, `j <= i < expiry[j]`.

| file | holds |
| --- | --- |
| `api.py` | the public functions and their checks |
| `reference.py` | the definition, over a materialised mask |
| `blocked.py` | O(N·w) work and memory-lean, plain torch: the CPU path |
| `weighted_sum.py` | sums in which a NaN reaches only the rows that see it |
| `operators.py` | the `torch.library` operators that dispatch to the CPU path or to the kernels |
"""

from dynamask.ops.interval.api import BACKENDS, attend, dynamic_mask_attention, interval_attention

__all__ = ["BACKENDS", "attend", "dynamic_mask_attention", "interval_attention"]
