"""The plain NSA path against flash-linear-attention's naive reference."""

from __future__ import annotations

import pytest
import torch

from dynamask import InvalidInputError
from dynamask.ops.nsa import blocks as nsa
from dynamask.ops.nsa.blocks import block_layout, nsa_attention

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
        lambda *t: nsa_attention(*t, block_counts=3, window=2, layout=layout),
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
            block_counts=0,
            window=1,
            layout=block_layout(1, 4, 2, torch.device("cpu")),
        )


def inputs(length: int, dim: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, length, dim), (2, 2, length, dim), (2, 2, length, dim), (2, 4, length, 3))
    return [torch.randn(*shape, generator=generator).double().requires_grad_() for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
def test_tiles_change_nothing(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(50)
    key_mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) < 0.8 if masked else None
    layout = block_layout(2, 50, 4, torch.device("cpu"), key_mask=key_mask)
    results = []
    for elements in (nsa.TILE_ELEMENTS, 2000):  # one tile; tiles of 17 queries for the blocks, of 5 for the keys
        monkeypatch.setattr(nsa, "TILE_ELEMENTS", elements)
        output = nsa_attention(*tensors, block_counts=4, window=7, layout=layout)
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole)


def test_training_keeps_no_gathered_keys() -> None:
    tensors = inputs(300)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layout = block_layout(2, 300, 16, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = nsa_attention(*tensors, block_counts=8, window=128, layout=layout)
    of_inputs = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert sum(kept.values()) < 8 * of_inputs  # the keys of eight blocks for every query would be 64 times them
    output.sum().backward()


def test_only_packing_needs_a_look_at_the_data() -> None:
    def slots(key_mask: torch.Tensor) -> torch.Tensor:
        plain = block_layout(2, 9, 4, key_mask.device)
        padded = block_layout(2, 9, 4, key_mask.device, key_mask=key_mask)
        return plain.rows.sum() + padded.rows.sum() + padded.sliding_expiry(3).sum()

    key_mask = torch.arange(9).expand(2, 9) >= torch.tensor([[0], [4]])
    compiled = torch.compile(slots, backend="eager", fullgraph=True)
    assert compiled(key_mask) == slots(key_mask)
