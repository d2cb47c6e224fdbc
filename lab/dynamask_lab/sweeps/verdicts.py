"""Verdicts: what a difference with its interval says about a claim, by rules that are fixed before the figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dynamask.errors import InvalidInputError

REPRODUCED, REFUTED, NO_DIFFERENCE, NOT_TESTED = "reproduced", "refuted", "no difference", "not tested"
VERDICTS = (REPRODUCED, REFUTED, NO_DIFFERENCE, NOT_TESTED)

LOSS_INTEREST = 0.02
"""Smallest difference of interest between losses, in nats per token."""
SHARE_INTEREST = 0.05
"""Smallest difference of interest between shares of right answers."""
FEW_SEEDS = 3
"""With fewer seeds, no verdict rests on a difference of losses below `FEW_SEEDS_INTEREST`."""
FEW_SEEDS_INTEREST = 0.05

_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12)
"""Quantiles of Student's t for 95% intervals, at 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval; the bounds are NaN where nothing tells the spread.

    Attributes:
        mean: positive where the form is better than what it is compared with.
        low, high: bounds of the interval.
        borrowed: the sweep whose spread the bounds are made of, where one seed has none of its own; else "".
    """

    mean: float
    low: float
    high: float
    borrowed: str = ""

    def __str__(self) -> str:
        return self.shown()

    def shown(self, scale: float = 1.0, digits: int = 3) -> str:
        """ "+0.120 [+0.080, +0.160]", or the mean alone."""
        mean, low, high = (f"{scale * value:+.{digits}f}" for value in (self.mean, self.low, self.high))
        return mean if math.isnan(self.low) else f"{mean} [{low}, {high}]"


def t_quantile(freedom: int) -> float:
    """The quantile of Student's t that bounds a 95% interval; NaN without a degree of freedom."""
    if freedom < 1:
        return math.nan
    if freedom <= len(_T):
        return _T[freedom - 1]
    return 1.96 + 2.5 / freedom  # within 0.01 of the quantile from there on


def mean_interval(values: Sequence[float]) -> Interval:
    """The interval of the mean of independent values, by their spread.

    Raises:
        InvalidInputError: no values.
    """
    if not values:
        raise InvalidInputError("an interval needs at least one value")
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    margin = t_quantile(count - 1) * spread / math.sqrt(count)
    return Interval(mean, mean - margin, mean + margin)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """How far our losses lie below theirs, seed by seed, where runs of one seed share their data.

    Args:
        ours, theirs: seed -> loss; seeds that one side lacks are left out.

    Returns:
        The mean difference and its interval, by Student's t; NaN without a shared seed.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return Interval(math.nan, math.nan, math.nan)
    return mean_interval([theirs[seed] - ours[seed] for seed in shared])


def borrowed_interval(difference: float, others: Sequence[float], lender: str) -> Interval:
    """Give the difference of one seed the spread that the same difference has from seed to seed in another sweep.

    Args:
        difference: of the one seed.
        others: the differences of the other sweep, one per seed.
        lender: name of the other sweep.

    Returns:
        `difference` plus and minus the standard deviation of `others` times the quantile of Student's t at its degrees
        of freedom; without an interval where `others` are fewer than two or not finite.
    """
    spread = SeedSpread.pooled([others])
    margin = t_quantile(spread.freedom) * spread.deviation
    if not math.isfinite(margin + difference):
        return Interval(difference, math.nan, math.nan)
    return Interval(difference, difference - margin, difference + margin, lender)


def borrowed_note(found: Iterable[Interval]) -> str:
    """What stands beside a verdict on these differences: "" where none of their intervals is borrowed."""
    lenders = sorted({each.borrowed for each in found} - {""})
    return f"one seed, interval borrowed from {', '.join(lenders)}" if lenders else ""


@dataclass(frozen=True)
class SeedSpread:
    """How much one setting's losses differ from seed to seed, pooled over settings that have several.

    Attributes:
        deviation: standard deviation.
        freedom: degrees of freedom: runs less settings.
    """

    deviation: float
    freedom: int

    @classmethod
    def pooled(cls, groups: Iterable[Sequence[float]]) -> SeedSpread:
        """From the losses of each setting's seeds."""
        total, freedom = 0.0, 0
        for losses in groups:
            if len(losses) > 1:
                mean = sum(losses) / len(losses)
                total += sum((loss - mean) ** 2 for loss in losses)
                freedom += len(losses) - 1
        return cls(math.sqrt(total / freedom) if freedom else math.nan, freedom)

    def difference(self, ours: Sequence[float], theirs: Sequence[float]) -> Interval:
        """How far our mean loss lies below theirs, with the interval that this spread gives.

        Raises:
            InvalidInputError: no losses on a side.
        """
        if not ours or not theirs:
            raise InvalidInputError("a difference needs losses on both sides")
        mean = sum(theirs) / len(theirs) - sum(ours) / len(ours)
        margin = t_quantile(self.freedom) * self.deviation * math.sqrt(1 / len(ours) + 1 / len(theirs))
        return Interval(mean, mean - margin, mean + margin)


def judge(found: Interval, interest: float, *, seeds: int | None = None) -> str:
    """Judge the claim that a form is better.

    Args:
        found: by how much it is better.
        interest: the smallest difference of interest.
        seeds: where the figures are losses, the least number of seeds on a side.

    Returns:
        `REPRODUCED`: better by at least `interest`, and the interval excludes zero. `REFUTED`: the same the other way
        round. `NO_DIFFERENCE`: the interval lies within `interest` on both sides. `NOT_TESTED`: everything else; the
        figures do not decide. Losses of fewer than `FEW_SEEDS` seeds decide nothing that is smaller than
        `FEW_SEEDS_INTEREST`.
    """
    if not math.isfinite(found.mean) or math.isnan(found.low):
        return NOT_TESTED
    if seeds is not None and seeds < FEW_SEEDS and abs(found.mean) < FEW_SEEDS_INTEREST:
        return NOT_TESTED
    if found.low > 0 and found.mean >= interest:
        return REPRODUCED
    if found.high < 0 and found.mean <= -interest:
        return REFUTED
    if found.low > -interest and found.high < interest:
        return NO_DIFFERENCE
    return NOT_TESTED


def judge_no_worse(found: Interval, interest: float, *, seeds: int | None = None) -> str:
    """Judge the claim that a form is no worse: `REPRODUCED` where the interval excludes a loss of `interest`.

    Args:
        found, interest, seeds: see `judge`.
    """
    verdict = judge(found, interest, seeds=seeds)
    enough = seeds is None or seeds >= FEW_SEEDS
    excluded = enough and found.low > -interest
    return REPRODUCED if verdict in (REPRODUCED, NO_DIFFERENCE) or excluded else verdict


def all_of(verdicts: Sequence[str]) -> str:
    """The verdict on a claim that must hold in every one of several comparisons."""
    if not verdicts or NOT_TESTED in verdicts:
        return REFUTED if REFUTED in verdicts else NOT_TESTED
    for verdict in (REFUTED, NO_DIFFERENCE):
        if verdict in verdicts:
            return verdict
    return REPRODUCED
