"""The live keys of many sequences in blocks of one size, as a serving engine hands them out.

A block holds all that one sequence keeps: keys, values, ranks and positions of every layer, head after head, in as many
slots as the windows ask for. Blocks are recycled without being cleared: which slots of a block are occupied follows
from the number of tokens that its sequence has seen, because the occupied slots of a head are its first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dynamask.cache import BoundedLayer
from dynamask.integers import check_window
from dynamask.ops.expiry import sortable_scores
from dynamask.ops.ragged_decode import ragged_decode, ragged_decode_reference
from dynamask.ops.ragged_layout import RaggedLayout, ragged_layout

_STEP = 64
"""Slots are read in multiples of this number while windows are not full: few index tensors serve all lengths."""


class Pools(NamedTuple):
    """Views of the blocks.

    Attributes:
        keys, values: (blocks, S, D) and (blocks, S, Dv).
        ranks: (blocks, S) float32.
        positions: (blocks, S) int32.
    """

    keys: Tensor
    values: Tensor
    ranks: Tensor
    positions: Tensor

    def slots(self, first: int, last: int) -> Pools:
        """Return views of the slots `first` to `last` of every block."""
        return Pools(*(pool[:, first:last] for pool in self))


class LayerState:
    """What one attention layer does with its slots of the blocks.

    Args:
        windows: keys that each of the G key/value heads keeps.
        local: newest tokens that are always kept.
        sinks: first tokens that are always kept.
        first: the first slot of the layer in a block; it takes `sum(windows)` of them.
        scale: factor on the query-key products.
        bias_is_rank: whether ranks are also added to the logits (the paper's form).

    Raises:
        InvalidInputError: windows, local or sinks that `key_expiry` refuses.
    """

    def __init__(
        self,
        windows: Sequence[int],
        *,
        local: int,
        sinks: int,
        first: int,
        scale: float,
        bias_is_rank: bool = False,
    ) -> None:
        self.windows = check_window(windows, local, sinks, groups=len(windows))
        self.local, self.sinks, self.scale, self.bias_is_rank = local, sinks, scale, bias_is_rank
        self.first, self.last = first, first + sum(self.windows)
        self._narrowest, self._widest = min(self.windows), max(self.windows)

    def extend(
        self, pools: Pools, block: int, seen: int, query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None
    ) -> Tensor:
        """Attend from the next tokens of one sequence, and keep the keys that later tokens may see.

        Args:
            pools: of all layers. The layer's slots of `block` are changed.
            block: of the sequence.
            seen: tokens of the sequence before these.
            query: (H, N, D).
            key, value: (G, N, D) and (G, N, Dv).
            ranks: (G, N) float32, the higher is kept longer. None: keep the newest.

        Returns:
            (H, N, Dv).
        """
        mine = pools.slots(self.first, self.last)
        layer = _BlockLayer(self.windows, local=self.local, sinks=self.sinks)
        if seen:
            layer.load(Pools(*(pool[block, None] for pool in mine)), seen)
        output = layer.attend(
            query[None],
            key[None],
            value[None],
            None if ranks is None else ranks[None],
            bias_is_rank=self.bias_is_rank,
            scale=self.scale,
        )
        layer.store(Pools(*(pool[block] for pool in mine)))
        return output[0]

    def step(
        self,
        pools: Pools,
        blocks: Tensor,
        seen: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ranks: Tensor | None,
        *,
        fewest: int,
        most: int,
    ) -> Tensor:
        """Attend from one token of each of R sequences.

        Args:
            pools: of all layers. The layer's slots of `blocks` are changed.
            blocks: (R,) int64, all different.
            seen: (R,) int64, tokens of each sequence before this one.
            query: (R, H, D).
            key, value: (R, G, D) and (R, G, Dv).
            ranks: (R, G) float32, or None: keep the newest.
            fewest, most: the smallest and the largest number in `seen`.

        Returns:
            (R, H, Dv).
        """
        mine = pools.slots(self.first, self.last)
        whole = ragged_layout(self.windows, query.device)
        self._insert(mine, whole, blocks, seen, key, value, ranks, fewest=fewest, most=most)
        if not query.is_cuda:
            return self._attend_by_head(mine, whole, blocks, seen, query, fewest=fewest, most=most)
        wanted = min(-(-(most + 1) // _STEP) * _STEP, self._widest)
        layout = ragged_layout(tuple(min(window, wanted) for window in self.windows), query.device)
        rows, slots = blocks[:, None], whole.table.long()[layout.head] + layout.place
        keys, values = mine.keys[rows, slots], mine.values[rows, slots]
        bias = _finite(mine.ranks[rows, slots]) if self.bias_is_rank else None
        live = None if fewest + 1 >= self._widest else layout.place <= seen[:, None]
        return ragged_decode(query[:, :, None], keys, values, live, layout.offsets, bias, self.scale)[:, :, 0]

    def _attend_by_head(
        self, mine: Pools, layout: RaggedLayout, blocks: Tensor, seen: Tensor, query: Tensor, *, fewest: int, most: int
    ) -> Tensor:
        """Attend head by head: each reads the slots that any of the sequences occupies, and few need a mask."""
        grouped = query.unflatten(1, (len(self.windows), -1))
        outputs = []
        for group, (start, window) in enumerate(zip(layout.offsets, self.windows, strict=False)):
            size = min(window, most + 1)
            used = mine.slots(start, start + size)
            heads = grouped[:, group, None]
            key, value = used.keys.index_select(0, blocks), used.values.index_select(0, blocks)
            if fewest + 1 >= size and not self.bias_is_rank:
                output = scaled_dot_product_attention(heads, key[:, None], value[:, None], scale=self.scale)
            else:
                live = torch.arange(size, device=query.device) <= seen[:, None]
                bias = _finite(used.ranks.index_select(0, blocks)) if self.bias_is_rank else None
                output = ragged_decode_reference(heads, key, value, live, (0, size), bias, self.scale)
            outputs.append(output[:, 0])
        return torch.cat(outputs, 1)

    def _insert(
        self,
        mine: Pools,
        layout: RaggedLayout,
        blocks: Tensor,
        seen: Tensor,
        key: Tensor,
        value: Tensor,
        ranks: Tensor | None,
        *,
        fewest: int,
        most: int,
    ) -> None:
        """Write the new keys: into a head's first free slot, or over its lowest-ranked key."""
        if ranks is None:
            ranks = torch.zeros(key.shape[:2], dtype=torch.float32, device=key.device)
        new = (key, value, ranks, seen[:, None].expand(key.shape[:2]).to(torch.int32))
        rows, start, now = blocks[:, None], layout.table[:-1].long(), seen[:, None]
        slot = start + now  # of heads that have a free slot
        stored = None
        if most >= self._narrowest:
            lowest, loser = self._lowest(mine, layout, blocks, now)
            full = now >= layout.table.diff()
            if self.local == 0:
                # The new key takes part in the contest, and wins ties.
                stored = ~full | (_code(ranks, torch.full_like(new[3], (1 << 31) - 1)) >= lowest)
            slot = loser if fewest >= self._widest else torch.where(full, loser, slot)
        for pool, fresh in zip(mine, new, strict=True):
            if stored is not None:
                kept = stored if pool.dim() == 2 else stored[..., None]
                fresh = torch.where(kept, fresh.to(pool.dtype), pool[rows, slot])
            pool[rows, slot] = fresh.to(pool.dtype)

    def _lowest(self, mine: Pools, layout: RaggedLayout, blocks: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        """Return what orders the lowest-ranked key of each head, and its slot, (R, G) int64 each.

        Of keys that are neither sinks nor among the newest; on equal ranks the oldest is the lowest. Heads with free
        slots get a slot that is not to be used.
        """
        rows = blocks[:, None, None]
        ranks, positions = (pool[rows, layout.padded] for pool in (mine.ranks, mine.positions))
        contest = layout.there & (positions >= self.sinks) & (positions <= now[..., None] - self.local)
        code = torch.where(contest, _code(ranks, positions), torch.iinfo(torch.int64).max)
        lowest, place = code.min(-1)
        return lowest, layout.table[:-1].long() + place


def _code(ranks: Tensor, positions: Tensor) -> Tensor:
    """Ranks and positions as one integer each, that orders keys: by rank, then by position."""
    return (sortable_scores(ranks).long() << 31) + positions


def _finite(ranks: Tensor) -> Tensor:
    """Ranks as a bias: one that is not finite is not added to a logit."""
    return ranks.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


class _BlockLayer(BoundedLayer):
    """A bounded layer of one sequence that is read from a block and written back to it."""

    def load(self, pools: Pools, seen: int) -> None:
        """Take over what a block holds of a sequence.

        Args:
            pools: (1, S, ...) each, with `windows[g]` slots per head.
            seen: tokens of the sequence so far.
        """
        keys, values, ranks, positions = pools
        groups, device = len(self.windows), keys.device
        layout = ragged_layout(self.windows, device)
        empty = keys.new_empty(1, groups, 0, keys.shape[-1]), values.new_empty(1, groups, 0, values.shape[-1])
        self.lazy_initialization(*empty)
        self.keys, self.values, self.ranks = keys, values, ranks
        self.positions = torch.where(layout.place < seen, positions, -1)
        self.clock = torch.full((1, groups), seen, dtype=torch.int64, device=device)
        self._layout, self._room = layout, 1 << 62  # every window has its slots
        self._count(seen, None)

    def store(self, pools: Pools) -> None:
        """Write what the layer holds into a block, (S, ...) each."""
        target = ragged_layout(self.windows, self.keys.device).table.long()[self._layout.head] + self._layout.place
        for pool, held in zip(pools, (self.keys, self.values, self.ranks, self.positions), strict=True):
            pool[target] = held[0].to(pool.dtype)


__all__ = ["LayerState", "Pools"]
