"""The plain NSA path against flash-linear-attention's naive reference."""

from __future__ import annotations

import pytest
import torch

from dynamask import InvalidInputError
from dynamask.ops.nsa import block_layout, nsa_attention

naive = pytest.importorskip("fla.ops.nsa.naive", reason="flash-linear-attention is not installed")


@pytest.mark.parametrize("length", [5, 16, 37, 200])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 2), (16, 1)])
@pytest.mark.parametrize("counts", [3, 50])
def test_agrees_with_fla(length: int, heads: int, groups: int, counts: int) -> None:
    torch.manual_seed(length)
    block, window, dim = 8, 12, 6
    query = torch.randn(2, heads, length, dim)
    key, value = torch.randn(2, 2, groups, length, dim).unbind(0)
    gates = torch.rand(2, heads, length, 3)
    expected = reference(query, key, value, gates, block, counts, window)
    actual = nsa_attention(
        query,
        key,
        value,
        gates,
        block_size=block,
        block_counts=counts,
        window=window,
        layout=block_layout(2, length, block, query.device),
    )
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def reference(query, key, value, gates, block, counts, window):
    """fla's compressed and selected branches, and its sliding one by SDPA (fla's own needs flash-attn)."""
    scale = query.shape[-1] ** -0.5
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    length = q.shape[1]
    pad = -length % block
    k_cmp, v_cmp = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, block)).mean(2) for x in (k, v))
    compressed, _ = naive.naive_nsa_compression(q, k_cmp, v_cmp, block, scale)
    chosen = naive.naive_nsa_topk(q, k_cmp, counts, block, scale)
    selected = naive.naive_nsa_selection(q, k, v, chosen, block, scale)
    position = torch.arange(length)
    mask = (position <= position[:, None]) & (position[:, None] < position + window)
    sliding = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    parts = (compressed.transpose(1, 2), selected.transpose(1, 2), sliding)
    return sum(gates[..., i : i + 1] * part for i, part in enumerate(parts))


def test_gradcheck() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 1, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gates = torch.rand(1, 2, 7, 3, dtype=torch.float64, requires_grad=True)
    layout = block_layout(1, 7, 2, query.device)
    assert torch.autograd.gradcheck(
        lambda *t: nsa_attention(*t, block_size=2, block_counts=3, window=2, layout=layout),
        (query, key, value, gates),
    )


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidInputError, match="block_size must be at least 1"):
        block_layout(1, 4, 0, torch.device("cpu"))
    zeros = torch.zeros(1, 1, 4, 2)
    with pytest.raises(InvalidInputError, match="block_counts"):
        nsa_attention(
            zeros,
            zeros,
            zeros,
            torch.zeros(1, 1, 4, 3),
            block_size=2,
            block_counts=0,
            window=1,
            layout=block_layout(1, 4, 2, torch.device("cpu")),
        )
