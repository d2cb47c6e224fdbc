"""What only a GPU can show of the rivals: fla's NSA kernels, and MLA's padded decoding at full width."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dynamask.mixers import nsa
from dynamask.models import DynamaskForCausalLM, preset
from dynamask.ops.nsa import block_layout, nsa_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed")
@pytest.mark.parametrize("length", [512, 1000])
def test_flas_kernels_agree_with_the_torch_path(length: int) -> None:
    torch.manual_seed(0)
    options = {"block_size": 32, "block_counts": 8, "window": 128}

    def draw(heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, heads, length, width, device="cuda", dtype=torch.float16).requires_grad_()

    query, key, value = draw(16, 64), draw(1, 64), draw(1, 64)
    gates = torch.rand(1, 16, length, 3, device="cuda").half().requires_grad_()
    assert nsa._kernels_take(query, key, 32, 8)
    inputs = (query, key, value, gates)
    actual = nsa._kernels(*inputs, **options)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    expected = nsa_attention(*wide, layout=block_layout(1, length, 32, query.device), **options)
    grad = torch.randn_like(expected)
    pairs = [("output", actual, expected)]
    gradients = torch.autograd.grad(actual, inputs, grad.half()), torch.autograd.grad(expected, wide, grad)
    pairs += zip(("query", "key", "value", "gates"), *gradients, strict=True)
    for name, got, wanted in pairs:
        # Seen on an H100: 4e-4 at 512 and 7e-3 to 1e-2 at 1000, above rounding. Queries that select another block
        # when importances nearly tie in half precision would explain it; that cause has not been established.
        error = ((got.float() - wanted).norm() / wanted.norm()).item()
        print(name, f"{error:.1e}")
        assert error < 2e-2, (name, error)


@torch.no_grad()
def test_mla_decodes_a_padded_batch_at_full_width() -> None:
    torch.manual_seed(0)
    config = preset("1.7b", attention="mla", num_hidden_layers=1, vocab_size=256)
    model = DynamaskForCausalLM(config).cuda().bfloat16().eval()
    tokens = torch.randint(0, 256, (2, 40), device="cuda")
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    cache = model(tokens[:, :39], attention_mask=mask[:, :39], use_cache=True).past_key_values
    step = model(tokens[:, 39:], attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1].float()
    whole = model(tokens, attention_mask=mask, use_cache=False).logits[:, -1].float()
    error = ((step - whole).norm() / whole.norm()).item()
    print("mla", f"{error:.1e}")
    assert error < 2e-2
