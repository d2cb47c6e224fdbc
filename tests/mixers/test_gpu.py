"""What only a GPU can show of the rivals: fla's NSA kernels, SDPA's backends, MLA's padded decoding at full width."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamask.mixers import SequenceInfo
from dynamask.mixers.mha import dense_attention
from dynamask.models import DynamaskForCausalLM, preset
from dynamask.ops.nsa.blocks import block_layout, nsa_attention
from dynamask.ops.nsa.selected import kernels_take

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed")
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (6, 2), (16, 1)])
@pytest.mark.parametrize("length", [512, 1000])
def test_flas_kernels_agree_with_the_torch_path(length: int, heads: int, groups: int) -> None:
    torch.manual_seed(0)

    def draw(number: int, width: int) -> torch.Tensor:
        return torch.randn(2, number, length, width, device="cuda", dtype=torch.bfloat16).requires_grad_()

    inputs = (draw(heads, 64), draw(groups, 64), draw(groups, 64), draw(heads, 3))
    options = {"block_counts": 4, "window": 128, "layout": block_layout(2, length, 64, torch.device("cuda"))}
    assert kernels_take(*inputs[:3], 64)
    grad = torch.randn(2, heads, length, 64, device="cuda").bfloat16()
    results = []
    for kernels in (True, False):
        output = nsa_attention(*inputs, kernels=kernels, **options)
        results.append([output, *torch.autograd.grad(output, inputs, grad)])
    for name, got, wanted in zip(("output", "query", "key", "value", "gates"), *results, strict=True):
        # Both choose their blocks by the same code, so nothing but rounding is between them.
        error = ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
        print(name, f"{error:.1e}")
        assert error < 1e-2, (name, error)


def _model(attention: str, **fields: object) -> DynamaskForCausalLM:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "vocab_size": 256, "windows": 512, **fields}
    return DynamaskForCausalLM(preset("tiny", attention=attention, **shape)).cuda().train()


def _step(model: DynamaskForCausalLM, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def _nsa_error(block_counts: int, compiled: bool) -> float:
    """The largest error of a gradient, by norm, of a training step that may not wait for the GPU."""
    model = _model("nsa", nsa={"block_counts": block_counts})
    tokens = torch.randint(0, 256, (2, 1024), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    expected = _step(model, tokens)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    _step(model, tokens)  # compilation and tuning do look at the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = _step(model, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return max(((got - wanted).norm() / wanted.norm()).item() for got, wanted in zip(actual, expected, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_nsa_trains_without_a_wait(compiled: bool) -> None:
    """Where all 16 blocks are chosen, nothing but rounding is between the two; where 4 are, choices may differ too."""
    rounding, selection = _nsa_error(16, compiled), _nsa_error(4, compiled)
    print(f"rounding {rounding:.4f}, rounding and selection {selection:.4f}")
    assert rounding <= 0.03, f"rounding alone: {rounding}"
    assert selection <= 0.1, f"with a choice of blocks {selection}; without, {rounding}"


@pytest.mark.parametrize(("key_width", "value_width"), [(192, 128), (96, 64), (64, 96), (160, 128)])
def test_mla_of_unequal_widths_trains_on_a_fast_backend(key_width: int, value_width: int) -> None:
    torch.manual_seed(0)
    sequence = SequenceInfo(torch.arange(300, device="cuda").expand(2, 300))
    shapes = (key_width, key_width, value_width)
    tensors = [torch.randn(2, 4, 300, n, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in shapes]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        actual = dense_attention(*tensors, sequence)
        grad = torch.randn_like(actual)
        gradients = torch.autograd.grad(actual, tensors, grad)
    wide = [tensor.detach().float().requires_grad_() for tensor in tensors]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    pairs = zip((actual, *gradients), (expected, *torch.autograd.grad(expected, wide, grad.float())), strict=True)
    for got, wanted in pairs:
        assert ((got.float() - wanted).norm() / wanted.norm()).item() < 1e-2


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
