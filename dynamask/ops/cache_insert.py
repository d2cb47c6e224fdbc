"""Insert a decoded key into a ragged bounded cache, in place: into a free slot, or over the lowest-ranked key.

The lowest-ranked key is that of the contest: of the keys that are neither sinks nor among the newest `local`. With
`local = 0` the new key takes part: it wins ties, and is not stored where all others outrank it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamask.ops.expiry import sortable_scores
from dynamask.ops.ragged_layout import RaggedLayout

_NOBODY = torch.iinfo(torch.int64).max


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
        launch(key, value, rank, mask, keys, values, ranks, positions, clock, layout.table, layout.widest, local, sinks)
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
    if rank is None:
        rank = ranks.new_zeros(*clock.shape, 1)
    free = clock < layout.room
    slot, arrives = layout.first + clock, mask  # a head with free slots takes the first of them
    if not bool(free.all()):
        now = clock[:, :1]  # of all heads of a row
        contest = (positions >= sinks) & (positions <= now - local)
        loser, lowest = _loser(ranks, positions, contest, layout)
        slot = torch.where(free, slot, loser)
        if local == 0:
            # The new key is in the contest too: it wins ties, and is dead on arrival below all.
            wins = free | (sortable_scores(rank)[..., 0] >= lowest)
            arrives = wins if mask is None else wins & mask
    row = torch.arange(clock.shape[0], device=clock.device)[:, None]
    new = [key[:, :, 0], value[:, :, 0], rank[..., 0], clock.to(positions.dtype)]
    if arrives is not None:
        row, group = arrives.expand_as(clock).nonzero(as_tuple=True)
        slot, new = slot[row, group], [tensor[row, group] for tensor in new]
    for pool, tensor in zip((keys, values, ranks, positions), new, strict=True):
        pool[row, slot] = tensor
    clock += 1 if mask is None else mask


def _loser(ranks: Tensor, positions: Tensor, contest: Tensor, layout: RaggedLayout) -> tuple[Tensor, Tensor]:
    """The slot (B, G) of the lowest-ranked key of each head's contest (B, S), and its sortable score.

    On equal ranks the oldest loses. Where a contest is empty the slot is any, and the score the dtype's largest.
    """
    score = sortable_scores(ranks)
    if score.dtype == torch.int32:
        # One integer says both, positions being below 2^31.
        code = torch.where(contest, (score.long() << 31) + positions, _NOBODY)
        lowest, place = _least(code, layout)
        return layout.first + place, lowest >> 31
    lowest, _ = _least(torch.where(contest, score, _NOBODY), layout)
    tied = contest & (score == lowest[:, layout.head])
    _, place = _least(torch.where(tied, positions.long(), _NOBODY), layout)
    return layout.first + place, lowest


def _least(number: Tensor, layout: RaggedLayout) -> tuple[Tensor, Tensor]:
    """(B, S) integers -> (B, G) the least of each head, and its place in the head."""
    if layout.uniform:
        return number.unflatten(1, (len(layout.sizes), -1)).min(-1)
    found = [part.min(-1) for part in number.split(layout.sizes, 1)]
    return torch.stack([least for least, _ in found], 1), torch.stack([place for _, place in found], 1)


def _kernels() -> bool:
    from dynamask.ops.interval.operators import triton_available

    return triton_available()


__all__ = ["insert_key", "insert_key_reference"]
