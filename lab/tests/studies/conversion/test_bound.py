"""What bounds a conversion: effects of keys, and the texts of the levers."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dynamask.ops.future_attention import future_attention
from dynamask_lab.studies.conversion.bound import _choose
from dynamask_lab.studies.conversion.planted import with_spans
from dynamask_lab.studies.conversion.rank_targets import key_effects


def test_effects_are_those_of_leaving_a_key_out() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 4) for heads in (4, 2, 2))
    logits = (query.unflatten(1, (2, 2)) @ key[:, :, None].transpose(-1, -2)) * 0.5
    weight = logits.masked_fill(~torch.ones(12, 12).tril().bool(), -torch.inf).softmax(-1)
    output = (weight @ value[:, :, None]).flatten(1, 2)
    gradient = torch.randn(1, 12, 16)
    layer = SimpleNamespace(query=query, key=key, value=value, output=output, scale=0.5)
    found = key_effects(layer, gradient, local=3, chunk=5)
    expected = future_attention(query, key, local=3, scale=0.5)
    assert torch.allclose(found["max"], expected, atol=1e-6)
    steep = gradient.view(1, 12, 4, 4).transpose(1, 2).unflatten(1, (2, 2))
    wanted = torch.zeros(2)
    for query_at in range(6 + 3, 12):  # leaving key 6 out, to first order in its weight
        change = weight[0, :, :, query_at, 6, None] * (
            value[0, :, None, 6] - output.unflatten(1, (2, 2))[0, :, :, query_at]
        )
        wanted += 0.5 * (change * steep[0, :, :, query_at]).sum((1, 2)).square()
    assert torch.allclose(found["loss"][0, :, 6], wanted, atol=1e-6)


def test_queries_choose_all_keys_where_the_window_holds_them() -> None:
    query, key, value = (torch.randn(heads, 10, 4) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, enable_gqa=True
    )
    assert torch.allclose(_choose(query, key, value, (10, 10), 0.5, chunk=4), expected[0], atol=1e-6)


def test_spans_are_copies_from_before() -> None:
    batch = torch.arange(256).repeat(2, 1)
    made = with_spans(batch, seed=0, step=3, spans=4, length=8)
    changed = made != batch
    assert not changed[:, :128].any()
    assert (changed.sum(1) == 32).all()
    assert (made[changed] < batch[changed] - 7).all()
    assert torch.equal(made, with_spans(batch, seed=0, step=3, spans=4, length=8))
