"""The kernels that pack surviving keys, against a loop: on a GPU, or under TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from dynamask.ops.ragged_layout import ragged_layout

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize(
    ("sizes", "length", "share"),
    [((3, 0, 70), 200, 0.3), ((5,), 9, 1.0), ((40, 90), 5000 if GPU else 300, 0.01), ((8, 8), 30, 0.0)],
)
@pytest.mark.parametrize("dims", [(16, 16), (24, 8)])
def test_survivors_in_their_order(sizes: tuple[int, ...], length: int, share: float, dims: tuple[int, int]) -> None:
    from dynamask.ops.triton import cache_keep

    batch, groups, layout = 2, len(sizes), ragged_layout(sizes, DEVICE)
    draw = torch.Generator().manual_seed(0)
    key = torch.randn(batch, length, groups, dims[0], generator=draw).to(DEVICE).transpose(1, 2)
    value = torch.randn(batch, groups, length, dims[1], generator=draw).to(DEVICE)
    ranks = torch.randn(batch, groups, length, generator=draw).to(DEVICE)
    position = torch.arange(length).expand(batch, groups, length).to(DEVICE) + 7
    survives = torch.rand(batch, groups, length, generator=draw) < share
    survives &= survives.cumsum(-1) <= torch.tensor(sizes)[:, None]
    expiry = torch.where(survives, length, torch.randint(length, survives.shape, generator=draw)).int().to(DEVICE)
    before = cache_keep._COLUMNS
    cache_keep._COLUMNS = 64  # several looks at a short row
    try:
        found = cache_keep.keep_launch(key, value, ranks, position, expiry, layout.table, layout.offsets[-1])
    finally:
        cache_keep._COLUMNS = before
    for b in range(batch):
        for g, (start, stop) in enumerate(itertools.pairwise(layout.offsets)):
            columns = survives[b, g].nonzero()[:, 0].to(DEVICE)
            full = slice(start, start + len(columns))
            for pool, rows in zip(found, (key, value, ranks, position), strict=True):
                assert torch.equal(pool[b, full], rows[b, g, columns].to(pool.dtype))
            rest = slice(start + len(columns), stop)
            assert (found[3][b, rest] == -1).all()
            assert (found[0][b, rest] == 0).all()
            assert (found[1][b, rest] == 0).all()
