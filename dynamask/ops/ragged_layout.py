"""Where the slots of each key/value head lie in a ragged cache: one flat pool, the heads one after the other."""

from __future__ import annotations

import itertools
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor


class RaggedLayout:
    """The slots of every head in a flat pool, and index tensors over them.

    Args:
        sizes: slots of each key/value head; a head may have none.
        device: where the index tensors lie.

    Attributes:
        sizes: the argument.
        offsets: G + 1 integers, the first slot of each head, then the number of slots S.
        widest: slots of the head that has most of them.
        uniform: whether all heads have the same number of slots.
        table: (G + 1,) int32, the offsets on the device.
    """

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.offsets = tuple(itertools.accumulate(sizes, initial=0))
        self.widest = max(sizes, default=0)
        self.uniform = len(set(sizes)) <= 1
        with torch.inference_mode(False):  # shared by layers and calls, whatever mode each is in
            self.table = torch.tensor(self.offsets, dtype=torch.int32, device=device)

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedLayout:
        """Share the layout between copies of a cache: nothing writes to it."""
        return self

    @cached_property
    def first(self) -> Tensor:
        """Return the first slot of each head, (G,) int64."""
        with torch.inference_mode(False):
            return self.table[:-1].long()

    @cached_property
    def room(self) -> Tensor:
        """Return how many slots each head has, (G,) int64."""
        with torch.inference_mode(False):
            return self.table.diff().long()

    @cached_property
    def head(self) -> Tensor:
        """Return the head of each slot, (S,) int64."""
        with torch.inference_mode(False):
            heads = torch.arange(len(self.sizes), device=self.device)
            return heads.repeat_interleave(torch.tensor(self.sizes, device=self.device))

    @cached_property
    def place(self) -> Tensor:
        """Return the number of each slot inside its head, (S,) int64."""
        with torch.inference_mode(False):
            return torch.arange(self.offsets[-1], device=self.device) - self.first[self.head]

    @cached_property
    def padded(self) -> Tensor:
        """Return the slot of each place of each head, (G, widest) int64; slot 0 for places that a head lacks."""
        with torch.inference_mode(False):
            slot = self.first[:, None] + torch.arange(self.widest, device=self.device)
            return torch.where(self.there, slot, 0)

    @cached_property
    def there(self) -> Tensor:
        """Return which places a head has, (G, widest) bool."""
        with torch.inference_mode(False):
            return torch.arange(self.widest, device=self.device) < self.room[:, None]


@lru_cache(maxsize=1024)
def ragged_layout(sizes: tuple[int, ...], device: torch.device) -> RaggedLayout:
    """Return the layout of these heads, made once: layers and calls share it."""
    return RaggedLayout(sizes, device)


__all__ = ["RaggedLayout", "ragged_layout"]
