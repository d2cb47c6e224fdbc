"""Interval attention in Gluon for Hopper GPUs.

| file | holds |
| --- | --- |
| `dispatch.py` | which inputs these kernels take |
| `forward.py` | attention of a block of queries over its list of keys |
| `backward_dq.py` | the gradient to the queries, over the same lists |
| `backward_dkv.py` | the gradients to keys, values and bias: keys walk the queries that see them |
| `producer.py` | the warps that gather rows, shared by the passes |
| `walk_tiles.py` | which keys share a tile of the walk, and where its sums go |
| `redo.py` | tiles that a NaN got into, key by key |
| `row_sums.py` | what the backward passes need of each row of queries |
| `tile_scheduler.py` | how the programs of a walk share its steps |
"""
