"""Converted models decode by a recorded step: on a GPU by a CUDA graph, here by a list of recorded operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dynamask import BoundedCache, cache_layer, convert
from dynamask.cache import BoundedLayer
from dynamask.convert import models as converted_models
from dynamask.errors import InvalidInputError
from dynamask.models import cuda_graph
from dynamask.ops import cache_insert
from dynamask.ops.ragged_decode import ragged_decode_reference

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
UNEVEN = [[20, 33], [24, 18]]
SLOPES = [[0.05, 0.0], [0.02, 0.1]]

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "equal.default")
"""Operations that look at the data from the host, or bring data from it: no stream that is captured allows them."""


def converted(family: str = "llama", windows: Any = UNEVEN, **fields: Any) -> Any:
    torch.manual_seed(0)
    kinds: dict[str, Any] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "phi3": (Phi3Config, Phi3ForCausalLM),
    }
    config, model = kinds[family]
    fields = ({"pad_token_id": 0} if family == "phi3" else {"head_dim": 16}) | fields
    dense = model(config(**SHAPE, **fields)).eval()
    sparse: Any = convert.upcycle(dense, 16, local=6, sinks=2).eval()
    convert.set_windows(sparse, windows)
    convert.set_slopes(sparse, SLOPES)
    for layer in sparse.model.layers:
        torch.nn.init.normal_(layer.self_attn.rank_predictor.down.weight)
    sparse.config.trained_ranks = True
    return sparse.to(DEVICE, torch.bfloat16 if GPU else torch.float32)


class Recorder(TorchDispatchMode):
    """Keeps the operations of a step with their tensors; refuses those that a CUDA graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.launching:
            assert not any(name in str(func) for name in WAITS), f"{func} in a step that is to be captured"
            returns = func._schema.returns
            if not returns or any(each.alias_info is None or each.alias_info.is_write for each in returns):
                self.steps.append((func, args, kwargs or {}, result))
        return result

    def launch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make a kernel's launch one recorded step."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.launching = True
            try:
                result = function(*args, **kwargs)
            finally:
                self.launching = False
            self.steps.append((function, args, kwargs, result))
            return result

        return recorded

    def replay(self) -> None:
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Let the code for CUDA graphs run on a CPU, with kernels' definitions; gives what has been recorded."""
    if GPU:
        pytest.skip("on a GPU the real graphs are tested")
    made: list[Recorder] = []
    current: list[Recorder] = []
    caches: list[BoundedCache] = []

    class Graph:
        def replay(self) -> None:
            self.recorder.replay()  # type: ignore[attr-defined]

    class Capture:
        """Runs what a capture would not run, so what it has changed is put back."""

        def __init__(self, graph: Any, **options: Any) -> None:
            graph.recorder = self.recorder = Recorder()

        def __enter__(self) -> None:
            self.held = [(t, t.clone()) for layer in caches[-1].layers for t in tensors_of(layer)]
            current.append(self.recorder)
            self.recorder.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.recorder.__exit__(*error)
            current.pop()
            for tensor, before in self.held:
                tensor.copy_(before)
            if error[0] is None:
                made.append(self.recorder)

    def launching(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a, **k: current[-1].launch(function)(*a, **k) if current else function(*a, **k)

    def insert(*arguments: Any) -> None:
        cache_insert.insert_key_reference(*arguments[:-2], local=arguments[-2], sinks=arguments[-1])  # type: ignore[misc]

    def decode(self: BoundedLayer, query: Tensor, live: Any, bias: Any, scale: float) -> Tensor:
        return ragged_decode_reference(query, self.keys, self.values, live, self.offsets, bias, scale)

    start = cuda_graph.StepGraph.__init__

    def remember(self: Any, model: Any, cache: Any, *rest: Any) -> None:
        caches.append(cache)
        start(self, model, cache, *rest)

    monkeypatch.setattr(cuda_graph.StepGraph, "__init__", remember)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(cuda_graph, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(converted_models, "decode_step", None)  # its kernels are no operations that are recorded
    monkeypatch.setattr(cuda_graph, "_capturing", lambda: bool(current))
    monkeypatch.setattr(BoundedLayer, "_on_gpu", lambda self: True)
    # The kernels are tested by themselves; here each is one step, computed by its definition.
    monkeypatch.setattr(cache_layer, "insert_key", launching(insert))
    monkeypatch.setattr(BoundedLayer, "_decode", launching(decode))
    return made


def tensors_of(layer: Any) -> list[Tensor]:
    return [layer.keys, layer.values, layer.ranks, layer.positions, layer.clock]


@torch.no_grad()
def logits_of(
    model: Any, tokens: Tensor, graphs: bool, mask: Tensor | None = None, positions: Tensor | None = None
) -> tuple[Tensor, BoundedCache]:
    """Logits of every token, 40 at once and the others one by one, and the cache."""
    cache = BoundedCache(model.config, graphs=graphs)
    parts = []
    for start, stop in [(0, 40), *((t, t + 1) for t in range(40, tokens.shape[1]))]:
        seen = None if mask is None else mask[:, :stop]
        at = None if positions is None else positions[:, start:stop]
        outputs = model(
            tokens[:, start:stop], attention_mask=seen, position_ids=at, past_key_values=cache, use_cache=True
        )
        parts.append(outputs.logits)
    assert cache.get_seq_length() == tokens.shape[1]
    return torch.cat(parts, 1), cache


def drawn(batch: int, length: int) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def close(actual: Tensor, expected: Tensor) -> None:
    if GPU:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_a_recorded_step_continues_as_the_model_does(recordings: list[Recorder], family: str) -> None:
    model, tokens = converted(family), drawn(2, 52)
    expected, eager = logits_of(model, tokens, graphs=False)
    actual, cache = logits_of(model, tokens, graphs=True)
    assert len(recordings) == 1
    assert len(recordings[0].steps) > 20
    close(actual, expected)
    for layer, other in zip(cache.layers, eager.layers, strict=True):
        assert isinstance(layer, BoundedLayer)
        assert isinstance(other, BoundedLayer)
        assert layer.counts() == other.counts()
        assert torch.equal(layer.clock, other.clock)
    with torch.no_grad():
        close(actual, model(tokens, use_cache=False).logits)


@pytest.mark.slow
def test_a_left_padded_batch(recordings: list[Recorder]) -> None:
    model, tokens = converted(), drawn(2, 48)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected, _ = logits_of(model, tokens, False, mask, positions)
    actual, _ = logits_of(model, tokens, True, mask, positions)
    assert recordings
    close(actual[:, 7:], expected[:, 7:])
    # Without positions the model counts padding, and slopes do not: no recorded step does both.
    recordings.clear()
    expected, _ = logits_of(model, tokens, False, mask)
    actual, _ = logits_of(model, tokens, True, mask)
    assert not recordings
    close(actual[:, 7:], expected[:, 7:])


def test_arguments_that_a_recorded_step_does_not_serve(recordings: list[Recorder]) -> None:
    model, tokens = converted(), drawn(1, 52)
    _, cache = logits_of(model, tokens, graphs=True)
    assert recordings
    with torch.no_grad():
        states = model(tokens[:, :1], past_key_values=cache, use_cache=True, output_hidden_states=True)
        assert len(states.hidden_states) == 3
        as_tuple = model(tokens[:, :1], past_key_values=cache, use_cache=True, return_dict=False)
        assert isinstance(as_tuple, tuple)
        hooked = []
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: hooked.append(1))
        model(tokens[:, :1], past_key_values=cache, use_cache=True)
        handle.remove()
        assert hooked, "a replay would not have called the hook"
        convert.set_slopes(model, None)
        with pytest.raises(InvalidInputError, match="slopes were changed"):
            model(tokens[:, :1], past_key_values=cache, use_cache=True)


def test_a_step_that_cannot_be_recorded_runs_by_itself(recordings: list[Recorder]) -> None:
    model, tokens = converted(), drawn(1, 50)
    expected, _ = logits_of(model, tokens, graphs=False)
    plain = model.lm_head.forward

    def waits(hidden: Tensor) -> Tensor:
        if cuda_graph._capturing():
            raise RuntimeError("operation not permitted when stream is capturing")
        return plain(hidden)  # type: ignore[no-any-return]

    model.lm_head.forward = waits
    with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted"):
        actual, cache = logits_of(model, tokens, graphs=True)
    assert not recordings
    assert not cache.graphs
    close(actual, expected)


def test_reasons() -> None:
    assert cuda_graph.reason_against(converted()) is None
    grows = converted("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert "dynamic" in str(cuda_graph.reason_against(grows))
    model = converted()
    model.model.layers[1].register_forward_hook(lambda *_: None)
    assert "hooks" in str(cuda_graph.reason_against(model))


@pytest.mark.slow
def test_generate_by_recorded_steps(recordings: list[Recorder]) -> None:
    model, prompt = converted(), drawn(2, 40)
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, past_key_values=BoundedCache(model.config, graphs=False), **options)
    assert not recordings
    assert torch.equal(model.generate(prompt, **options), expected)
    assert recordings


@pytest.mark.skipif(not GPU, reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_cuda_graph_gives_the_eager_logits(family: str, batch: int) -> None:
    model, tokens = converted(family), drawn(batch, 60)
    expected, _ = logits_of(model, tokens, graphs=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual, cache = logits_of(model, tokens, graphs=True)
    assert cache in cuda_graph._GRAPHS, "no graph was recorded, so nothing was compared"
    close(actual, expected)


@pytest.mark.skipif(not GPU, reason="needs a GPU: CUDA graphs")
def test_generate_by_a_cuda_graph() -> None:
    model, prompt = converted(), drawn(2, 40)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, past_key_values=BoundedCache(model.config, graphs=False), **options)
    assert torch.equal(model.generate(prompt, **options), expected)
