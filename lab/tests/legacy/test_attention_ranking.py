"""Ranks that learn from attention."""

from __future__ import annotations

import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask_lab.legacy import config_of_0_1
from dynamask_lab.legacy.attention_ranking import attention_loss, learn_ranks
from lab.tests.old_models import tiny_model

B, H, G, N, D = 2, 4, 2, 24, 8


def _inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"query": (B, H, N, D), "key": (B, G, N, D), "bias": (B, G, N), "ranks": (B, G, N)}
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_the_loss_is_the_cross_entropy_row_by_row(power: float) -> None:
    given = _inputs()
    rows, local, scale = torch.tensor([9, 23, 4]), 3, 0.3
    segments = (torch.arange(N) >= 6).long().expand(B, N)
    real = torch.ones(B, N, dtype=torch.bool)
    real[1, 7:9] = False
    facts = {"segment_ids": segments, "key_mask": real}
    actual = attention_loss(**given, rows=rows, local=local, scale=scale, power=power, **facts)  # type: ignore[arg-type]
    total = 0.0
    for b in range(B):
        for g in range(G):
            for i in rows.tolist():
                seen = [j for j in range(i + 1) if segments[b, j] == segments[b, i] and real[b, j]]
                old = [j for j in seen if j <= i - local]
                shares = torch.zeros(N)
                for h in range(g * H // G, (g + 1) * H // G):
                    logits = scale * given["key"][b, g, seen] @ given["query"][b, h, i] + given["bias"][b, g, seen]
                    shares[seen] += logits.softmax(-1).detach() / (H // G)
                if old:
                    total = total - (shares[old] ** power * given["ranks"][b, g, old].log_softmax(-1)).sum()
    torch.testing.assert_close(actual, total / (B * G * len(rows)))  # type: ignore[operator]


def test_only_the_ranks_learn_and_the_output_stays() -> None:
    given = _inputs()
    output = torch.randn(B, H, N, D, requires_grad=True)
    common = {"window": 6, "local": 2, "segment_ids": None, "key_mask": None, "scale": 0.3}
    same = learn_ranks(output, **given, **common)  # type: ignore[arg-type]
    assert torch.equal(same, output)
    (same * 3).sum().backward()
    assert torch.equal(output.grad, torch.full_like(output, 3))  # type: ignore[arg-type]
    assert given["ranks"].grad is not None
    assert given["ranks"].grad.abs().sum() > 0
    assert all(given[name].grad is None for name in ("query", "key", "bias"))


def test_rows_too_short_to_drop_keys_teach_what_longer_ones_should_keep() -> None:
    given = _inputs()
    output = torch.zeros(3, requires_grad=True)
    kept = learn_ranks(output, **given, window=N, local=0, segment_ids=None, key_mask=None, scale=1.0)
    kept.sum().backward()
    assert given["ranks"].grad is not None
    assert given["ranks"].grad[..., : N // 2].abs().min() > 0  # every query of the later half sees these


def test_ranks_come_to_order_keys_by_the_attention_they_get() -> None:
    given = _inputs()
    wanted = torch.tensor([2, 11])
    with torch.no_grad():
        given["query"].zero_()
        given["bias"].zero_()
        given["bias"][..., wanted] = 4.0
        given["ranks"].zero_()
    rows = torch.arange(16, N)
    adam = torch.optim.Adam([given["ranks"]], lr=0.1)
    for _ in range(200):
        attention_loss(**given, rows=rows, local=2, segment_ids=None, key_mask=None, scale=1.0).backward()
        adam.step()
        adam.zero_grad()
    assert torch.equal(given["ranks"][..., :16].topk(2).indices.sort().values, wanted.expand(B, G, 2))


def test_a_training_step_teaches_ranks_in_the_model() -> None:
    model = tiny_model("dma", ranking="attention", recency=0.05).train()
    tokens = torch.randint(model.config.vocab_size, (2, 3 * model.config.windows))
    model(tokens, labels=tokens).loss.backward()
    gate = model.model.layers[0].mixer.gate
    assert gate.delta.weight.grad.abs().sum() > 0
    assert gate.log_rank_recency.grad.abs().sum() > 0


@pytest.mark.parametrize("wrong", [{"recency": 0.0}, {"rank_recency": 0.0}])
def test_ranks_need_a_slope_to_start_from(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="slope of the ranks from a first one"):
        config_of_0_1(ranking="attention", **wrong)
