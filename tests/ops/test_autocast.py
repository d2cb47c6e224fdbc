"""What autocast asks of the operators."""

from __future__ import annotations

import torch
import torch._dynamo

from dynamask.ops.autocast import autocast_dtype
from dynamask.ops.interval.api import attend


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
