"""What autocast asks of the operators."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from dynamask.cache import BoundedLayer
from dynamask.ops.autocast import autocast_dtype
from dynamask.ops.future_attention import future_attention
from dynamask.ops.interval.api import attend
from dynamask.ops.nsa.blocks import block_layout, nsa_attention
from dynamask.ops.ranked_attention import ranked_attention


def test_the_dtype_is_that_of_the_tensors_own_device() -> None:
    here, nowhere = torch.zeros(1), torch.zeros(1, device="meta")
    assert autocast_dtype(here) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype(here) == torch.bfloat16
        assert autocast_dtype(nowhere) is None
        with torch.autocast("cpu", enabled=False):
            assert autocast_dtype(here) is None


def test_attention_under_autocast_is_one_graph() -> None:
    query, key, value = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    expiry = torch.full((1, 2, 12), 12, dtype=torch.int32)

    def step() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(query, key, value, expiry)

    explained = torch._dynamo.explain(step)()
    assert explained.graph_break_count == 0, explained.break_reasons
    assert torch.equal(torch.compile(step, backend="eager", fullgraph=True)(), step())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_operator_narrows_alike(dtype: torch.dtype) -> None:
    """As on inputs narrowed beforehand without autocast: sums stay float32. Of mixed inputs float64 alone is kept."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 8, dtype=dtype) for heads in (4, 2, 2))
    ranks, expiry = torch.randn(1, 2, 40), torch.full((1, 2, 40), 40, dtype=torch.int32)
    windows = torch.tensor([40, 40])

    def cached(*inputs: torch.Tensor) -> torch.Tensor:
        return BoundedLayer(40).attend(*inputs, ranks)

    def ranked(*inputs: torch.Tensor) -> torch.Tensor:
        return ranked_attention(*inputs, ranks, windows, local=0, sinks=0, scale=1.0)[0]

    def nsa(*inputs: torch.Tensor) -> torch.Tensor:
        layout, gates = block_layout(1, 40, 8, torch.device("cpu")), torch.ones(1, 4, 40, 3)
        return nsa_attention(*inputs, gates, block_counts=3, window=8, layout=layout)

    def future(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return future_attention(query, key)

    for operator in (lambda *inputs: attend(*inputs, expiry), cached, ranked, nsa, future):
        narrow = dtype if dtype == torch.float64 else torch.bfloat16
        expected = operator(query.to(narrow), key.to(narrow), value.to(narrow))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = operator(query, key, value)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
