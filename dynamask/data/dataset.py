"""Fixed-length blocks of a corpus, for a Trainer: documents packed end to end, attention kept inside each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynamask.data.shards import Corpus
from dynamask.errors import UsageError


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Block i is tokens `i·length` to `(i + 1)·length` of the split's stream.

    Args:
        corpus: a prepared corpus.
        split: "train" or "validation".
        length: tokens per block.

    Items:
        input_ids (length,) int64; labels (length,) int64, -100 at the block's and at a document's first token, which
        nothing before them predicts; shift_labels (length,) int64, the next token of each, -100 where it begins a
        document: labels as transformers' losses shift them, and the token after the block, too; position_ids
        (length,) int64, starting over at each document, which is how the model keeps attention inside it.

    Raises:
        UsageError: the split is shorter than one block.
    """

    def __init__(self, corpus: Corpus, split: str, length: int) -> None:
        self.length = length
        self.shards = corpus.tokens(split)
        self.shard_ends = np.cumsum([len(shard) for shard in self.shards])
        self.starts = np.asarray(corpus.document_starts(split))
        total = int(self.shard_ends[-1]) if self.shards else 0
        self.blocks = max(0, total - 1) // length  # the last token of a block predicts the first of the next
        if self.blocks == 0:
            raise UsageError(
                f"the {split} split has {total} tokens, less than one block of context={length} and the token "
                "after it: give more text, or a shorter context"
            )

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = index * self.length
        following = self._read(first, first + self.length + 1)
        tokens, place = following[:-1], np.arange(first, first + self.length + 1)
        document = np.searchsorted(self.starts, place, side="right") - 1
        targets = np.where(place == self.starts[document], -100, following)
        place, begins = place[:-1], np.maximum(self.starts[document[:-1]], first)
        labels = targets[:-1].copy()
        labels[0] = -100  # nothing in the block predicts it, so no count of predictions may include it
        return {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "shift_labels": torch.from_numpy(targets[1:].copy()),
            "position_ids": torch.from_numpy(place - begins),
        }

    def _read(self, first: int, stop: int) -> np.ndarray:
        parts = []
        while first < stop:
            shard = int(np.searchsorted(self.shard_ends, first, side="right"))
            begin = int(self.shard_ends[shard]) - len(self.shards[shard])
            end = min(stop, int(self.shard_ends[shard]))
            parts.append(np.asarray(self.shards[shard][first - begin : end - begin], dtype=np.int64))
            first = end
        return np.concatenate(parts)
