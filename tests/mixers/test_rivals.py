"""How the rivals are computed: nothing here changes what they compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dynamask.mixers import SequenceInfo, mha
from dynamask.mixers import nsa as nsa_mixer
from dynamask.models import DynamaskForCausalLM
from dynamask.ops.nsa.blocks import block_layout
from tests.conftest import tiny_config, tiny_model


@pytest.mark.slow
def test_an_nsa_layer_compiles_to_one_graph() -> None:
    mixer = tiny_model("nsa").model.layers[0].mixer
    hidden = torch.randn(2, 30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sequence = SequenceInfo(torch.arange(30).expand(2, 30))
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    results = []
    for function in (mixer, compiled):
        mixer.zero_grad()
        output = function(hidden, sequence)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in mixer.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_blocks_are_laid_out_once_for_all_layers(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("nsa", num_hidden_layers=3)
    calls = []
    monkeypatch.setattr(nsa_mixer, "block_layout", lambda *a: calls.append(a) or block_layout(*a))
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    if packed:
        model(ids, segment_ids=torch.arange(20).expand(2, 20) // 7, use_cache=False)
    else:
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
        calls.clear()
        model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert [call[1] for call in calls] == [20 if packed else 21]


@pytest.mark.parametrize(("key_width", "value_width"), [(24, 16), (16, 24)])
def test_values_of_another_width_may_be_filled_up(key_width: int, value_width: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 9, key_width, dtype=torch.float64).requires_grad_()
    value = torch.randn(2, 3, 9, value_width, dtype=torch.float64).requires_grad_()
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    equal = mha._equal_widths(query, key, value)
    assert {tensor.shape[-1] for tensor in equal} == {24}
    padded = F.scaled_dot_product_attention(*equal, is_causal=True, scale=key_width**-0.5)
    actual = padded[..., :value_width]
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    for got, wanted in zip(
        *(torch.autograd.grad(output, (query, key, value), grad) for output in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_mla_has_equal_widths_unless_told_otherwise() -> None:
    for dim in (8, 64, 128):
        config = tiny_config("mla", head_dim=dim)
        assert config.mla["qk_nope_head_dim"] + config.mla["qk_rope_head_dim"] == config.mla["v_head_dim"] == dim
    DynamaskForCausalLM(tiny_config("mla", mla={"v_head_dim": 12}))
