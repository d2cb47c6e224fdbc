"""The selected branch under a mask against gathered keys, values and gradients."""

from __future__ import annotations

import pytest
import torch

from dynamask.ops.nsa import blocks as nsa
from dynamask.ops.nsa.blocks import block_layout, nsa_attention


@pytest.mark.parametrize(("length", "heads", "groups"), [(37, 4, 2), (64, 2, 2), (5, 3, 1)])
def test_agrees_with_gathered_keys(length: int, heads: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(length)
    block, counts, window, dim = 8, 4, 12, 6

    def run() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        query = torch.randn(2, heads, length, dim, dtype=torch.float64, requires_grad=True)
        key, value = (torch.randn(2, groups, length, dim, dtype=torch.float64, requires_grad=True) for _ in range(2))
        gates = torch.rand(2, heads, length, 3, dtype=torch.float64)
        layout = block_layout(2, length, block, query.device)
        output = nsa_attention(query, key, value, gates, block_counts=counts, window=window, layout=layout)
        output.square().sum().backward()
        return output, query.grad, key.grad, value.grad  # type: ignore[return-value]

    gathered = run()
    calls = []
    monkeypatch.setattr(nsa, "mask_fits", lambda query, key: calls.append(query.shape) or True)
    masked = run()
    assert calls
    for ours, theirs in zip(masked, gathered, strict=True):
        torch.testing.assert_close(ours, theirs)
