"""Inserting a key into a ragged cache keeps what `key_expiry` keeps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dynamask.ops.cache_contest import CacheContest
from dynamask.ops.cache_insert import insert_key_reference
from dynamask.ops.expiry import key_expiry
from dynamask.ops.ragged_layout import RaggedLayout, ragged_layout
from tests.ops.cache_pools import DEVICE, empty_pools, ranks_of

CASES = [
    ((5, 9, 2), 0, 0),
    ((5, 9, 2), 1, 1),
    ((40, 40), 40, 0),
    ((7, 30), 3, 4),
    ((4, 6), 0, 4),  # nothing but sinks in the first head
]


@pytest.mark.parametrize(("windows", "local", "sinks"), CASES)
def test_holds_what_survives(windows: tuple[int, ...], local: int, sinks: int) -> None:
    batch, length = 2, 50
    ranks = ranks_of(batch, len(windows), length)
    mask = torch.rand(batch, length, device=DEVICE) < 0.7
    layout = ragged_layout(windows, DEVICE)
    pools = empty_pools(batch, windows, 1, 1)
    name = torch.arange(length, device=DEVICE).float().expand(batch, len(windows), length)
    for t in range(length):
        new = name[..., t : t + 1, None]
        insert_key_reference(
            new, new, ranks[..., t : t + 1], mask[:, t : t + 1], **pools, layout=layout, local=local, sinks=sinks
        )
    check_holds(pools, ranks, windows, layout, mask, local, sinks)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("windows", "local", "sinks"), CASES)
def test_contest_on_the_host_is_the_plain_step(windows: tuple[int, ...], local: int, sinks: int, masked: bool) -> None:
    """Started on an empty cache, and on one that is partly filled."""
    batch, length = 2, 50
    ranks = ranks_of(batch, len(windows), length).cpu()
    real = torch.rand(batch, length) < 0.7 if masked else torch.ones(batch, length, dtype=torch.bool)
    layout = ragged_layout(windows, torch.device("cpu"))
    pools = {name: pool.cpu() for name, pool in empty_pools(batch, windows, 1, 1).items()}
    name = torch.arange(length).float().expand(batch, len(windows), length)
    contest = CacheContest(pools["ranks"], pools["positions"], pools["clock"], layout, local, sinks)
    for t in range(length):
        if t in (3, 8, 25):
            contest = CacheContest(pools["ranks"], pools["positions"], pools["clock"], layout, local, sinks)
        new = name[..., t : t + 1, None]
        plain = {name: pool.clone() for name, pool in pools.items()}
        step = (new, new, ranks[..., t : t + 1], real[:, t : t + 1] if masked else None)
        insert_key_reference(*step, **plain, layout=layout, local=local, sinks=sinks)
        contest.insert(*step, **pools)
        for each, pool in pools.items():
            assert torch.equal(plain[each].nan_to_num(nan=7.5), pool.nan_to_num(nan=7.5)), (each, t)
    check_holds(pools, ranks, windows, layout, real, local, sinks)


def check_holds(
    pools: dict[str, Tensor],
    ranks: Tensor,
    windows: tuple[int, ...],
    layout: RaggedLayout,
    mask: Tensor,
    local: int,
    sinks: int,
) -> None:
    batch, _, length = ranks.shape
    alive = key_expiry(ranks, windows, local=local, sinks=sinks, key_mask=mask) == length
    for b, g in itertools.product(range(batch), range(len(windows))):
        part = slice(layout.offsets[g], layout.offsets[g + 1])
        there = pools["positions"][b, part] >= 0
        assert set(pools["keys"][b, part, 0][there].long().tolist()) == set(alive[b, g].nonzero()[:, 0].tolist())
