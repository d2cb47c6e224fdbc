"""What each process of a tensor-parallel group checks: losses, gradients and texts against the whole model."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynamask import BoundedCache, DynamaskConfig, DynamaskForCausalLM
from dynamask.convert import upcycle
from dynamask.convert.models import set_slopes, set_windows
from dynamask.errors import InvalidInputError
from dynamask.mixers import RankPredictor

VOCABULARY, LAYERS, HEADS, GROUPS = 96, 2, 4, 2
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def scramble(model: Any) -> Any:
    """Let ranks and norms differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RankPredictor):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) / 4)
    model.config.trained_ranks = True
    return model


def native(**fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"windows": [[12, 20], [16, 28]], "local": 4, "sinks": 2} | fields
    return scramble(DynamaskForCausalLM(DynamaskConfig(**SHAPE, **fields)))


def converted(model_type: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type](**SHAPE, **fields)
    model: Any = upcycle(AutoModelForCausalLM.from_config(config), 16, local=4, sinks=2)
    slides = getattr(config, "sliding_window", None) and getattr(config, "layer_types", None)
    set_windows(model, [[12, 20], [16, 28]])
    if not slides:
        set_slopes(model, [[0.25, 0.0], [0.0, 0.125]])
    return scramble(model)


def gpt_neox() -> Any:
    from transformers import GPTNeoXConfig

    fields = {name: SHAPE[name] for name in SHAPE if name not in ("num_key_value_heads", "head_dim")}
    torch.manual_seed(0)
    model: Any = upcycle(AutoModelForCausalLM.from_config(GPTNeoXConfig(**fields)), 16, local=4, sinks=2)
    set_windows(model, [[12, 20, 9, 16], [16, 28, 8, 12]])
    return scramble(model)


MODELS: dict[str, Any] = {
    "dma": native,
    "dma, untied, slopes": lambda: native(tie_word_embeddings=False, slopes=[[0.25, 0.0], None]),
    "swa": lambda: native(attention="swa"),
    "mha": lambda: native(attention="mha"),
    "llama": lambda: converted("llama"),
    "qwen3": lambda: converted("qwen3", tie_word_embeddings=True),
    "qwen2": lambda: converted("qwen2"),
    "gemma3_text": lambda: converted(
        "gemma3_text", sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: converted("phi3", pad_token_id=0),
    "gpt_neox": gpt_neox,
    "olmo2": lambda: converted("olmo2"),
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def steps(model: Any, tokens: Tensor) -> list[float]:
    """Losses of a few steps of plain gradient descent, which no wrong scale of a gradient survives."""
    model.train()
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
        losses.append(float(loss))
    return losses


def parallel(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)


def agrees(name: str, folder: str) -> None:
    """Compare a split model with the whole one: logits, generation in its cache, training, and what is saved."""
    os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    alone = MODELS[name]().eval()
    place = Path(folder, name.replace(", ", "-"))
    if dist.get_rank() == 0:
        alone.save_pretrained(place)
    dist.barrier()
    split = parallel(place).eval()
    tokens = torch.randint(1, VOCABULARY, (4, 70), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(split(input_ids=tokens).logits, alone(input_ids=tokens).logits, rtol=0, atol=2e-5)
    asked = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    for inputs in ({"input_ids": tokens}, {"input_ids": tokens, "attention_mask": mask}):
        assert torch.equal(split.generate(**inputs, **asked), alone.generate(**inputs, **asked))
    if name not in ("mha", "phi3", "olmo2"):  # phi3 and olmo2 compute all heads in every process
        cache, whole_cache = BoundedCache(split.config), BoundedCache(alone.config)
        for part in tokens.split(25, dim=1):
            with torch.no_grad():
                found = split(input_ids=part, past_key_values=cache, use_cache=True).logits
                expected = alone(input_ids=part, past_key_values=whole_cache, use_cache=True).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        share = dist.get_world_size()
        held = torch.tensor([sum(sum(layer.windows) for layer in cache.layers)])
        dist.all_reduce(held)
        assert int(held) == sum(sum(layer.windows) for layer in whole_cache.layers)
        assert cache.layers[0].keys.numel() < whole_cache.layers[0].keys.numel() or share == 1
    torch.testing.assert_close(steps(split, tokens), steps(alone, tokens), rtol=0, atol=1e-5)
    trained = dict(alone.named_parameters())
    for key, parameter in split.named_parameters():
        found, expected = whole(parameter.detach()), trained[key].detach()
        for dimension, (ours, theirs) in enumerate(zip(found.shape, expected.shape, strict=True)):
            if ours != theirs:  # before transformers 5.17 parameters are plain parts
                expected = expected.narrow(dimension, ours * dist.get_rank(), ours)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5, msg=lambda m, n=key: f"{n}: {m}")
    split.save_pretrained(place.with_suffix(".saved"))
    dist.barrier()
    again = AutoModelForCausalLM.from_pretrained(place.with_suffix(".saved"), dtype=torch.float32).eval()
    assert again.config.head_windows == alone.config.head_windows
    with torch.no_grad():
        expected = alone.eval()(input_ids=tokens).logits
        torch.testing.assert_close(again(input_ids=tokens).logits, expected, rtol=0, atol=5e-5)


def several(names: str, folder: str) -> None:
    for name in names.split("; "):
        agrees(name, folder)


def refused(folder: str) -> None:
    """Heads that cannot be divided, and attention that cannot be split."""
    cases = {"nsa": native(attention="nsa", windows=16), "mla": native(attention="mla", windows=16)}
    cases["paper"] = DynamaskForCausalLM(DynamaskConfig(**SHAPE, windows=16, ranking="paper"))
    odd = SHAPE | {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24}
    cases["divided"] = DynamaskForCausalLM(DynamaskConfig(**odd, windows=16))
    for name, model in cases.items():
        place = Path(folder, name)
        if dist.get_rank() == 0:
            model.save_pretrained(place)
        dist.barrier()
        with pytest.raises(InvalidInputError, match="tp_"):
            parallel(place)
