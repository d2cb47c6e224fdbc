"""Prompts by a recorded graph give what the model gives: logits, caches, and what is decoded from them."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamask import BoundedCache, DynamaskForCausalLM, InvalidInputError, convert
from dynamask.models import recorded_prompts
from tests.conftest import tiny_config
from tests.convert.test_decode_by_graph import DEVICE, GPU, close, converted, drawn, tensors_of

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: CUDA graphs")


class Graph:
    """Stands in for a CUDA graph on a CPU: a replay runs the prompt again, into the tensors of the recording."""

    def replay(self) -> None:
        prompt, model, forward, kept = self.of  # type: ignore[attr-defined]
        cache = model._new_cache()
        tokens = {"input_ids": prompt._tokens, "past_key_values": cache, "use_cache": True}
        prompt._logits.copy_(forward(**tokens, logits_to_keep=kept).logits)
        for old, new in zip(prompt._cache.layers, cache.layers, strict=True):
            for held, found in zip(tensors_of(old), tensors_of(new), strict=True):
                held.copy_(found)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Count recordings; on a CPU, let their code run."""
    made: list[Any] = []
    start = recorded_prompts._PromptGraph.__init__

    def remember(self: Any, model: Any, forward: Any, tokens: Tensor, kept: int) -> None:
        start(self, model, forward, tokens, kept)
        made.append(self)
        if not GPU:
            self.graph.of = (self, model, forward, kept)

    monkeypatch.setattr(recorded_prompts._PromptGraph, "__init__", remember)
    if not GPU:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(recorded_prompts, "recording", lambda graph: contextlib.nullcontext())
        monkeypatch.setattr(recorded_prompts, "_on_gpu", lambda tensor: True)
    return made


def continued(model: Any, prompt: Tensor, rest: Tensor, **inputs: Any) -> tuple[Tensor, BoundedCache]:
    """Logits of a prompt's last tokens and of further ones, each alone."""
    cache = BoundedCache(model.config)
    parts = [model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=4, **inputs).logits]
    parts += [model(rest[:, t : t + 1], past_key_values=cache).logits for t in range(rest.shape[1])]
    return torch.cat(parts, 1), cache


@torch.no_grad()
def test_prompts_of_a_length_that_comes_again(recorded: list[Any]) -> None:
    model, rest = converted(), drawn(2, 6)
    texts = [drawn(2, 60), drawn(2, 60), drawn(2, 60), drawn(2, 70)]
    expected = [continued(model, text, rest) for text in texts]
    with convert.recorded_prompts(model, shortest=32):
        for index, (text, (logits, cache)) in enumerate(zip(texts, expected, strict=True)):
            inputs = {"attention_mask": torch.ones_like(text)} if index == 1 else {}
            found, other = continued(model, text, rest, **inputs)
            assert len(recorded) == min(index, 1)  # the second call is recorded, a length of its own is not
            close(found, logits)
            for mine, theirs in zip(other.layers, cache.layers, strict=True):
                assert mine.counts() == theirs.counts()
                assert mine.offsets == theirs.offsets
                assert torch.equal(mine.positions, theirs.positions)
                assert (
                    mine.keys.data_ptr() not in {layer.keys.data_ptr() for layer in recorded[0]._cache.layers}
                    if (recorded)
                    else True
                )
    assert "forward" not in model.__dict__


@torch.no_grad()
def test_what_a_recording_does_not_serve(recorded: list[Any]) -> None:
    model, text = converted(), drawn(2, 60)
    padded = torch.ones_like(text)
    padded[1, :5] = 0
    with convert.recorded_prompts(model, shortest=32) as prompts:
        for inputs in (
            {"attention_mask": padded},
            {"use_cache": False},
            {"labels": text},
            {"past_key_values": BoundedCache(model.config, graphs=False)},
            {"position_ids": torch.arange(3, 63, device=DEVICE)[None]},
        ):
            for _ in range(2 if "past_key_values" not in inputs else 1):
                model(text, **inputs)
        assert not recorded
        model(text), model(text)
        assert len(recorded) == 1, prompts.reason
        convert.set_windows(model, [[22, 30], [21, 19]])
        model(text), model(text)
        output = model(text)
        assert len(recorded) == 2  # windows have changed
        assert output.past_key_values.layers[0].windows == (22, 30)
        wrong = BoundedCache(model.config, windows=25)
        with pytest.raises(InvalidInputError, match="was made for windows"):
            model(text, past_key_values=wrong)
        model.model.norm.weight = torch.nn.Parameter(2 * model.model.norm.weight)
        expected = model.__class__.forward(model, text).logits
        for _ in range(3):
            close(model(text).logits, expected)
        assert len(recorded) == 3  # weights have been replaced
        model(text, output_hidden_states=True)  # transformers leaves hooks in the layers
        for _ in range(2):
            close(model(text).logits, expected)
        assert "has hooks" in str(prompts.reason)
    with pytest.raises(InvalidInputError, match="at least 1"):
        convert.recorded_prompts(model, shapes=0)
    with pytest.raises(InvalidInputError, match="shortest must be an integer"):
        convert.recorded_prompts(model, shortest=2.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="Linear"):
        convert.recorded_prompts(torch.nn.Linear(2, 2))


def test_the_recorder_below_another_may_go_first(recorded: list[Any]) -> None:
    model, text = converted(), drawn(1, 40)
    lower = convert.recorded_prompts(model, shortest=32)
    upper = convert.recorded_prompts(model, shortest=32)
    lower.remove()
    assert model.__dict__["forward"] is upper._wrapped
    upper.remove()
    for _ in range(3):
        model(text)
    assert not recorded


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "compiled", "native"])
def test_a_cuda_graph_of_a_prompt(family: str, recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.setattr(importlib.import_module("dynamask.convert.compiled_layers"), "_LONG", 64)
    if family == "native":
        model: Any = DynamaskForCausalLM(tiny_config("dma", hidden_size=64, head_dim=64, windows=64))
        model = model.to(DEVICE, torch.bfloat16).eval()
    else:
        model = converted("llama" if family == "compiled" else family)
    prompts, rest = [drawn(2, 300) % 50 for _ in range(4)], drawn(2, 8) % 50
    for mode in (torch.no_grad, torch.inference_mode):
        made = len(recorded)
        with contextlib.ExitStack() as stack, warnings.catch_warnings(), mode():
            warnings.filterwarnings("error", message="prompts run without")
            if family == "compiled":
                stack.enter_context(convert.compiled_layers(model))
            expected = [continued(model, prompt, rest) for prompt in prompts]
            with convert.recorded_prompts(model, shortest=64):
                for prompt, (logits, cache) in zip(prompts, expected, strict=True):
                    found, other = continued(model, prompt, rest)
                    close(found, logits)
                    for mine, theirs in zip(other.layers, cache.layers, strict=True):
                        assert mine.counts() == theirs.counts()
                        assert (mine.positions != theirs.positions).float().mean() < 0.05
                options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
                generated = model.generate(prompts[0], pad_token_id=0, **options)
                assert generated.shape == (2, 312)
        assert len(recorded) == made + 1
