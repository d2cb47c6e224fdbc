"""Tiles of the walk on Hopper, by Triton's interpreter on a CPU: what they cover, and where sums go."""

from __future__ import annotations

import os

import pytest
import torch

from dynamask import key_expiry

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU, or TRITON_INTERPRET=1",
)
pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")

from tests.ops.test_triton_kernels import DEVICE, quick_sort, scores_of  # noqa: E402, F401

KEYS, STEP, OVERHEAD, PROGRAMS = 16, 8, 2, 3


@pytest.mark.parametrize(
    ("kind", "windows", "local", "queries"),
    [
        ("random", (10, 14), 7, 64),
        pytest.param("random", (14, 40), 7, 90, marks=pytest.mark.slow),
        pytest.param("random", (30, 9), 0, 96, marks=pytest.mark.slow),
        pytest.param("rising", (8, 50), 0, 96, marks=pytest.mark.slow),
        pytest.param("falling", (1, 96), 0, 41, marks=pytest.mark.slow),
        pytest.param("ties", (96, 1), 1, 1, marks=pytest.mark.slow),
    ],
)
def test_tiles_cover_what_is_seen_once(
    monkeypatch: pytest.MonkeyPatch, kind: str, windows: tuple[int, ...], local: int, queries: int
) -> None:
    """Every pair of a query and a key that it sees is in one tile; a whole tile's keys are in no other."""
    from dynamask.ops.hopper import tile_scheduler, walk_tiles
    from dynamask.ops.triton import lists

    for module, name, value in (
        (walk_tiles, "_SHORT", 16),
        (walk_tiles, "_SLAB", 32),
        (walk_tiles, "_PART", 32),
        (lists, "_LARGE", ((1 << 62, 32),)),
        (lists, "_RUNS", ((1 << 62, 32),)),
    ):
        monkeypatch.setattr(module, name, value)
    length, groups, target = 96, 2, 7
    zero = length - queries
    scores = scores_of(kind, (1, groups, length), torch.Generator().manual_seed(0)).to(DEVICE)
    expiry = key_expiry(scores, windows, local=local, sinks=0 if min(windows) == 1 else 1)
    expiry[0, 1] = torch.arange(length) if local == 0 else expiry[0, 1]  # a row in which nothing lives
    spans = lists.build_lists_and_spans(expiry, queries, 16, windows)[1]
    assert spans.span == 32
    tiles = walk_tiles.walk_tiles(expiry, spans, queries, KEYS, STEP, OVERHEAD)
    sums = torch.full((1, groups, length, 16), 7.0, device=DEVICE), torch.full((1, groups, length, 32), 7.0).to(DEVICE)
    walk_tiles.clear_sums(expiry, tiles, sums, KEYS, PROGRAMS, target, OVERHEAD)

    order = tiles.order.view(groups, tiles.slots, KEYS).long().cpu()
    starts, ends, whole = (t.view(groups, tiles.slots).tolist() for t in (tiles.starts, tiles.ends, tiles.whole))
    dies, born = expiry.view(-1, length).cpu().long(), torch.arange(length)
    seen = torch.zeros(groups, length, length, dtype=torch.int32)
    near = -(-length // KEYS)
    steps = []
    alone: dict[tuple[int, int], int] = {}
    places: dict[tuple[int, int], list[int]] = {}
    for row in range(groups):
        for slot in range(tiles.slots):
            start, end = starts[row][slot], ends[row][slot]
            low, high = zero, length
            if slot >= near:
                low = zero + (slot - near) // (-(-max(spans.capacities) // KEYS)) * 32
                high = min(low + 32, length)
            steps.append(-(-(end - start) // STEP) + OVERHEAD if end > start else 0)
            assert end <= start or (low <= start and end <= high and (start - zero) % STEP == 0)
            for key in order[row, slot].tolist():
                if key < 0:
                    continue
                places.setdefault((row, key), []).append(slot)
                first, last = max(key, low), min(int(dies[row, key]), high)
                if first < last:
                    assert start <= first
                    assert last <= end
                    seen[row, first:last, key] += 1
            if end > start:
                alone[row, slot] = whole[row][slot]
                assert whole[row][slot] in ((0, 1) if slot < near else (0,))
            else:
                assert whole[row][slot] == -1
    query = torch.arange(length)[None, :, None]
    wanted = (born <= query) & (query < dies[:, None, :]) & (query >= zero)
    assert torch.equal(seen, wanted.int())
    through = tiles.through.tolist()
    assert through == torch.tensor(steps).cumsum(0).tolist()

    # Whole: one piece, by a walk through all programs' pieces.
    pieces = [0] * len(through)
    chunk = tile_scheduler.chunk_steps.fn(through[-1], PROGRAMS, target)
    for program in range(PROGRAMS):
        low = program * chunk
        high = min(low + chunk, through[-1])
        while low < through[-1]:
            leg = next(i for i, last in enumerate(through) if last > low)
            row, slot = divmod(leg, tiles.slots)
            begin, end = tile_scheduler.piece_queries.fn(
                low, high, through[leg - 1] if leg else 0, through[leg], starts[row][slot], ends[row][slot], STEP,
                OVERHEAD,
            )  # fmt: skip
            pieces[leg] += begin < end
            low, high = tile_scheduler.proceed.fn(low, high, through[leg], chunk, PROGRAMS, through[-1])
    for (row, slot), kind_of_tile in alone.items():
        if slot < near:
            assert kind_of_tile == (pieces[row * tiles.slots + slot] == 1)

    gradients = tuple(torch.full_like(t, 5.0) for t in sums)
    walk_tiles.narrow_sums(expiry, tiles, sums, gradients, KEYS)
    for row in range(groups):
        for key in range(length):
            lives = bool(dies[row, key] > key)
            slots = places.get((row, key), [])
            written = lives and len(slots) == 1 and slots[0] < near and whole[row][slots[0]] == 1
            at = divmod(row, groups)
            assert all((t[at][key] == (5.0 if written else 0.0)).all() for t in gradients)
            if any(whole[row][slot] == 0 for slot in slots):
                assert all((t[at][key] == 0).all() for t in sums)
