"""The arithmetic by which programs share the walk's steps, as Python: the kernel compiles these same functions."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")

from dynamask.ops.triton.pieces_hopper import chunk_steps, piece_queries, proceed, search_levels


def shares_of(
    walks: list[tuple[int, int]], programs: int, target: int, m: int, overhead: int
) -> list[list[tuple[int, int, int]]]:
    """Tile, first query and end of the pieces of each program, as its producer finds them."""
    through = list(accumulate(-(-length // m) + overhead if length else 0 for _, length in walks))
    total = through[-1]
    chunk = chunk_steps.fn(total, programs, target)
    shares = []
    for program in range(programs):
        pieces = []
        low = program * chunk
        high = min(low + chunk, total)
        while low < total:
            tile = bisect_right(through, low)
            start, length = walks[tile]
            before = through[tile - 1] if tile else 0
            begin, end = piece_queries.fn(low, high, before, through[tile], start, start + length, m, overhead)
            if begin < end:
                pieces.append((tile, begin, end))
            proceeded = proceed.fn(low, high, through[tile], chunk, programs, total)
            assert proceeded[0] > low  # or the kernel would not end
            low, high = proceeded
        shares.append(pieces)
    return shares


lengths = st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 3000))


@given(
    walks=st.lists(st.tuples(st.integers(0, 2000), lengths), min_size=1, max_size=40),
    programs=st.sampled_from([1, 3, 132]),
    target=st.sampled_from([1, 2, 7, 128]),
    m=st.sampled_from([1, 16, 64]),
    overhead=st.integers(0, 5),
)
@example(walks=[(7, 0)] * 5, programs=132, target=128, m=16, overhead=2)
@example(walks=[(0, 0), (3, 1), (0, 0)], programs=132, target=128, m=64, overhead=2)
@example(walks=[(0, 3000)] * 40, programs=3, target=1, m=16, overhead=5)
def test_pieces_cover_every_walk_once(
    walks: list[tuple[int, int]], programs: int, target: int, m: int, overhead: int
) -> None:
    """No query of a walk is left out or taken twice, and steps start where those of the whole walk would."""
    covered: dict[int, list[tuple[int, int]]] = {}
    for pieces in shares_of(walks, programs, target, m, overhead):
        for tile, begin, end in pieces:
            covered.setdefault(tile, []).append((begin, end))
    for tile, (start, length) in enumerate(walks):
        reached = start
        for begin, end in sorted(covered.get(tile, [])):
            assert begin == reached
            assert (begin - start) % m == 0
            reached = end
        assert reached == start + length


@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize("target", [1, 128])
def test_programs_have_equal_shares(programs: int, target: int) -> None:
    """Whatever the walks, to within one chunk: of about as many steps as asked for, where there are enough."""
    walks = [(0, 1 + tile**3 % 30011) for tile in range(300)]
    steps = [
        sum(-(-(end - begin) // 16) for _, begin, end in pieces) for pieces in shares_of(walks, programs, target, 16, 0)
    ]
    total = sum(steps)
    chunk = chunk_steps.fn(total, programs, target)
    assert chunk <= 1.5 * max(target, 1)
    assert max(steps) <= -(-total // (programs * chunk)) * chunk
    if target == 128:
        assert chunk >= target // 2
        assert max(steps) <= 1.01 * total / programs + 1


@pytest.mark.parametrize(("count", "fanout", "levels"), [(1, 256, 1), (256, 256, 1), (257, 256, 2), (9, 2, 4)])
def test_search_reaches_every_tile(count: int, fanout: int, levels: int) -> None:
    assert search_levels(count, fanout) == levels
