"""What `inspect_text` finds: the masks of the model itself, and attention weights over them."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamask import InvalidInputError, convert, key_expiry
from dynamask.data import train_tokenizer
from dynamask.inspect import inspect_text, inspection_page, layer_expiry, token_texts
from dynamask.mixers import RankPredictor
from tests.conftest import tiny_model, variant

IDS = torch.arange(40)[None] * 7 % 50


def slow(*names: str) -> list[Any]:
    """Cases for `make test-all`."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def converted(windows: Any, **fields: Any) -> Any:
    """A converted Llama whose ranks choose by content."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": None}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **fields)
    model = convert.upcycle(LlamaForCausalLM(config).eval(), 4, local=2, sinks=1).eval()
    convert.set_windows(model, windows)
    for module in model.modules():
        if isinstance(module, RankPredictor):
            torch.nn.init.normal_(module.down.weight, std=1.0)
    model.config.trained_ranks = True
    return model


@pytest.mark.parametrize(
    "name", ["dma-heads", *slow("dma", "dma-paper", "dma-layers", "dma-dense", "dma-latent", "swa-sinks")]
)
def test_alive_keys_are_those_of_the_bounded_cache(name: str) -> None:
    model = variant(name)
    found = inspect_text(model, IDS)
    with torch.no_grad():
        cache: Any = model(IDS[:, :25], use_cache=True).past_key_values
    alive = found.alive(24)
    for layer, held in zip(alive, cache.layers, strict=True):
        if not hasattr(held, "positions"):
            assert layer[:, :25].all(), "a dense layer keeps every key"
            assert not layer[:, 25:].any()
            continue
        for head, (start, stop) in enumerate(zip(held.offsets[:-1], held.offsets[1:], strict=True)):
            kept = held.positions[0, start:stop]
            assert layer[head].nonzero()[:, 0].tolist() == sorted(kept[kept >= 0].tolist())


@pytest.mark.slow
def test_lifetimes_are_key_expiry_of_the_ranks() -> None:
    model = converted([[4, 9], [12, 3]])
    found = inspect_text(model, IDS)
    for layer, windows in zip(found.layers, model.config.head_windows, strict=True):
        assert (layer.kind, layer.windows, layer.local, layer.sinks) == ("ranked", windows, 2, 1)
        assert layer.ranks is not None
        assert torch.equal(layer.expiry, key_expiry(layer.ranks[None], windows, local=2, sinks=1)[0])
    assert torch.equal(torch.stack([layer.expiry for layer in found.layers]), layer_expiry(model, IDS))


def test_a_text_shorter_than_the_windows_has_all_its_layers() -> None:
    # Such a layer does not call its rank predictor.
    model = converted([[4, 9], [64, 64]])
    assert layer_expiry(model, IDS).shape == (2, 2, 40)
    assert bool((layer_expiry(model, IDS)[1] == 40).all())


@pytest.mark.parametrize("name", ["converted", *slow("dma", "dma-heads-paper", "swa-sinks")])
def test_generated_tokens_are_generate_s_and_their_attention_is_over_live_keys(name: str) -> None:
    model = converted([[4, 9], [12, 3]]) if name == "converted" else variant(name)
    found = inspect_text(model, IDS[:, :20], new_tokens=4)
    real = torch.ones(1, 20, dtype=torch.long)
    plain = model.generate(IDS[:, :20], attention_mask=real, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.input_ids == plain[0].tolist()
    assert found.attention is not None
    assert found.attention.first_query == 19
    assert found.attention.mean.shape == (4, 24)
    torch.testing.assert_close(found.attention.mean.sum(-1), torch.ones(4), atol=1e-5, rtol=0)
    for query in range(4):
        alive = found.alive(19 + query)
        assert not found.attention.mean[query][~alive.flatten(0, 1).any(0)].any()
        dead = ~alive.gather(-1, found.attention.top_keys[query])
        assert not found.attention.top_weights[query][dead].any()


def test_attention_is_that_of_the_dense_model() -> None:
    model = converted(64)
    dense = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "model_type": "llama"}))
    missing = dense.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing == []
    dense.set_attn_implementation("eager")
    function = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    found = inspect_text(model, IDS[:, :20], new_tokens=3)
    assert ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation] is function
    assert found.attention is not None
    with torch.no_grad():
        weights = dense.eval()(torch.tensor([found.input_ids]), output_attentions=True).attentions
    mean = torch.stack([each[0, :, 19:22] for each in weights]).mean((0, 1))
    torch.testing.assert_close(found.attention.mean, mean, atol=1e-5, rtol=0)
    grouped = weights[1][0].unflatten(0, (2, 2)).mean(1)  # two query heads read each key/value head
    top = grouped[:, 20].gather(-1, found.attention.top_keys[1, 1])
    torch.testing.assert_close(found.attention.top_weights[1, 1], top, atol=1e-5, rtol=0)


def test_models_without_lifetimes_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="dynamask convert upcycle"):
        inspect_text(
            LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1)), IDS
        )
    with pytest.raises(InvalidInputError, match="is dense and keeps every key"):
        inspect_text(variant("mha"), IDS)
    with pytest.raises(InvalidInputError, match="nsa"):
        inspect_text(variant("nsa"), IDS)
    with pytest.raises(InvalidInputError, match="input_ids must be"):
        inspect_text(tiny_model(), IDS[:, :0])


def test_the_page_holds_the_numbers() -> None:
    model = converted([[4, 9], [12, 3]])
    found = inspect_text(model, IDS[:, :20], new_tokens=3)
    words = [f"<{i}>" for i in range(22)] + ["</script><!--"]
    page = inspection_page(found, words, "a & b")
    assert "<title>What a &amp; b keeps</title>" in page
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page), "the page must load nothing"
    inner = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    data = json.loads(inner)
    assert data["tokens"] == words
    assert (data["prompt"], data["heads"], data["layers"][1]["windows"]) == (20, 2, [12, 3])

    def unpack(packed: str, dtype: str) -> np.ndarray:
        return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype)

    lifetimes = unpack(data["lifetimes"], "<u2").reshape(2, 2, 23)
    expiry = torch.stack([layer.expiry for layer in found.layers]).numpy()
    assert (lifetimes + np.arange(23) == expiry).all()
    mean = unpack(data["attention"]["mean"], "u1").reshape(3, 23)
    assert found.attention is not None
    assert np.abs((mean / 255) ** 2 - found.attention.mean.numpy()).max() < 0.005
    assert data["attention"]["first"] == 19
    keys = unpack(data["attention"]["keys"], "<u2")
    assert (keys.reshape(found.attention.top_keys.shape) == found.attention.top_keys.numpy()).all()
    levels = unpack(data["ranks"], "u1").reshape(2, 2, 23)
    ranks = torch.stack([layer.ranks for layer in found.layers if layer.ranks is not None]).numpy()
    assert (levels.argmax(-1) == ranks.argmax(-1)).all()
    with pytest.raises(InvalidInputError, match="23 tokens"):
        inspection_page(found, words[:-1], "a")


def test_pieces_join_to_the_text() -> None:
    tokenizer = train_tokenizer(["all work and no play. " * 4], 280)
    text = "all work, 日本語 and\n\n  no 🙂 play"
    pieces = token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_layers_without_queries_per_head_are_named() -> None:
    found = inspect_text(variant("dma-latent"), IDS, new_tokens=3)
    assert found.attention is None
    assert found.not_recorded == "layer 0 (MultiHeadLatentAttention) has no query and key per head to record"
    assert inspect_text(variant("dma-latent"), IDS).not_recorded is None
