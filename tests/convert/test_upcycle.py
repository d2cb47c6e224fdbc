"""Converted models compute what the originals do, and survive saving and loading."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from dynamask import BoundedCache, InvalidInputError, convert
from dynamask.convert.models import _doge_layer_unpacks_experts, _first_output

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

DENSE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=12)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen2-mixed": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=10, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SHAPE)),
}


def doge(**extra: object) -> DogeForCausalLM:
    config = DogeConfig(**SHAPE, keep_window_size=8, **extra)
    config._attn_implementation = "eager"
    model = DogeForCausalLM(config).double().eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.A)
        if extra.get("is_moe") and not _doge_layer_unpacks_experts():
            layer.mlp.register_forward_hook(_first_output)  # transformers' own layer cannot run in this release
    return model


def distinct_tokens(rows: int, length: int) -> torch.Tensor:
    """No token twice in a row: equal tokens tie in the first layer, where Doge's top-k is unspecified."""
    return torch.stack([torch.randperm(497)[:length] + 3 for _ in range(rows)])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def test_from_doge_refuses_what_it_cannot_express() -> None:
    with pytest.raises(InvalidInputError, match="sliding_window=4"):
        convert.from_doge(doge(sliding_window=4))
    with pytest.raises(InvalidInputError, match="LlamaForCausalLM"):
        convert.from_doge(DENSE["llama"]())


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_upcycled_is_the_dense_model_while_the_window_covers_the_context(name: str) -> None:
    dense = DENSE[name]().double().eval()
    converted = convert.upcycle(dense, 64)
    tokens = torch.randint(3, 500, (2, 40))
    torch.testing.assert_close(converted(tokens).logits, dense(tokens).logits, atol=1e-6, rtol=1e-6)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    padded, expected = (model(tokens, attention_mask=mask).logits for model in (converted, dense))
    torch.testing.assert_close(padded[0], expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(padded[1, 9:], expected[1, 9:], atol=1e-6, rtol=1e-6)
    position_ids = torch.cat([torch.arange(15), torch.arange(25)])[None].expand(2, -1)
    packed, expected = (m(tokens, position_ids=position_ids, use_cache=False).logits for m in (converted, dense))
    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", DENSE)
@torch.no_grad()
def test_layers_left_dense_are_those_of_the_dense_model(name: str) -> None:
    """With all of them left, the whole model is, at any length, whole, padded and from its own cache."""
    dense = DENSE[name]().double().eval()
    same = convert.upcycle(dense, 4, dense_layers=range(-2, 0))
    tokens, mask = torch.randint(3, 500, (2, 40)), torch.ones(2, 40).long()
    mask[1, :9] = 0
    torch.testing.assert_close(same(tokens).logits, dense(tokens).logits, atol=1e-6, rtol=1e-6)
    padded, expected = (model(tokens, attention_mask=mask).logits for model in (same, dense))
    torch.testing.assert_close(padded[1, 9:], expected[1, 9:], atol=1e-6, rtol=1e-6)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    assert torch.equal(same.generate(tokens, **options), dense.generate(tokens, **options))
    if "sliding" not in name and "mixed" not in name:  # a window of their own makes layers slide, by a gate that ties
        assert not [n for n, _ in same.named_parameters() if ".gate." in n]


@pytest.mark.parametrize("ranking", ["score", "attention"])
def test_some_layers_dense_and_some_ranked_train_save_load_and_decode(ranking: str, tmp_path) -> None:
    dense = DENSE["llama"]().double()
    model = convert.upcycle(dense, 8, local=2, dense_layers=[-1], ranking=ranking)
    tokens = torch.randint(3, 500, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :8]).logits, dense(tokens[:, :8]).logits, atol=1e-6, rtol=1e-6)
    model.train()(tokens, labels=tokens).loss.backward()
    gate = model.model.layers[0].self_attn.gate
    assert model.model.layers[1].self_attn.gate is None
    assert gate.gate.grad.abs().max() > 0
    if ranking == "attention":
        assert gate.delta.weight.grad.abs().max() > 0
    with torch.no_grad():
        nn.init.normal_(gate.gate)
        nn.init.normal_(gate.delta.weight)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
        options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones(2, 12).long()}
        cached = loaded.generate(tokens[:, :12], return_dict_in_generate=True, **options)
        assert torch.equal(cached.sequences, loaded.generate(tokens[:, :12], use_cache=False, **options))
    bounded, dense_layer = cached.past_key_values.layers
    assert (int(bounded.keys_held.max()), dense_layer.keys.shape[2]) == (8, 31)
    with pytest.raises(InvalidInputError, match="layers left dense"):
        BoundedCache(loaded.config)


def test_uneven_windows_train_save_load_and_decode(tmp_path) -> None:
    dense = DENSE["qwen3"]().double()
    model = convert.upcycle(dense, 8, layer_windows="uneven", ranking="attention")
    assert (model.config.layer_windows, model.config.layer_locals) == ([2, 14], [1, 7])
    tokens = torch.randint(3, 500, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :2]).logits, dense(tokens[:, :2]).logits, atol=1e-6, rtol=1e-6)
    model.train()(tokens, labels=tokens).loss.backward()
    assert model.model.layers[1].self_attn.gate.gate.grad.abs().max() > 0
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    cache = BoundedCache(loaded.config)
    with torch.no_grad():
        whole = loaded(tokens, use_cache=False).logits
        loaded(tokens[:, :30], past_key_values=cache, use_cache=True)
        rest = loaded(tokens[:, 30:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 30:])
    assert [int(layer.keys_held.max()) for layer in cache.layers] == [2, 14]
    slid = convert.upcycle(DENSE["mistral-sliding"](), 8, layer_windows=[4, 20])
    assert slid.config.layer_windows == [4, 12]
    with pytest.raises(InvalidInputError, match="each of the 2 layers; got 3"):
        convert.upcycle(dense, 8, layer_windows=[8, 8, 8])


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed"])
def test_upcycled_trains_saves_loads_and_decodes_sparse(name: str, tmp_path) -> None:
    model = convert.upcycle(DENSE[name]().double(), 8, local=2)
    tokens = torch.randint(3, 500, (2, 40))
    model.train()(tokens, labels=tokens).loss.backward()
    gates = {n: p.grad for n, p in model.named_parameters() if n.endswith("gate.gate")}
    assert len(gates) == 2
    assert all(grad.abs().max() > 0 for grad in gates.values())
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.gate.gate)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
        options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones(2, 12).long()}
        cache = BoundedCache(loaded.config)
        cached = loaded.generate(tokens[:, :12], past_key_values=cache, **options)
        assert torch.equal(cached, loaded.generate(tokens[:, :12], use_cache=False, **options))
    assert max(int(layer.keys_held.max()) for layer in cache.layers) == 8


def test_upcycle_names_what_it_takes() -> None:
    with pytest.raises(InvalidInputError, match="LlamaForCausalLM"):
        convert.upcycle(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)), 8)
    with pytest.raises(InvalidInputError, match="window must be an integer of at least 1"):
        convert.upcycle(DENSE["llama"](), 0)
    with pytest.raises(InvalidInputError, match="indices of the 2 layers; got 2"):
        convert.upcycle(DENSE["llama"](), 8, dense_layers=[2])
    with pytest.raises(InvalidInputError, match="ranking must be one of score, attention"):
        convert.upcycle(DENSE["llama"](), 8, ranking="best")


def test_dropout_that_would_be_lost_is_announced() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.1))
    with pytest.warns(UserWarning, match="attention_dropout"):
        convert.upcycle(model, 8)
