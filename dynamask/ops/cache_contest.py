"""Which slot of a ragged cache a decoded key takes, kept on the host: a heap per row and key/value head.

On a CPU every operation on tensors costs about as much as all the numbers of a head. The contest of a head therefore
lives in a heap of Python numbers: a token costs one comparison per level of the heap, whatever the window.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from dynamask.ops.ragged_layout import RaggedLayout

_Key = tuple[bool, float, int, int]
"""Rank that is a number, the rank (0 for NaN), position and slot: the lowest loses first."""


class _Head(NamedTuple):
    """The keys of one row and head.

    Attributes:
        newest: those of the newest `local` positions, in order.
        contest: a heap of the others, but the sinks.
    """

    newest: deque[_Key]
    contest: list[_Key]


class CacheContest:
    """The keys that a ragged cache holds, in the order in which they are evicted.

    Args:
        ranks: (B, S) float of the pool.
        positions: (B, S) int32: real tokens before each key, -1 for an empty slot. The contest serves this tensor and
            the ranks beside it as long as nobody but `insert` writes to them.
        clock: (B, G) int64, the real tokens seen.
        layout: which slots belong to which head.
        local: newest real tokens that are always kept.
        sinks: first real tokens that are always kept.
    """

    def __init__(
        self, ranks: Tensor, positions: Tensor, clock: Tensor, layout: RaggedLayout, local: int, sinks: int
    ) -> None:
        self.positions, self.layout, self.local, self.sinks = positions, layout, local, sinks
        self._clock: list[int] = clock[:, 0].tolist()
        self._heads: list[list[_Head]] = []
        for now, row_ranks, row_positions in zip(self._clock, ranks.tolist(), positions.tolist(), strict=True):
            row = []
            for first, stop in zip(layout.offsets[:-1], layout.offsets[1:], strict=True):
                keys = sorted(
                    (position, slot, row_ranks[slot])
                    for slot, position in enumerate(row_positions[first:stop], first)
                    if position >= sinks
                )
                entries = [_entry(rank, position, slot) for position, slot, rank in keys]
                recent = sum(position >= now - local for position, _, _ in keys)
                old = entries[: len(entries) - recent]
                heapq.heapify(old)
                row.append(_Head(deque(entries[len(entries) - recent :]), old))
            self._heads.append(row)

    def insert(
        self,
        key: Tensor,
        value: Tensor,
        rank: Tensor | None,
        mask: Tensor | None,
        keys: Tensor,
        values: Tensor,
        ranks: Tensor,
        positions: Tensor,
        clock: Tensor,
    ) -> None:
        """Do what `dynamask.ops.cache_insert.insert_key` does, with the same arguments."""
        batch, groups = clock.shape
        slots = positions.shape[1]
        new_ranks = [[0.0] * groups] * batch if rank is None else rank[..., 0].tolist()
        real = [True] * batch if mask is None else mask[:, 0].tolist()
        targets: list[int] = []
        sources: list[int] = []
        places: list[int] = []
        for b, now in enumerate(self._clock):
            if not real[b]:
                continue
            self._clock[b] += 1
            for g, (head, new) in enumerate(zip(self._heads[b], new_ranks[b], strict=True)):
                slot = self._slot(head, new, now, self.layout.offsets[g], self.layout.sizes[g])
                if slot is not None:
                    targets.append(b * slots + slot)
                    sources.append(b * groups + g)
                    places.append(now)
        if targets:
            target = torch.tensor(targets)
            new = [key[:, :, 0].flatten(0, 1), value[:, :, 0].flatten(0, 1)]
            if rank is not None:
                new.append(rank.flatten())
            if len(sources) < batch * groups:
                source = torch.tensor(sources)
                new = [tensor[source] for tensor in new]
            keys.view(-1, keys.shape[2]).index_copy_(0, target, new[0])
            values.view(-1, values.shape[2]).index_copy_(0, target, new[1])
            if rank is None:
                ranks.view(-1).index_fill_(0, target, 0.0)
            else:
                ranks.view(-1).index_copy_(0, target, new[2])
            positions.view(-1).index_copy_(0, target, torch.tensor(places, dtype=positions.dtype))
        clock += 1 if mask is None else mask

    def _slot(self, head: _Head, rank: float, now: int, first: int, size: int) -> int | None:
        """The slot that a new key takes; None where all others outrank it."""
        free = now < size
        if self.local == 0:
            if now < self.sinks:
                return first + now if free else None
            if free:
                heapq.heappush(head.contest, _entry(rank, now, first + now))
                return first + now
            if not head.contest or _entry(rank, now, 0) < head.contest[0]:
                return None
            slot = head.contest[0][3]
            heapq.heapreplace(head.contest, _entry(rank, now, slot))
            return slot
        if len(head.newest) == self.local:
            heapq.heappush(head.contest, head.newest.popleft())
        slot = first + now if free else heapq.heappop(head.contest)[3]
        if now >= self.sinks:
            head.newest.append(_entry(rank, now, slot))
        return slot


def _entry(rank: float, position: int, slot: int) -> _Key:
    return (True, rank, position, slot) if rank == rank else (False, 0.0, position, slot)


__all__ = ["CacheContest"]
