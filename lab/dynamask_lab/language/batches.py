"""Batches of a run by step number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.training.sampler import ShuffledBlocks
from dynamask_lab.language.config import LanguageConfig
from dynamask_lab.language.data_parallel import Group


class Batches:
    """Sequences of a stream by step number, in an order that the seed alone decides, epoch after epoch.

    The order is that of `dynamask.training`'s ShuffledBlocks. Neighbouring sequences share one token, the last target
    of one and the first input of the next. Of several processes each takes its part of every batch.
    """

    def __init__(
        self, settings: LanguageConfig, stream: np.ndarray, device: torch.device, group: Group | None = None
    ) -> None:
        self.length = settings.length
        self.size = settings.batch_tokens // settings.length
        self.part = (group or Group()).part(self.size)
        self.count = (len(stream) - 1) // settings.length
        if self.count < 1:
            raise InvalidInputError(f"the training split has {len(stream)} tokens, less than length={settings.length}")
        self.blocks = ShuffledBlocks(self.count, settings.seed)
        self.tokens = torch.from_numpy(np.asarray(stream, dtype=np.int32)).to(device)
        self.offset = torch.arange(settings.length + 1, device=device)
        self._epoch = -1
        self._order: Tensor

    def __call__(self, step: int) -> Tensor:
        """(part of the batch, length + 1) int64."""
        places = range(step * self.size + self.part.start, step * self.size + self.part.stop)
        starts = torch.cat([self._starts(epoch, part) for epoch, part in slices_by_epoch(places, self.count)])
        return self.tokens[starts[:, None] + self.offset].long()

    def _starts(self, epoch: int, part: slice) -> Tensor:
        if epoch != self._epoch:
            self.blocks.epoch = self._epoch = epoch
            self._order = torch.tensor(list(self.blocks), device=self.tokens.device) * self.length
        return self._order[part]


def slices_by_epoch(places: range, count: int) -> list[tuple[int, slice]]:
    """Consecutive places of an endless stream as slices of its epochs of `count`."""
    parts, place = [], places.start
    while place < places.stop:
        epoch, inside = divmod(place, count)
        taken = min(places.stop - place, count - inside)
        parts.append((epoch, slice(inside, inside + taken)))
        place += taken
    return parts
