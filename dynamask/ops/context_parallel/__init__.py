"""A sequence split over processes: each needs of the others only the live keys at its left boundary.

| file | holds |
| --- | --- |
| `api.py` | the operator |
| `shards.py` | how a sequence is split; the context in which models run on shards |
| `live_keys.py` | the live keys of a stretch, and their merge |
| `exchange.py` | the scan over processes, and its reverse for gradients |
"""

from dynamask.ops.context_parallel.api import context_parallel_attention
from dynamask.ops.context_parallel.shards import (
    ContextShards,
    Traffic,
    context_parallel,
    context_shards,
    current_group,
    split_sequence,
)

__all__ = [
    "ContextShards",
    "Traffic",
    "context_parallel",
    "context_parallel_attention",
    "context_shards",
    "current_group",
    "split_sequence",
]
