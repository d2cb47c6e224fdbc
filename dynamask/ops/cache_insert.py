"""Insert a decoded key into a ragged bounded cache, in place: into a free slot, or over the lowest-ranked key.

The lowest-ranked key is that of the contest: of the keys that are neither sinks nor among the newest `local`. With
`local = 0` the new key takes part: it wins ties, and is not stored where all others outrank it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamask.ops.expiry import sortable_scores
from dynamask.ops.ragged_layout import RaggedLayout


def insert_key(
    key: Tensor,
    value: Tensor,
    rank: Tensor | None,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    ranks: Tensor,
    positions: Tensor,
    clock: Tensor,
    layout: RaggedLayout,
    local: int,
    sinks: int,
) -> None:
    """Put one new key per head into the pools, and count it.

    The occupied slots of a head are its first ones. A head whose slots are all occupied is full: its number of slots
    must then be its window. Arguments are not checked.

    Args:
        key, value: (B, G, 1, D) and (B, G, 1, Dv), of the new token; dtypes of the pools.
        rank: (B, G, 1) float, the dtype of `ranks`; None: 0.
        mask: (B, 1) bool, False where the new token is padding, which changes nothing; None: no padding.
        keys, values: (B, S, D) and (B, S, Dv), contiguous. Changed.
        ranks: (B, S) float, contiguous. Changed.
        positions: (B, S) int32, contiguous: the number of real tokens before each key, -1 for an empty slot. Changed.
        clock: (B, G) int64, contiguous: the real tokens seen, the same for all heads of a row. Changed.
        layout: which slots belong to which head.
        local: newest real tokens that are always kept.
        sinks: first real tokens that are always kept.
    """
    if key.is_cuda and ranks.dtype == torch.float32 and _kernels():
        from dynamask.ops.triton import cache_insert

        launch = cache_insert.insert_key_op if torch.compiler.is_compiling() else cache_insert.insert_key_launch
        launch(key, value, rank, mask, keys, values, ranks, positions, clock, layout.table, local, sinks)
    else:
        insert_key_reference(
            key, value, rank, mask, keys, values, ranks, positions, clock, layout, local=local, sinks=sinks
        )


def insert_key_reference(
    key: Tensor,
    value: Tensor,
    rank: Tensor | None,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    ranks: Tensor,
    positions: Tensor,
    clock: Tensor,
    layout: RaggedLayout,
    *,
    local: int,
    sinks: int,
) -> None:
    """Compute `insert_key` with torch operations over all slots at once."""
    batch, groups = clock.shape
    head = layout.head
    if rank is None:
        rank = ranks.new_zeros(batch, groups, 1)
    # A head with free slots takes the first of them.
    free = clock < layout.table.diff()
    some_free = bool(free.any())
    now = clock[:, :1]  # of all heads of a row
    chosen = layout.place == now if some_free else None
    if not (some_free and bool(free.all())):
        contest = (positions >= sinks) & (positions <= now - local)
        if some_free:
            contest &= ~free[:, head]
        score = sortable_scores(ranks)
        if score.dtype == torch.int32:
            # Lowest rank first, then the oldest: one integer says both, positions being below 2^31.
            code = (score.long() << 31) + positions
            lowest = _least_per_head(code, contest, layout, groups)
            loses = contest & (code == lowest[:, head])
            lowest >>= 31
        else:
            lowest = _least_per_head(score, contest, layout, groups)
            tied = contest & (score == lowest[:, head])
            # On equal ranks the later key wins.
            loses = tied & (positions == _least_per_head(positions, tied, layout, groups)[:, head])
        if local == 0:
            loses &= (sortable_scores(rank)[..., 0] >= lowest)[:, head]
        chosen = loses if chosen is None else chosen | loses
    assert chosen is not None
    if mask is not None:
        chosen &= mask
    row, slot = chosen.nonzero(as_tuple=True)
    group = head[slot]
    keys[row, slot], values[row, slot] = key[row, group, 0], value[row, group, 0]
    ranks[row, slot], positions[row, slot] = rank[row, group, 0], clock[row, group].to(positions.dtype)
    clock += 1 if mask is None else mask


def _least_per_head(number: Tensor, counts: Tensor, layout: RaggedLayout, groups: int) -> Tensor:
    """(B, S) integers -> (B, G), the least of each head where `counts`; the dtype's largest where there is none."""
    most = torch.iinfo(number.dtype).max
    number = number.masked_fill(~counts, most)
    if layout.uniform:
        return number.unflatten(1, (groups, -1)).amin(-1)
    least = number.new_full((number.shape[0], groups), most)
    return least.scatter_reduce_(1, layout.head.expand_as(number), number, "amin")


def _kernels() -> bool:
    from dynamask.ops.interval.operators import triton_available

    return triton_available()


__all__ = ["insert_key", "insert_key_reference"]
