"""Every architecture that the plugin registers, in vLLM's engine, beside transformers. An engine for each: minutes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: lab/scripts/vllm_environment.sh makes an environment")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from dynamask import DynamaskConfig, DynamaskForCausalLM
from dynamask.convert import upcycle
from dynamask.mixers import DynamicMaskGate, RankPredictor

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"sliding_window": 20, "query_pre_attn_scalar": 16}
CONVERTED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 20},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": GEMMA | {"attn_logit_softcapping": None},
    "Gemma3": GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {},
    "Granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
    },
}
NATIVE: dict[str, dict[str, Any]] = {
    "native": {"windows": [[24, 40], [16, 56]]},
    "native-sliding": {"attention": ["swa", "dma"], "windows": 20},
    "native-paper": {"ranking": "paper", "windows": 24},
}


def made(name: str) -> Any:
    """A model of random weights whose ranks choose by content."""
    torch.manual_seed(0)
    if name in NATIVE:
        model: Any = DynamaskForCausalLM(DynamaskConfig(**SHAPE, initializer_range=0.15, **NATIVE[name]))
    else:
        kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
        config = getattr(transformers, kind)(**SHAPE, **CONVERTED[name])
        dense = getattr(transformers, f"{name}ForCausalLM")(config)
        for parameter in dense.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.12)
        # Gemma's embeddings are scaled up and tied: large ones would make it repeat the last token.
        nn.init.normal_(dense.get_input_embeddings().weight, std=0.02)
        model = upcycle(dense, 32, local=8, sinks=2)
        model.config.trained_ranks = True
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, RankPredictor):
            nn.init.normal_(module.down.weight, std=1.0)
        if isinstance(module, DynamicMaskGate):
            nn.init.normal_(module.gate, std=1.0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NATIVE, *CONVERTED])
def test_greedy_continuations_equal_those_of_transformers(
    name: str, tmp_path: Path, make_prompts: Callable[..., list[list[int]]]
) -> None:
    made(name).save_pretrained(tmp_path)
    engine = LLM(
        str(tmp_path),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 26,
        max_num_batched_tokens=64,
        max_num_seqs=8,
    )
    texts = make_prompts([1, 2, 30, 100, 150])
    options = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": text} for text in texts], options, use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for text, output in zip(texts, outputs, strict=True):
        ids = torch.tensor([text])
        expected = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert list(output.outputs[0].token_ids) == expected[0, len(text) :].tolist()
        assert len(text) < 30 or len(set(expected[0, len(text) :].tolist())) > 2
