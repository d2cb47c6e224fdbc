"""Converted models under the tools around transformers: assisted decoding, offloading, LoRA, quantisation."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from dynamask import InvalidInputError, convert
from dynamask.registration import _add_lora_targets
from tests.conftest import random_ranks, tiny_model


@pytest.fixture
def model(llama: Any) -> Any:
    return random_ranks(convert.upcycle(llama, 12, local=4, sinks=2))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 300, (1, 10)).repeat(1, 3)  # repetitions that prompt lookup finds


GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("length", [6, 30])
def test_prompt_lookup_gives_the_greedy_tokens(model: Any, tokens: torch.Tensor, length: int) -> None:
    model, tokens = model.double(), tokens[:, :length]
    greedy = model.generate(tokens, **GREEDY)
    with pytest.warns(UserWarning, match="a cache of all keys"):
        assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **GREEDY), greedy)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="assisted generation")  # said once
        model.generate(tokens, prompt_lookup_num_tokens=3, **GREEDY)
    with pytest.raises(InvalidInputError, match="takes tokens back"):
        model.generate(tokens, prompt_lookup_num_tokens=3, past_key_values=model._new_cache(), **GREEDY)


@pytest.mark.filterwarnings("ignore:assisted generation")
@pytest.mark.parametrize("padding", [slice(0, 5), slice(8, 11), slice(25, 30)], ids=["left", "hole", "right"])
@pytest.mark.parametrize("form", ["native", "converted"])
def test_prompt_lookup_of_padded_prompts(model: Any, tokens: torch.Tensor, form: str, padding: slice) -> None:
    """On the right, where transformers warns, it counts on from the padding: wrong positions, but equal ones."""
    if form == "native":
        model = tiny_model(windows=12, local=4, sinks=2, vocab_size=300)
    model, mask = model.double(), torch.ones_like(tokens)
    mask[0, padding] = 0
    # No token ends the text: transformers 5.10 looks prompts up only where there is one that does.
    options: dict[str, Any] = {**GREEDY, "attention_mask": mask, "eos_token_id": 10_000}
    greedy = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **options), greedy)


def test_a_converted_assistant_gives_the_greedy_tokens(model: Any, llama: Any, tokens: torch.Tensor) -> None:
    assistant = convert.upcycle(llama, 8, local=4, sinks=2, copy_weights=True).double()
    assistant.config.trained_ranks = True
    model = model.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assisted = model.generate(tokens, assistant_model=assistant, **GREEDY)
    assert torch.equal(assisted, model.generate(tokens, **GREEDY))


@pytest.mark.filterwarnings("ignore")
def test_an_early_exit_drafts_with_fewer_layers(model: Any, tokens: torch.Tensor) -> None:
    model = model.double()
    convert.set_windows(model, [[8, 12], [10, 10]])
    convert.set_slopes(model, [[0.01, 0.02], None])
    calls = [0, 0]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    assisted = model.generate(tokens, assistant_early_exit=1, **GREEDY)
    assert calls[0] > calls[1]
    assert torch.equal(assisted, model.generate(tokens, **GREEDY))
    assert len(model.config.head_windows) == 2


@pytest.mark.filterwarnings("ignore")
def test_offloaded_weights_give_the_same_tokens(model: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model.double().save_pretrained(tmp_path / "model")
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm"), "cpu")
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights", dtype=torch.float64
    )
    assert torch.equal(loaded.generate(tokens, **GREEDY), model.generate(tokens, **GREEDY))


def test_predictors_stay_in_float32_in_a_float16_model(model: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in loaded.model.layers[0].self_attn.rank_predictor.parameters()} == {torch.float32}
    assert loaded.lm_head.weight.dtype == torch.float16
    assert loaded(tokens).logits.isfinite().all()


def test_default_lora_targets_include_the_predictors() -> None:
    constants = ModuleType("constants")
    mapping = {"llama": ["q_proj", "v_proj"], "other": "all"}
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = mapping  # type: ignore[attr-defined]
    _add_lora_targets(constants)
    assert mapping["dynamask_llama"] == ["q_proj", "v_proj", "rank_predictor.up", "rank_predictor.down"]
    assert "dynamask_other" not in mapping
    names = {name for name, _ in tiny_model("dma").named_modules()}
    for target in mapping["dynamask"]:
        assert any(name.endswith(f".{target}") for name in names)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_lora_adapters_of_predictors_get_a_gradient(model: Any, tokens: torch.Tensor, targets: Any) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets)).train()
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    found = {n: p.grad for n, p in adapted.named_parameters() if "rank_predictor" in n and "lora_B" in n}
    assert len(found) == 4
    assert all(grad.abs().max() > 0 for grad in found.values())


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_quantised_it_is_the_dense_model_quantised_alike(
    shape: dict[str, Any], tokens: torch.Tensor, tmp_path: Path, options: dict[str, bool]
) -> None:
    pytest.importorskip("bitsandbytes")
    dense = LlamaForCausalLM(LlamaConfig(**shape | {"initializer_range": 0.02, "hidden_size": 64}))
    model = convert.upcycle(dense, 12, local=4, sinks=2)
    dense.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "converted")
    quantised = [
        AutoModelForCausalLM.from_pretrained(
            tmp_path / name, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
        )
        for name in ("dense", "converted")
    ]
    loaded = quantised[1]
    assert type(loaded.model.layers[0].self_attn.q_proj) is type(quantised[0].model.layers[0].self_attn.q_proj)
    assert type(loaded.model.layers[0].self_attn.q_proj) is not torch.nn.Linear
    predictor = loaded.model.layers[0].self_attn.rank_predictor
    assert {p.dtype for p in predictor.parameters()} == {torch.float32}
    with torch.no_grad():
        expected, given = (each(tokens[:, :12]).logits.float() for each in quantised)  # as long as the windows
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
        given, unquantised = loaded(tokens).logits.float(), model(tokens).logits
    cosine = torch.nn.functional.cosine_similarity(given.flatten(), unquantised.flatten(), dim=0)
    assert cosine > (0.999 if "load_in_8bit" in options else 0.98)
