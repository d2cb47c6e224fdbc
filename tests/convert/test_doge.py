"""Converted Doge models compute what the original does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

from dynamask import InvalidInputError, convert
from dynamask.convert.doge_attention import doge_layer_unpacks_experts, first_output
from dynamask.inspect import inspect_text

SHAPE = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large weights: attention must matter enough for a wrong mask to show.
    "initializer_range": 0.5,
}

FLOAT32 = 2e-6  # of a logit's spread


def doge(**extra: object) -> DogeForCausalLM:
    config = DogeConfig(**SHAPE, keep_window_size=8, **extra)
    config._attn_implementation = "eager"
    model = DogeForCausalLM(config).double().eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.A)
        if extra.get("is_moe") and not doge_layer_unpacks_experts():
            layer.mlp.register_forward_hook(first_output)  # transformers' own layer cannot run in this release
    return model


def distinct_tokens(rows: int, length: int) -> torch.Tensor:
    """No token twice in a row: equal tokens tie in the first layer, where Doge's top-k is unspecified."""
    return torch.stack([torch.randperm(497)[:length] + 3 for _ in range(rows)])


@pytest.mark.parametrize(
    "extra", [{}, {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}], ids=["dense", "moe"]
)
@torch.no_grad()
def test_from_doge_has_doges_logits(extra: dict) -> None:
    original = doge(**extra)
    converted = convert.from_doge(original)
    tokens = distinct_tokens(2, 40)
    expected = original(tokens).logits
    # transformers normalises and takes the softmax in float32 even in a float64 model.
    torch.testing.assert_close(converted(tokens).logits, expected, atol=FLOAT32 * expected.std().item(), rtol=0)
    # The mask matters at this size: with a window of the whole length the logits are others.
    original.config.keep_window_size = 40
    for layer in original.model.layers:
        layer.self_attn.keep_window_size = 40
    assert (original(tokens).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_from_doge_generates_what_doge_does() -> None:
    original = doge()
    converted = convert.from_doge(original)
    tokens = distinct_tokens(2, 12)
    mask = torch.ones_like(tokens)
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": mask}
    assert torch.equal(original.generate(tokens, **options), converted.generate(tokens, **options))


@torch.no_grad()
def test_from_doge_bias_of_delta_is_kept() -> None:
    original = doge(attention_bias=True)
    for layer in original.model.layers:
        nn.init.normal_(layer.self_attn.dt_proj.bias)
    tokens = distinct_tokens(1, 30)
    expected = original(tokens).logits
    actual = convert.from_doge(original)(tokens).logits
    torch.testing.assert_close(actual, expected, atol=FLOAT32 * expected.std().item(), rtol=0)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_from_doge_refuses_empty_batches(shape: tuple[int, int]) -> None:
    model = convert.from_doge(doge())
    for call in (model, model.model, model.generate):
        with pytest.raises(InvalidInputError, match="at least one row and one token"):
            call(torch.zeros(shape, dtype=torch.long))


@torch.no_grad()
def test_from_doge_refuses_caches_that_slide() -> None:
    model, tokens = convert.from_doge(doge()), torch.randint(3, 60, (1, 20))
    cache = DynamicCache(config=MistralConfig(**SHAPE, sliding_window=6))
    model(tokens[:, :12], past_key_values=cache)
    with pytest.raises(InvalidInputError, match="keeps 6 of 13 keys of layer 0"):
        model(tokens[:, 12:13], past_key_values=cache)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [12] * len(cache.layers)


def test_from_doge_refuses_what_it_cannot_express() -> None:
    with pytest.raises(InvalidInputError, match="sliding_window=4"):
        convert.from_doge(doge(sliding_window=4))
    with pytest.raises(InvalidInputError, match="LlamaForCausalLM"):
        convert.from_doge(LlamaForCausalLM(LlamaConfig(**SHAPE)))


@torch.no_grad()
def test_from_doge_saves_and_loads(tmp_path) -> None:
    converted = convert.from_doge(doge())
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    tokens = distinct_tokens(1, 30)
    torch.testing.assert_close(loaded(tokens).logits, converted(tokens).logits)


@torch.no_grad()
def test_inspection_records_doges_attention() -> None:
    """The weights of the original, over the tokens that were generated, past its window."""
    original = doge()
    found = inspect_text(convert.from_doge(original), distinct_tokens(1, 14), new_tokens=3)
    assert found.not_recorded is None
    assert found.attention is not None
    weights = original(torch.tensor([found.input_ids]), output_attentions=True, use_cache=False).attentions
    expected = torch.stack(weights).mean((0, 2))[0, found.attention.first_query : -1]
    torch.testing.assert_close(found.attention.mean, expected.float(), atol=1e-5, rtol=1e-4)
