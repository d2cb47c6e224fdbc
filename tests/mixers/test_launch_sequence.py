"""One launch sequence for a whole layer: no look at the device's data between the projections and the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dynamask.mixers import SequenceInfo
from dynamask.models.modeling import DynamaskDecoderLayer
from tests.conftest import tiny_config

LENGTH = 40
FORMS = {
    "learned": {},
    "paper": {"ranking": "paper"},
    "windows per head": {"windows": [[3, 9], [12, 4]], "local": 1, "sinks": 2},
    "dense head": {"windows": [[3, 64], [12, 4]], "local": 1, "sinks": 1},
}


def layer_of(form: str, **fields: object) -> DynamaskDecoderLayer:
    torch.manual_seed(0)
    return DynamaskDecoderLayer(tiny_config("dma", **(FORMS[form] | fields)), 0).train()


def sequence_of(device: str, length: int = LENGTH, padded: bool = False, packed: bool = False) -> SequenceInfo:
    position = torch.arange(length, device=device).expand(2, length)
    mask = position > position.new_tensor([[3], [0]]) if padded else None
    segments = position // 16 if packed else None
    return SequenceInfo(position, key_mask=mask, segment_ids=segments)


def step(layer: DynamaskDecoderLayer, hidden: Tensor, sequence: SequenceInfo) -> Tensor:
    """A forward and a backward pass."""
    result = layer(hidden, sequence)
    output, loss = result if isinstance(result, tuple) else (result, 0.0)
    (output.float().square().mean() + loss).backward()
    return output


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_compiles_without_a_graph_break(form: str) -> None:
    torch._dynamo.reset()
    layer, sequence = layer_of(form), sequence_of("cpu", padded=True)
    hidden = torch.randn(2, LENGTH, 32)
    expected = step(layer, hidden, sequence)
    gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    assert torch.allclose(step(compiled, hidden, sequence), expected, atol=1e-5)
    for got, wanted in zip([p.grad for p in layer.parameters() if p.grad is not None], gradients, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_alone_carry_a_layer_through(form: str) -> None:
    """On tensors without data: a look at a number of theirs, which on a GPU is a wait, would raise."""
    with FakeTensorMode():
        layer = layer_of(form)
        output = step(layer, torch.randn(2, LENGTH, 32), sequence_of("cpu", padded=True))
    assert output.shape == (2, LENGTH, 32)
    assert all(p.grad is not None for p in layer.mixer.v_proj.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [1000, 4096])  # sums by atomics, and the walk
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_never_waits_for_the_gpu(form: str, compiled: bool, length: int) -> None:
    fields = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    layer = layer_of(form, **fields).cuda()
    sequence = sequence_of("cuda", length, padded=True)
    hidden = torch.randn(2, length, 32, device="cuda")
    run = torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(2):  # compiling, and what is checked at the first use, look at the device
            expected = step(run, hidden, sequence)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = step(run, hidden, sequence)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual, expected)
