"""The arithmetic by which programs share the walk's steps, as Python: the kernel compiles these same functions."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")

from dynamask.ops.hopper.tile_scheduler import chunk_steps, own_queries, piece_queries, proceed, search_levels


def shares_of(
    legs: list[tuple[int, int]], programs: int, target: int, m: int, overhead: int
) -> list[list[tuple[int, int, int]]]:
    """Leg, first query and end of the pieces of each program, as its producer finds them."""
    through = list(accumulate(-(-length // m) + overhead if length else 0 for _, length in legs))
    total = through[-1]
    chunk = chunk_steps.fn(total, programs, target)
    shares = []
    for program in range(programs):
        pieces = []
        low = program * chunk
        high = min(low + chunk, total)
        while low < total:
            leg = bisect_right(through, low)
            start, length = legs[leg]
            before = through[leg - 1] if leg else 0
            begin, end = piece_queries.fn(low, high, before, through[leg], start, start + length, m, overhead)
            if begin < end:
                pieces.append((leg, begin, end))
            proceeded = proceed.fn(low, high, through[leg], chunk, programs, total)
            assert proceeded[0] > low  # or the kernel would not end
            low, high = proceeded
        shares.append(pieces)
    return shares


lengths = st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 3000))


@given(
    legs=st.lists(st.tuples(st.integers(0, 2000), lengths), min_size=1, max_size=40),
    programs=st.sampled_from([1, 3, 132]),
    target=st.sampled_from([1, 2, 7, 128]),
    m=st.sampled_from([1, 16, 64]),
    overhead=st.integers(0, 5),
)
@example(legs=[(7, 0)] * 5, programs=132, target=128, m=16, overhead=2)
@example(legs=[(0, 0), (3, 1), (0, 0)], programs=132, target=128, m=64, overhead=2)
@example(legs=[(0, 3000)] * 40, programs=3, target=1, m=16, overhead=5)
def test_pieces_cover_every_leg_once(
    legs: list[tuple[int, int]], programs: int, target: int, m: int, overhead: int
) -> None:
    """No query of a leg is left out or taken twice, and steps start where those of the whole leg would."""
    covered: dict[int, list[tuple[int, int]]] = {}
    for pieces in shares_of(legs, programs, target, m, overhead):
        for leg, begin, end in pieces:
            covered.setdefault(leg, []).append((begin, end))
    for leg, (start, length) in enumerate(legs):
        reached = start
        for begin, end in sorted(covered.get(leg, [])):
            assert begin == reached
            assert (begin - start) % m == 0
            reached = end
        assert reached == start + length


@pytest.mark.parametrize("programs", [1, 3, 132])
@pytest.mark.parametrize("target", [1, 128, 10**6])
def test_programs_have_equal_shares(programs: int, target: int) -> None:
    """Whatever the legs, to within one chunk: of about as many steps as asked for, where there are enough."""
    legs = [(0, 1 + leg**3 % 30011) for leg in range(300)]
    steps = [
        sum(-(-(end - begin) // 16) for _, begin, end in pieces) for pieces in shares_of(legs, programs, target, 16, 0)
    ]
    total = sum(steps)
    chunk = chunk_steps.fn(total, programs, target)
    assert chunk <= 1.5 * target
    if target == 10**6:  # more than there is: one chunk each
        assert chunk == -(-total // programs)
    assert max(steps) <= -(-total // (programs * chunk)) * chunk
    if target == 128:
        assert chunk >= target // 2
        assert max(steps) <= 1.01 * total / programs + 1


@given(
    begin=st.integers(0, 300),
    length=st.integers(1, 300),
    earliest=st.integers(0, 700),
    last=st.integers(0, 700),
    m=st.sampled_from([1, 16, 64]),
)
@example(begin=100, length=200, earliest=700, last=0, m=16)  # none of these keys lives
def test_both_consumers_take_as_many_steps(begin: int, length: int, earliest: int, last: int, m: int) -> None:
    """What a consumer passes over, and does, is what the producer copies; it passes over nothing that its keys see."""
    end = begin + length
    before, first, stop, after = own_queries.fn(begin, end, earliest, last, m)
    taken = list(range(first, stop, m))
    assert min(before, after) >= 0
    assert before + len(taken) + after == len(range(begin, end, m))
    assert first == begin + before * m
    done = {position for start in taken for position in range(start, start + m)}
    assert done >= set(range(max(begin, earliest), min(end, last)))
    assert all(start < last and start + m > min(earliest, end - 1) for start in taken)


@pytest.mark.parametrize(("count", "fanout", "levels"), [(1, 256, 1), (256, 256, 1), (257, 256, 2), (9, 2, 4)])
def test_search_reaches_every_leg(count: int, fanout: int, levels: int) -> None:
    assert search_levels(count, fanout) == levels
