"""The kernel that inserts a key into a ragged cache is the plain step: on a GPU, or under TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

from dynamask.ops.cache_insert import insert_key_reference
from dynamask.ops.ragged_layout import ragged_layout
from tests.ops.cache_pools import DEVICE, empty_pools, ranks_of

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)
POOLS = ("keys", "values", "ranks", "positions", "clock")
STEPS = 60 if GPU else 5
FILLED = 5  # tokens that the plain step takes alone: some heads are full then


@pytest.mark.parametrize(
    ("windows", "local", "sinks", "ranked", "masked"),
    [
        ((5, 9, 2), 0, 0, True, False),
        ((6, 6), 6, 0, False, False),
        ((7, 5), 2, 3, True, True),
        ((4, 6), 0, 4, True, True),  # nothing but sinks in the first head
        ((3, 4), 0, 0, False, True),
    ],
)
@torch.no_grad()
def test_one_launch_is_the_plain_step(
    windows: tuple[int, ...], local: int, sinks: int, ranked: bool, masked: bool
) -> None:
    """A new key given as a transposed view, as projections give it."""
    from dynamask.ops.triton.cache_insert import insert_key_launch

    torch.manual_seed(0)
    batch, groups = 2, len(windows)
    layout = ragged_layout(windows, DEVICE)
    widest = layout.widest if ranked else 3000  # more slots at a time than there are
    plain = empty_pools(batch, windows, 6, 3)
    ranks = ranks_of(batch, groups, FILLED + STEPS)
    for t in range(FILLED + STEPS):
        key = torch.randn(batch, 1, groups, 6, device=DEVICE).transpose(1, 2)
        value = key[..., :3]
        rank = ranks[..., t : t + 1] if ranked else None
        mask = torch.rand(batch, 1, device=DEVICE) < 0.7 if masked else None
        if t == FILLED:
            fused = {name: pool.clone() for name, pool in plain.items()}
        insert_key_reference(key, value, rank, mask, **plain, layout=layout, local=local, sinks=sinks)
        if t >= FILLED:
            insert_key_launch(
                key, value, rank, mask, **fused, table=layout.table, widest=widest, local=local, sinks=sinks
            )
            for name in POOLS:
                assert torch.equal(plain[name].nan_to_num(nan=7.5), fused[name].nan_to_num(nan=7.5)), (name, t)
