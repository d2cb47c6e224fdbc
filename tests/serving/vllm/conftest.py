"""A tiny converted model with a tokenizer, and what transformers makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dynamask.convert import upcycle
from dynamask.convert.models import set_slopes, set_windows
from dynamask.mixers import RankPredictor

WINDOWS = [[24, 40], [16, 56]]
STATE_BYTES = sum(map(sum, WINDOWS)) * (16 * 4 * 2 + 8)


def save_tiny(path: Path) -> None:
    """A Llama of two layers whose ranks choose by content."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
    )
    dense = LlamaForCausalLM(config)
    for parameter in dense.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.12)
    model = upcycle(dense, 16, local=8, sinks=2)
    set_windows(model, WINDOWS)
    set_slopes(model, [[0.0, 0.0625], None])
    for module in model.modules():
        if isinstance(module, RankPredictor):
            torch.nn.init.normal_(module.down.weight, std=0.3)
    model.config.trained_ranks = True
    model.save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({f"w{token}": token for token in range(128)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
        path
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return path


@pytest.fixture(scope="session")
def state_bytes() -> int:
    """Memory of one sequence: keys and values of 16 float32, a rank and a position in each slot."""
    return STATE_BYTES


class Reference:
    """Greedy continuations by transformers."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
        output = self.model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., list[list[int]]]:
    return prompts
