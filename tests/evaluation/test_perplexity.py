"""Perplexity by position adds up, and counts what it says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dynamask.evaluation import perplexity_by_position
from tests.conftest import tiny_model


class Blocks(torch.utils.data.Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 50, (5, 32), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= len(self):
            raise IndexError
        position = torch.arange(32)
        position[20:] -= 20
        labels = self.ids[index].clone()
        labels[[0, 20]] = -100
        return {"input_ids": self.ids[index], "labels": labels, "position_ids": position}


@torch.no_grad()
def test_is_the_mean_cross_entropy() -> None:
    model, blocks = tiny_model("dma"), Blocks()
    result = perplexity_by_position(model, blocks, batch_size=2)
    batch = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    counted = batch["labels"][:, 1:] != -100
    assert result.loss == pytest.approx(losses[counted].mean().item(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert sum(result.counts) == 5 * 30
    late = (batch["position_ids"][:, 1:] >= 16) & counted
    assert result.losses[-1] == pytest.approx(losses[late].mean().item(), rel=1e-6)
    assert perplexity_by_position(model, blocks, batch_size=2, limit=2).counts != result.counts
