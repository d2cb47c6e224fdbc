"""`upcycle` shares or copies weights as it says, and refuses what it does not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynamask import InvalidInputError, convert


def test_weights_are_shared_unless_copied(llama: Any) -> None:
    shared = convert.upcycle(llama, 12, local=4, sinks=2)
    assert shared.lm_head.weight is llama.lm_head.weight
    assert not hasattr(llama.model.layers[0].self_attn, "rank_predictor")
    assert llama.config.model_type == "llama"
    copied = convert.upcycle(llama, 12, local=4, sinks=2, copy_weights=True)
    assert copied.lm_head.weight is not llama.lm_head.weight
    assert torch.equal(copied.lm_head.weight, llama.lm_head.weight)


def test_tied_weights_stay_tied(shape: dict[str, Any]) -> None:
    dense = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    for copy in (False, True):
        model = convert.upcycle(dense, 12, local=4, sinks=2, copy_weights=copy)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dtype_and_predictors(llama: Any) -> None:
    model = convert.upcycle(llama.to(torch.bfloat16), 12, local=4, sinks=2, rank_predictor_width=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].self_attn.rank_predictor.up is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"window": [12, 12]}, "allocate_windows"),
        ({"window": 5, "local": 4, "sinks": 2}, "local . sinks must be at most"),
        ({"window": 12, "local": 4, "sinks": 2, "dense_layers": [2]}, "indices of the 2 layers; got .2."),
        ({"window": 12, "local": 4, "sinks": 2, "dense_layers": 0}, "indices of the 2 layers; got 0"),
        ({"window": 12, "local": 4, "sinks": 2, "rank_predictor_width": -1}, "rank_predictor_width"),
    ],
)
def test_bad_options(llama: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        convert.upcycle(llama, **options)


def test_what_is_no_causal_lm_is_refused(llama: Any) -> None:
    with pytest.raises(InvalidInputError, match="causal language models"):
        convert.upcycle(llama.model, 12, local=4, sinks=2)
    with pytest.raises(InvalidInputError, match="converted already"):
        convert.upcycle(convert.upcycle(llama, 12, local=4, sinks=2), 12, local=4, sinks=2)
    with pytest.raises(InvalidInputError, match="not supported"):
        convert.upcycle(torch.nn.Linear(2, 2), 12, local=4, sinks=2)  # type: ignore[arg-type]


def test_dropout_that_would_be_lost_is_announced(shape: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="attention_dropout"):
        convert.upcycle(LlamaForCausalLM(LlamaConfig(**shape, attention_dropout=0.1)), 200)
