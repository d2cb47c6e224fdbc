"""The study `recurrent`: forms that differ in one layer, and a mixer that is the recurrence it is written as."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.mixers import MIXERS
from dynamask_lab.language.engine import LanguageConfig, build_model
from dynamask_lab.studies import RECURRENT
from dynamask_lab.studies.recurrent.delta_rule import CHUNK, gated_delta_rule
from dynamask_lab.studies.recurrent.mixer import GDN, recurrent_mixer
from dynamask_lab.studies.recurrent.study import forms, recurrent_name


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """The recurrence as it is written."""
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    read = []
    for place in range(query.shape[2]):
        k, v = key[:, :, place, :, None], value[:, :, place, None, :]
        state = log_decay[:, :, place, None, None].exp() * state
        state = state + beta[:, :, place, None, None] * k @ (v - k.mT @ state)
        read.append((query[:, :, place, None, :] @ state).squeeze(2))
    return torch.stack(read, 2)


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_chunks_are_the_recurrence(chunks: int) -> None:
    torch.manual_seed(chunks)
    length = chunks * CHUNK
    query, key = (torch.randn(2, 3, length, 8, dtype=torch.float64) for _ in range(2))
    value = torch.randn(2, 3, length, 4, dtype=torch.float64)
    log_decay = -torch.rand(2, 3, length, dtype=torch.float64) * torch.tensor([0.01, 0.5, 8.0])[:, None]
    inputs = [query, key / key.norm(dim=-1, keepdim=True), value, log_decay, torch.rand_like(log_decay)]
    inputs = [each.requires_grad_() for each in inputs]
    grads = []
    for rule in (gated_delta_rule, _one_by_one):
        output = rule(*inputs)
        grads.append([output.detach(), *torch.autograd.grad(output.square().sum(), inputs)])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_mixer_is_causal_at_any_length() -> None:
    with recurrent_mixer():
        settings = LanguageConfig.of({**RECURRENT.configs("tiny")[1], "width": 128, "layers": 6})
        torch.manual_seed(0)
        model = build_model(settings, 64).eval()
        tokens = torch.randint(64, (1, 150))
        changed = tokens.clone()
        changed[:, 130:] = 0
        with torch.no_grad():
            first, second = (model(input_ids=each, use_cache=False).logits for each in (tokens, changed))
    torch.testing.assert_close(first[:, :130], second[:, :130])
    assert not torch.equal(first[:, 130:], second[:, 130:])


def test_forms_differ_in_one_layer() -> None:
    configs = RECURRENT.configs("4M")
    assert [recurrent_name(config) for config in configs] == 2 * list(forms())
    for config in configs[1:4]:
        assert config["layer_attention"].count(GDN) == 5
    assert GDN not in MIXERS
    with pytest.raises(InvalidInputError, match="gdn"):
        LanguageConfig.of(configs[0])
