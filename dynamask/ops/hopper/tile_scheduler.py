"""How the persistent programs of the walk on Hopper share its steps.

The walks of a pass, here legs, are laid end to end by row and tile, and cut into chunks of equally many steps, as
many chunks for each of the P programs, which takes every P-th of them. Programs thus finish together, and those that
run at the same time share the queries of a few spans in the L2 cache: tiles stand by span of queries, and by position.
A chunk that crosses legs falls into pieces, each of one leg.

All but `leg_of` is arithmetic alone: without its decorator it is Python on integers, and is tested as such.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def chunk_steps(total, programs, TARGET: gl.constexpr):
    """Steps of each chunk: about TARGET, and such that every program gets as many chunks as the others."""
    rounds = (total + programs * TARGET // 2) // (programs * TARGET)
    chunks = programs * max(rounds, 1)
    return (total + chunks - 1) // chunks


@gluon.jit
def piece_queries(low, high, before, after, start, end, M: gl.constexpr, OVERHEAD: gl.constexpr):
    """First query of a leg in the steps [low, high), and the one after the last; there may be none.

    Of all steps, the leg has [before, after): OVERHEAD without queries, then steps of M queries from `start` to `end`.
    """
    begin = start + max(low - before - OVERHEAD, 0) * M
    return begin, min(start + max(min(high, after) - before - OVERHEAD, 0) * M, end)


@gluon.jit
def proceed(low, high, after, chunk, programs, total):
    """What is left of the chunk [low, high) behind a leg that ends with step `after`, or else the next chunk."""
    if after < high:
        low = after
    else:
        low = high + (programs - 1) * chunk
        high = min(low + chunk, total)
    return low, high


@gluon.jit
def own_queries(begin, end, earliest, last, M: gl.constexpr):
    """The part of a piece in which a consumer's keys are seen, from `earliest` on and before `last`.

    Its first query and the one after its last, between the steps of M queries that come before it and after it.
    """
    before = max(min(earliest, end) - begin, 0) // M
    first = begin + before * M
    stop = min(last, end)
    after = (end - begin + M - 1) // M - before - (max(stop - first, 0) + M - 1) // M
    return before, first, stop, after


@gluon.jit
def leg_of(step, through, count, FANOUT: gl.constexpr, LEVELS: gl.constexpr):
    """The leg that holds a step: how many of the `count` numbers of `through`, which never fall, are not above it."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    branch = gl.arange(1, FANOUT + 1, flat)
    leg = 0
    for level in gl.static_range(LEVELS):
        width = FANOUT ** (LEVELS - 1 - level)
        last = leg + branch * width - 1
        passed = (last < count) & (gl.load(through + last, mask=last < count, other=0) <= step)
        leg += gl.sum(passed.to(gl.int32), 0) * width
    return leg


def search_levels(count: int, fanout: int) -> int:
    """LEVELS of `leg_of` for `count` numbers."""
    levels = 1
    while fanout**levels < count:
        levels += 1
    return levels
