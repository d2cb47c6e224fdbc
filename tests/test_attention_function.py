"""`attn_implementation="dynamask"` on models that are not converted: equal to eager, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

from dynamask import BoundedCache, InvalidInputError
from dynamask.attention_function import _parts, interval_mask

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING: dict[str, Any] = {"sliding_window": 7}
MIXED: dict[str, Any] = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
UNCAPPED: dict[str, Any] = {"attn_logit_softcapping": None, "final_logit_softcapping": None}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", SLIDING),
    "qwen2": ("Qwen2", {**MIXED, "use_sliding_window": True}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {**MIXED, **UNCAPPED}),
    "gemma3": ("Gemma3", MIXED),
    "phi3": ("Phi3", {**SLIDING, "original_max_position_embeddings": 128}),
    "granite": ("Granite", {"attention_multiplier": 0.2}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "gpt-neox": ("GPTNeoX", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
}


def model_of(name: str, implementation: str = "dynamask", **fields: Any) -> Any:
    family, own = MODELS[name]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(hf, config_name)(**SHAPE | own | fields)
    torch.manual_seed(0)
    model = getattr(hf, f"{family}ForCausalLM")._from_config(config, attn_implementation=implementation)
    return model.eval()  # in float32: in float64 transformers' eager mask overflows its float32 softmax


def with_eager(model: Any, run: Any) -> Any:
    """What `run` gives by transformers' own attention."""
    model.set_attn_implementation("eager")
    try:
        return run()
    finally:
        model.set_attn_implementation("dynamask")


