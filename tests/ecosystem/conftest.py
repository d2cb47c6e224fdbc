"""Models and texts for trainers and adapters; `make test-ecosystem` installs what they need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynamask import DynamaskForCausalLM, convert
from tests.conftest import random_ranks, tiny_config

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def dense_model() -> LlamaForCausalLM:
    """A dense Llama, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def converted_model(window: int = 8) -> Any:
    """The dense Llama converted, with ranks that choose by content."""
    return random_ranks(convert.upcycle(dense_model(), window, local=3, sinks=1))


def native_model() -> DynamaskForCausalLM:
    """A model of dynamask's own."""
    torch.manual_seed(0)
    return DynamaskForCausalLM(tiny_config("dma", vocab_size=64))


MODELS = {"native": native_model, "converted": converted_model}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """A native and a converted model."""
    return MODELS[request.param]()


@pytest.fixture
def converted() -> Any:
    """A converted model."""
    return converted_model()


@pytest.fixture
def tokens() -> torch.Tensor:
    """(4, 24) token ids."""
    return torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rows(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The same as examples of a data set."""
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 64 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def predictors(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the rank predictors' parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "rank_predictor" in name}
