"""Errors of windows: they fall with the window, and point at the head that needs it."""

from __future__ import annotations

from typing import Any

import torch

from dynamask import convert
from dynamask.convert.distill import distillation_losses
from dynamask.convert.window_errors import candidate_windows, cheapest_windows, window_errors


def test_candidates_double() -> None:
    assert candidate_windows(6, 64) == [6, 12, 24, 48, 64]
    assert candidate_windows(64, 64) == [64]


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
    errors = window_errors(model, tokens, [6, 12, 24, 64])
    assert errors[0].abs().max() == 0
    assert errors[1, 3] == 0
    assert (errors[1, :-1].diff() < 0).all()
    convert.set_windows(model, [[64, 12]])
    measured = float(distillation_losses(model, dense, tokens)[0].detach()) * tokens.numel()
    assert 0.5 * measured < float(errors[1, 1]) < 2 * measured
    windows = convert.allocate_windows(model, [tokens], 20, method="loss")
    assert windows == [[6, 34]]