def batch(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager(name: str) -> None:
    model = model_of(name)
    assert model.config._attn_implementation == "dynamask"
    tokens = batch()
    mask = torch.ones_like(tokens)
    mask[0, :5], mask[1, -6:] = 0, 0
    positions = torch.tensor([[*range(9), *range(4), *range(11)]]).expand(2, -1)

    def train(**inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        outputs = model(tokens, labels=tokens, use_cache=False, **inputs)
        outputs.loss.backward()
        return outputs.logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for inputs in ({}, {"position_ids": positions}):
        (ours, grads), (eager, eager_grads) = train(**inputs), with_eager(model, lambda x=inputs: train(**x))
        torch.testing.assert_close(ours, eager)
        assert grads
        torch.testing.assert_close(grads, eager_grads, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        padded = model(tokens, attention_mask=mask).logits
        eager = with_eager(model, lambda: model(tokens, attention_mask=mask).logits)
        torch.testing.assert_close(padded[mask == 1], eager[mask == 1])

        whole = with_eager(model, lambda: model(tokens, use_cache=False).logits)
        cache = DynamicCache(config=model.config)
        parts = [
            model(tokens[:, a:b], past_key_values=cache).logits for a, b in ((0, 10), (10, 19), (19, 20), (20, 24))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_generates(name: str) -> None:
    model = model_of(name)
    tokens = batch()
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    eager = with_eager(model, lambda: model.generate(tokens, **options))
    assert torch.equal(model.generate(tokens, **options), eager)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), eager)
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(model.generate(tokens, past_key_values=cache, **options), eager)


def test_a_4d_mask_is_read() -> None:
    model = model_of("llama")
    tokens = batch()
    visible = torch.ones(24, 24, dtype=torch.bool).tril()
    visible[:, 3] = False
    visible[20:, 5] = False
    for mask in (visible.expand(2, 1, -1, -1), visible.expand(2, 4, -1, -1)):
        added = torch.zeros(mask.shape, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
        eager = with_eager(model, lambda m=added: model(tokens, attention_mask=m).logits)
        for form in (mask, added):
            torch.testing.assert_close(model(tokens, attention_mask=form).logits, eager)
    returns = visible.clone()
    returns[15, 5] = False
    with pytest.raises(InvalidInputError, match="shows it to a later one"):
        model(tokens, attention_mask=returns.expand(2, 1, -1, -1))
    with pytest.raises(InvalidInputError, match="see later keys"):
        model(tokens, attention_mask=torch.ones(2, 1, 24, 24, dtype=torch.bool))
    with pytest.raises(InvalidInputError, match="adds numbers to single logits"):
        model(tokens, attention_mask=torch.full((2, 1, 24, 24), -1.0))


def test_masks_of_any_form_that_are_intervals() -> None:
    """Chunks, and what an overlay hides, are found by looking at the mask; what is known by its parts is the same."""
    config = hf.LlamaConfig(**SHAPE, attention_chunk_size=9, attn_implementation="dynamask")
    embeds = torch.zeros(2, 24, 32)
    arguments: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": None, "past_key_values": None}
    position = torch.arange(24)
    chunked = create_chunked_causal_mask(config, **arguments)
    assert torch.equal(chunked.expand(2, 1, 1, 24)[0, 0, 0], ((position // 9 + 1) * 9).clamp(max=24).int())
    hidden = create_causal_mask(config, **arguments, and_mask_function=lambda b, h, q, kv: q < kv + 5)
    assert torch.equal(hidden[1, 0, 0], (position + 5).clamp(max=24).int())
    prefix = {"or_mask_function": lambda b, h, q, kv: kv < 4}
    with pytest.raises(InvalidInputError, match=r"see later keys .*prefix.*attn_implementation='sdpa'"):
        create_causal_mask(config, **arguments, **prefix)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_known_parts_give_what_the_whole_mask_gives(sliding: bool, packed: bool, monkeypatch: Any) -> None:
    from transformers.masking_utils import create_sliding_window_causal_mask

    import dynamask.attention_function as ours

    config = hf.MistralConfig(**SHAPE, **SLIDING, attn_implementation="dynamask")
    positions = torch.tensor([[*range(9), *range(4), *range(11)], [*range(3), *range(21)]]) if packed else None
    padding = None if packed else torch.ones(2, 24).index_fill(1, torch.arange(4), 0)
    make = create_sliding_window_causal_mask if sliding else create_causal_mask
    arguments = (config, torch.zeros(2, 24, 32), padding, None, positions)
    known = make(*arguments)
    monkeypatch.setattr(ours, "_parts", lambda function: iter([("unknown", function)]))
    looked_at = make(*arguments)
    query, key = torch.arange(24)[:, None], torch.arange(24)
    masks = [(key <= query) & (query < expiry.mT) for expiry in (known.expand(2, 1, 1, 24), looked_at)]
    assert torch.equal(*masks)
    monkeypatch.undo()
    assert {kind for kind, _ in _parts(interval_mask)} == {"unknown"}


def test_what_cannot_be_served_is_refused() -> None:
    tokens = batch()
    capped = model_of("gemma2", attn_logit_softcapping=50.0)
    with pytest.raises(InvalidInputError, match=r"Gemma2Attention wants capped attention logits.*'eager'"):
        capped(tokens)
    both = model_of("gemma3", use_bidirectional_attention=True)
    with pytest.raises(InvalidInputError, match=r"not causal|see later keys"):
        both(tokens)
    dropping = model_of("llama", attention_dropout=0.1)
    dropping(tokens)
    with pytest.raises(InvalidInputError, match=r"attention_dropout=0\.0"):
        dropping.train()(tokens)
    model = model_of("llama")
    with pytest.raises(InvalidInputError, match=r"Convert the model first .* or give it a DynamicCache"):
        model.generate(tokens, past_key_values=BoundedCache(windows=8, num_hidden_layers=2), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"paged.dynamask.* is not supported.*paged.sdpa"):
        model.generate_batch([[5, 6, 7]])
    bert = hf.BertModel._from_config(
        hf.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32),
        attn_implementation="dynamask",
    ).eval()
    with pytest.raises(InvalidInputError, match=r"see later keys|not causal|dropout"):
        bert(tokens)


@torch.no_grad()
def test_attention_to_another_sequence_is_refused() -> None:
    config = hf.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        is_decoder=True,
        add_cross_attention=True,
    )
    decoder = hf.BertLMHeadModel._from_config(config, attn_implementation="dynamask").eval()
    # One query at a time looks as if it were causal: it sees all keys up to the first one, and 16 behind it.
    for length in (1, 3):
        with pytest.raises(InvalidInputError, match=r"later keys|another sequence"):
            decoder(
                torch.ones(1, length, dtype=torch.long),
                encoder_hidden_states=torch.randn(1, 17, 32),
                encoder_attention_mask=torch.ones(1, 17, dtype=torch.long),
            )
