"""Decoding as a CUDA graph gives what the model gives by itself."""

from __future__ import annotations

import copy

import pytest
import torch

from dynamask import BoundedCache, DynamaskForCausalLM
from dynamask.models import cuda_graph
from tests.conftest import tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")


def small_model(attention: str = "dma", **fields: object) -> DynamaskForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "head_dim": 64, "windows": 64}
    model = DynamaskForCausalLM(tiny_config(attention, **(shape | fields)))
    for name, parameter in model.named_parameters():
        if "gate." in name or "rank_predictor" in name:  # untrained ranks would slide
            torch.nn.init.normal_(parameter)
    return model.cuda().bfloat16().eval()


def logits_of(
    model: DynamaskForCausalLM, tokens: torch.Tensor, graphs: bool, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, BoundedCache]:
    """Logits of every token, 80 at once and the others one by one, and the cache."""
    cache = BoundedCache(model.config, graphs=graphs)
    parts = []
    for start, stop in [(0, 80), *((t, t + 1) for t in range(80, tokens.shape[1]))]:
        seen = None if mask is None else mask[:, :stop]
        parts.append(model(tokens[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == tokens.shape[1]
    return torch.cat(parts, 1), cache


UNEVEN = {"windows": [[24, 40], [72, 30]]}


@pytest.mark.parametrize(
    "fields",
    [
        *({}, {"local": 0, "sinks": 0}, {"ranking": "paper"}, {"attention": "swa"}),
        *(UNEVEN, {**UNEVEN, "local": 5, "sinks": 3}, {**UNEVEN, "attention": "swa"}),
        {"windows": [[24, 40], [300, 30]]},  # a head that still grows
    ],
)
@torch.no_grad()
def test_same_logits_with_and_without_a_graph(fields: dict) -> None:
    model = small_model(**fields)
    tokens = torch.randint(0, 50, (2, 120), device="cuda")
    expected, _ = logits_of(model, tokens, graphs=False)
    actual, cache = logits_of(model, tokens, graphs=True)
    assert cache in cuda_graph._GRAPHS, "no graph was recorded, so nothing was compared"
    assert torch.equal(actual, expected)
    # The prefill's own arithmetic differs in bfloat16, and a key near the threshold may be another one.
    whole = model(tokens, use_cache=False).logits
    assert ((actual.float() - whole.float()).norm() / whole.float().norm()).item() < 0.05


@torch.no_grad()
def test_a_left_padded_batch_decodes_by_graph() -> None:
    model = small_model()
    tokens = torch.randint(0, 50, (2, 120), device="cuda")
    mask = torch.ones_like(tokens)
    mask[1, :10] = 0
    expected, _ = logits_of(model, tokens, graphs=False, mask=mask)
    actual, cache = logits_of(model, tokens, graphs=True, mask=mask)
    assert cache in cuda_graph._GRAPHS
    assert torch.equal(actual, expected)


@torch.no_grad()
def test_a_graph_is_left_when_it_no_longer_fits() -> None:
    model = small_model()
    tokens = torch.randint(0, 50, (2, 120), device="cuda")
    _, cache = logits_of(model, tokens, graphs=True)
    twin = copy.deepcopy(cache)
    after = model(tokens[:, :1], past_key_values=cache, use_cache=True).logits
    assert torch.equal(model(tokens[:, :1], past_key_values=twin, use_cache=True).logits, after)
    # Another order of rows moves the cache; weights that moved must be read where they are now.
    cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
    twin.reorder_cache(torch.tensor([1, 0], device="cuda"))
    twin.graphs = False
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    for step in range(5):
        token = tokens[:, step : step + 1]
        actual = model(token, past_key_values=cache, use_cache=True).logits
        assert torch.equal(actual, model(token, past_key_values=twin, use_cache=True).logits)
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *a: calls.append(1))
    model(tokens[:, :1], past_key_values=cache, use_cache=True)
    handle.remove()
    assert calls, "a replay would not have called the hook"


@torch.no_grad()
def test_generate_agrees() -> None:
    model = small_model()
    prompt = torch.randint(0, 50, (2, 90), device="cuda")
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    eager = BoundedCache(model.config, graphs=False)
    expected = model.generate(prompt, past_key_values=eager, **options)
    assert torch.equal(model.generate(prompt, **options), expected)


@torch.no_grad()
def test_a_growing_cache_is_recorded_anew_after_each_enlargement() -> None:
    model = small_model(windows=[[24, 40], [400, 30]])
    tokens = torch.randint(0, 50, (2, 420), device="cuda")
    expected, _ = logits_of(model, tokens, graphs=False)
    recorded = []
    made = cuda_graph.StepGraph.__init__

    def count(self: cuda_graph.StepGraph, *arguments: object) -> None:
        recorded.append(arguments[1])
        made(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph.StepGraph, "__init__", count)
        actual, _ = logits_of(model, tokens, graphs=True)
    assert len(recorded) > 3
    assert torch.equal(actual, expected)


def test_a_graph_recorded_in_inference_mode_serves_no_grad() -> None:
    model = small_model()
    tokens = torch.randint(0, 50, (2, 120), device="cuda")
    with torch.inference_mode():
        _, cache = logits_of(model, tokens, graphs=True)
        twin = copy.deepcopy(cache)
        twin.graphs = False
    assert cache in cuda_graph._GRAPHS
    with torch.no_grad():
        for step in range(5):
            token = tokens[:, step : step + 1]
            actual = model(token, past_key_values=cache, use_cache=True).logits
            assert torch.equal(actual, model(token, past_key_values=twin, use_cache=True).logits)
