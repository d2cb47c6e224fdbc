"""Training texts with copied spans; those with planted facts are the product's (`dynamask.convert.planted_facts`)."""

from __future__ import annotations

import torch
from torch import Tensor


def with_spans(batch: Tensor, seed: int, step: int, spans: int = 32, length: int = 32) -> Tensor:
    """Copy short spans of the text to places far behind them: the first tokens of a copy ask, the rest answer.

    Between plain text, which needs few keys from far back, and a block that repeats its first half, which needs
    them all.

    Args:
        batch: (B, N) token ids.
        seed, step: of the places.
        spans, length: copies in a block, fewer in a short one, and tokens of each.

    Returns:
        (B, N), the second half with copies of spans of the text at least `length` tokens before them.
    """
    made = batch.clone()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    half = batch.shape[1] // 2
    spans = max(1, min(spans, half // (2 * length)))
    room = (batch.shape[1] - half) // spans
    for row in made:
        shift = torch.randint(0, room - length + 1, (spans,), generator=generator)
        for number in range(spans):
            place = half + number * room + int(shift[number])
            source = int(torch.randint(0, place - length, (), generator=generator))
            row[place : place + length] = row[source : source + length].clone()
    return made
