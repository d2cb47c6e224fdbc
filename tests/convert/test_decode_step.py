"""The written-out decoding step gives what transformers' modules give, token after token."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dynamask import BoundedCache, convert
from dynamask.cache import BoundedLayer
from dynamask.convert import decode_step as module
from dynamask.convert import models as converted_models
from dynamask.models import cuda_graph

GPU = torch.cuda.is_available()
KERNELS = GPU or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
needs_kernels = pytest.mark.skipif(not KERNELS, reason="needs a GPU or TRITON_INTERPRET=1")


def converted(family: str, dtype: torch.dtype = torch.float32, slopes: bool = False, **fields: Any) -> Any:
    config_class, model_class = FAMILIES[family]
    shape = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 256}
    torch.manual_seed(0)
    dense = model_class(config_class(**(shape | fields))).eval()
    for parameter in dense.parameters():
        if parameter.dim() == 1:  # norms and biases start at one and zero
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    sparse = convert.upcycle(dense, 16, local=4, sinks=2).eval()
    for layer in sparse.model.layers:
        torch.nn.init.normal_(layer.self_attn.rank_predictor.down.weight)
        torch.nn.init.normal_(layer.self_attn.rank_predictor.down.bias)
    sparse.config.trained_ranks = True
    convert.set_windows(sparse, [[12, 20], [9, 23]])
    if slopes:
        convert.set_slopes(sparse, [[0.01, 0.0], [0.0, 0.3]])
    return sparse.to(DEVICE, dtype)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step was served; makes a CPU pass for a GPU."""
    served: list[bool] = []

    def noted(*arguments: Any) -> Any:
        logits = module.decode_step(*arguments)
        served.append(logits is not None)
        return logits

    monkeypatch.setattr(converted_models, "decode_step", noted)
    if not GPU:
        monkeypatch.setattr(cuda_graph, "_on_gpu", lambda tensor: True)
        monkeypatch.setattr(cuda_graph, "_capturing", lambda: False)
        monkeypatch.setattr(BoundedLayer, "_on_gpu", lambda self: KERNELS)
    return served


@torch.no_grad()
def decoded(model: Any, tokens: torch.Tensor, first: int, **options: Any) -> tuple[torch.Tensor, BoundedCache]:
    """Logits of every token, `first` at once and the others one by one."""
    cache = BoundedCache(model.config, graphs=False)
    parts = [model(tokens[:, :first], past_key_values=cache, use_cache=True).logits]
    for t in range(first, tokens.shape[1]):
        parts.append(model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True, **options).logits)
    return torch.cat(parts, 1), cache


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "slopes", "fields"),
    [
        ("qwen3", torch.float32, False, {}),
        ("qwen2", torch.float32, True, {}),
        ("llama", torch.float32, False, {"attention_bias": True, "num_attention_heads": 2, "head_dim": 24}),
        ("qwen3", torch.bfloat16, True, {}),
        ("qwen3", torch.float16, True, {}),
    ],
)
@torch.no_grad()
def test_steps_continue_as_the_model_does(
    steps: list[bool], family: str, dtype: torch.dtype, slopes: bool, fields: dict[str, Any]
) -> None:
    model = converted(family, dtype, slopes, **fields)
    tokens = torch.randint(0, 64, (2, 30), device=DEVICE)
    actual, cache = decoded(model, tokens, 18)
    assert steps == [True] * 12
    whole = model(tokens, use_cache=False).logits
    error = (actual.float() - whole.float()).norm(dim=-1) / whole.float().norm(dim=-1)
    if dtype == torch.float32:
        assert error.max().item() < 1e-4
    else:  # a rank near the threshold may fall on its other side
        assert error.median().item() < 2e-2
    for layer, windows in zip(cache.layers, model.config.head_windows, strict=True):
        assert isinstance(layer, BoundedLayer)
        assert layer.keys_held.tolist() == [list(windows)] * 2
        assert layer.get_seq_length() == 30


@needs_kernels
@pytest.mark.slow
@torch.no_grad()
def test_a_prompt_with_padding_continues(steps: list[bool]) -> None:
    model = converted("llama")
    tokens = torch.randint(0, 64, (2, 30), device=DEVICE)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = BoundedCache(model.config, graphs=False)
    found = []
    for start, stop in [(0, 20), *((t, t + 1) for t in range(20, 30))]:
        options = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        found.append(model(tokens[:, start:stop], past_key_values=cache, use_cache=True, **options).logits)
    assert steps == [True] * 10
    alone = model(tokens[1:, 5:], use_cache=False).logits
    torch.testing.assert_close(torch.cat(found, 1)[1:, 5:], alone, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_a_step_leaves_to_the_model(steps: list[bool]) -> None:
    model = converted("llama")
    cache = BoundedCache(model.config, graphs=False)
    tokens = torch.randint(0, 64, (1, 12), device=DEVICE)
    model(tokens, past_key_values=cache, use_cache=True)
    token, place = tokens[:, :1], torch.full((1, 1), 12, device=DEVICE)
    assert module._is_of_a_kind(model)
    plan = module._Plan(model)
    assert plan.stands(model)
    seen: list[int] = []
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert not plan.stands(model)
    assert module.decode_step(model, cache, token, place) is None
    handle.remove()
    assert plan.stands(model)
    kept = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(kept)  # as an adapter would wrap it
    assert not plan.stands(model)
    assert not module._is_of_a_kind(model)
    assert module.decode_step(model, cache, token, place) is None
    model.model.layers[0].mlp.up_proj = kept
    assert module._is_of_a_kind(model)
    kept.weight = torch.nn.Parameter(kept.weight.double())
    assert module.decode_step(model, cache, token, place) is None
    assert cache.get_seq_length() == 12
