"""Sequences of multi-query associative recall (MQAR, arXiv 2312.04927): key-value pairs, then keys to be answered.

    position  0    1    2    3    4    5    6    7    8    9
    input     k1   v1   k2   v2   .    .    k2   .    k1   .
    label     -    -    -    -    -    -    v2   -    v1   -

The distribution is that of `zoology/data/multiquery_ar.py` (HazyResearch/zoology, commit d88d6f5), drawn in whole
arrays instead of row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynamask.errors import InvalidInputError

IGNORED = -100
"""The label of a position that asks nothing."""


@dataclass(frozen=True)
class MqarExamples:
    """E sequences of one length N with P pairs each.

    Attributes:
        inputs: (E, N) int32 tokens. Keys are 1 to V/2 - 1, values V/2 to V - 1; with random fillers, the other
            positions are anything from 0 to V - 1, else 0.
        queries: (E, P) int64, the position of each pair's query, in the pairs' order.
        answers: (E, P) int64, the value to be given there.
    """

    inputs: Tensor
    queries: Tensor
    answers: Tensor

    def labels(self) -> Tensor:
        """(E, N) int64: the answer at every query's own position, not the one after it; -100 elsewhere."""
        labels = torch.full(self.inputs.shape, IGNORED, dtype=torch.long)
        return labels.scatter_(1, self.queries, self.answers)

    def to(self, device: torch.device) -> MqarExamples:
        """The same sequences on a device."""
        return MqarExamples(self.inputs.to(device), self.queries.to(device), self.answers.to(device))


def mqar_examples(
    examples: int,
    length: int,
    pairs: int,
    *,
    vocab_size: int = 8192,
    power: float = 0.1,
    random_fillers: bool = True,
    seed: int | list[int] = 0,
) -> MqarExamples:
    """Draw sequences: `pairs` distinct keys, each followed by its value, then every key once more as a query.

    Queries stand on even places behind the pairs. The gap of the first pair's query, in places of two, is drawn
    from p(g) ∝ g^(power - 1), the second's from what is left, and so on: small gaps are the likelier ones.

    Args:
        examples: E.
        length: N, even.
        pairs: P; the pairs and a place for every query must fit, 4·P <= N.
        vocab_size: V, more than N, and wide enough for P distinct keys.
        power: the exponent α of the gaps. 0.1 in the Zoology paper, 0.01 by default in its code; 1 is uniform.
        random_fillers: fill the positions between the queries with random tokens; False: with token 0.
        seed: an integer, or several: other integers, other sequences. The same seed gives the same sequences.

    Raises:
        InvalidInputError: numbers that do not fit together, named.
    """
    if examples < 1 or pairs < 1:
        raise InvalidInputError(f"examples and pairs must be at least 1; got {examples} and {pairs}")
    if length % 2 or 4 * pairs > length:
        raise InvalidInputError(
            f"length must be even and hold {pairs} pairs and their queries, at least {4 * pairs} tokens; got {length}"
        )
    if vocab_size <= length or vocab_size // 2 - 1 < pairs:
        raise InvalidInputError(
            f"vocab_size must exceed the length ({length}) and hold {pairs} keys besides token 0 in its first half; "
            f"got {vocab_size}"
        )
    if not power > 0:
        raise InvalidInputError(f"power must be positive; got {power}")
    generator = np.random.default_rng(seed)
    first_value = vocab_size // 2
    keys = 1 + _distinct(generator, examples, first_value - 1, pairs)
    values = first_value + _distinct(generator, examples, vocab_size - first_value, pairs)
    queries = 2 * pairs + 2 * _gaps(generator, examples, (length - 2 * pairs) // 2, pairs, power)

    inputs = np.zeros((examples, length), dtype=np.int32)
    inputs[:, 0 : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    np.put_along_axis(inputs, queries, keys.astype(np.int32), axis=1)
    if random_fillers:
        # Token 0 is neither key nor value, so zeros are exactly the positions nothing was written to.
        fillers = generator.integers(vocab_size, size=inputs.shape, dtype=np.int32)
        inputs = np.where(inputs == 0, fillers, inputs)
    return MqarExamples(*map(torch.from_numpy, (inputs, queries, values)))


def _distinct(generator: np.random.Generator, rows: int, pool: int, count: int) -> np.ndarray:
    """(rows, count) int64 in [0, pool), no number twice in a row, every such row equally likely.

    Repetitions are drawn again until there are none. Nothing here tells one number of the pool from another, so
    the outcome cannot favour any.
    """
    drawn = generator.integers(pool, size=(rows, count))
    open_rows = np.arange(rows)
    while len(open_rows):
        part = drawn[open_rows]
        order = part.argsort(axis=1, kind="stable")
        in_order = np.take_along_axis(part, order, axis=1)
        repeats = np.zeros_like(part, dtype=bool)
        np.put_along_axis(repeats, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
        part[repeats] = generator.integers(pool, size=int(repeats.sum()))
        drawn[open_rows] = part
        open_rows = open_rows[repeats.any(axis=1)]
    return drawn


def _gaps(generator: np.random.Generator, rows: int, places: int, count: int, power: float) -> np.ndarray:
    """(rows, count) int64 in [0, places), drawn one after the other without replacement, g with weight (g+1)^(power-1).

    A race: place g arrives after an exponential time of rate weight(g), and the order of arrival is the order of
    such draws (`numpy.random.choice(p=..., replace=False)`), for a whole array at once.
    """
    weight = np.arange(1, places + 1, dtype=np.float64) ** (power - 1)
    gaps = np.empty((rows, count), dtype=np.int64)
    chunk = max(1, 2**22 // places)  # 32 MB of arrival times
    for first in range(0, rows, chunk):
        arrival = generator.exponential(size=(min(chunk, rows - first), places)) / weight
        gaps[first : first + chunk] = arrival.argsort(axis=1)[:, :count]
    return gaps
