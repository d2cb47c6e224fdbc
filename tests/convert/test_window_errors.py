"""Errors of windows: they fall with the window, and point at the head that needs it."""

from __future__ import annotations

from typing import Any

import torch

import dynamask
from dynamask import convert
from dynamask.convert import window_errors as window_errors_module
from dynamask.convert.attention import call_facts
from dynamask.convert.distillation_loss import distillation_losses
from dynamask.convert.learn_ranks import run_decoder
from dynamask.convert.window_errors import candidate_windows, cheapest_slopes, cheapest_windows, window_errors
from dynamask.mixers.rank_predictor import sloped_ranks


def test_candidates_rise_by_a_ratio() -> None:
    assert candidate_windows(6, 64, 2.0) == [6, 12, 24, 48, 64]
    assert candidate_windows(64, 64) == [64]
    assert candidate_windows(1, 6) == [1, 2, 3, 4, 6]


def test_the_budget_goes_where_it_saves_most() -> None:
    errors = torch.tensor([[8.0, 7.0, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert cheapest_windows(errors, [10, 20, 40], 30).tolist() == [10, 10, 10]
    assert cheapest_windows(errors, [10, 20, 40], 40).tolist() == [10, 20, 10]
    # The first head's hull leaves out its middle window, whose gain comes only with the last.
    assert cheapest_windows(errors, [10, 20, 40], 55).tolist() == [25, 20, 10]
    assert cheapest_windows(errors, [10, 20, 40], 120).tolist() == [40, 40, 40]


def test_errors_predict_the_divergence(shape: dict[str, Any]) -> None:
    """Of two heads in one layer, one looks far back and one sees no difference between keys of zero value."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(**shape | {"initializer_range": 0.15, "num_hidden_layers": 1})).eval()
    with torch.no_grad():
        dense.model.layers[0].self_attn.v_proj.weight[:8] = 0.0
    model = convert.upcycle(dense, 12, local=4, sinks=2)
    model.config.trained_ranks = True
    tokens = torch.randint(3, 300, (8, 64))
    errors = window_errors(model, tokens, [6, 12, 24, 64])[:, 0]
    assert errors[0].abs().max() == 0
    assert errors[1, 3] == 0
    assert (errors[1, :-1].diff() < 0).all()
    convert.set_windows(model, [[64, 12]])
    measured = float(distillation_losses(model, dense, tokens)[0].detach()) * tokens.numel()
    assert 0.5 * measured < float(errors[1, 1]) < 2 * measured
    windows = convert.allocate_windows(model, [tokens], 20, method="loss")
    assert windows == [[6, 34]]


def test_errors_are_those_of_the_attention_itself(llama: Any) -> None:
    """Windows and slopes at once give what the operator gives for one after the other."""
    model = convert.upcycle(llama, 12, local=4, sinks=2)
    for layer in model.config.ranked_layers:
        torch.nn.init.normal_(model.model.layers[layer].self_attn.rank_predictor.down.weight)
    tokens, slopes, windows = torch.randint(3, 300, (2, 40)), (0.0, 0.125, 1.0), [6, 9, 20, 40]
    found = window_errors(model, tokens, windows, slopes)
    layers = model.config.ranked_layers
    gradients = window_errors_module._gradients(model, tokens, layers)
    expected = torch.zeros_like(found)

    def observe(layer: Any) -> None:
        index, groups = layer.module.layer_idx, layer.key.shape[1]
        steep = gradients[index].view(2, 40, -1, layer.output.shape[-1]).transpose(1, 2)
        ranks = layer.module.rank_predictor(layer.hidden_states)
        for a, slope in enumerate(slopes):
            sloped = sloped_ranks(ranks, (slope,) * groups, torch.arange(40)[None])
            for b, window in enumerate(windows):
                given = dynamask.interval_attention(
                    layer.query, layer.key, layer.value, dynamask.key_expiry(sloped, window, local=4, sinks=2)
                )
                along = (steep * (given - layer.output)).unflatten(1, (groups, -1)).sum((2, 4))
                start = layers.index(index) * groups
                expected[start : start + groups, a, b] = 0.5 * along.square().sum((0, 2))

    facts = call_facts(2, 40, None, None, 0, tokens.device)
    facts.observer = observe
    with torch.no_grad():
        run_decoder(model, tokens, facts)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    assert (found[:, :, -1] == 0).all()


def test_the_slope_follows_the_error() -> None:
    errors = torch.tensor([[[4.0, 2.0, 0.0], [3.0, 3.0, 0.0]], [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]])
    assert cheapest_slopes(errors, [10, 20, 40], [10, 10]) == [1, 0]
    assert cheapest_slopes(errors, [10, 20, 40], [18, 40]) == [0, 0]
