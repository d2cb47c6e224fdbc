"""Verdicts: intervals against known figures, and each rule of judgement."""

from __future__ import annotations

import math

import pytest

from dynamask.errors import InvalidInputError
from dynamask_lab.sweeps.section import Finding
from dynamask_lab.sweeps.verdicts import (
    NO_DIFFERENCE,
    NOT_TESTED,
    REFUTED,
    REPRODUCED,
    Interval,
    SeedSpread,
    all_of,
    borrowed_interval,
    borrowed_note,
    judge,
    judge_no_worse,
    mean_interval,
    t_quantile,
)


def test_the_interval_of_a_mean() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_interval([1.0]).low)
    assert str(mean_interval([1.0])) == "+1.000"
    assert Interval(0.12, 0.08, 0.16).shown(100, 1) == "+12.0 [+8.0, +16.0]"
    with pytest.raises(InvalidInputError, match="at least one"):
        mean_interval([])


def test_quantiles_of_t_fall_to_that_of_a_normal_distribution() -> None:
    values = [t_quantile(freedom) for freedom in range(1, 400)]
    assert values == sorted(values, reverse=True)
    assert t_quantile(30) == pytest.approx(2.042, abs=0.01)
    assert t_quantile(10_000) == pytest.approx(1.96, abs=0.001)
    assert math.isnan(t_quantile(0))


def test_one_difference_borrows_the_spread_of_others() -> None:
    found = borrowed_interval(0.5, [0.1, 0.2, 0.3], "larger")
    # A standard deviation of 0.1, and a t of 4.303 at two degrees of freedom: of one seed, not of a mean of three.
    assert (found.low, found.high) == pytest.approx((0.5 - 0.4303, 0.5 + 0.4303))
    assert borrowed_note([Interval(0.1, 0.0, 0.2), found]) == "one seed, interval borrowed from larger"
    for others in ([], [0.1], [0.1, math.inf]):
        alone = borrowed_interval(0.5, others, "larger")
        assert math.isnan(alone.low)
        assert borrowed_note([alone]) == ""
    assert math.isnan(borrowed_interval(math.inf, [0.1, 0.2], "larger").low)


def test_the_spread_of_seeds_is_pooled_over_settings() -> None:
    spread = SeedSpread.pooled([[1.0, 3.0], [5.0, 7.0], [9.0]])
    assert spread.freedom == 2
    assert spread.deviation == pytest.approx(math.sqrt(2))
    found = spread.difference([1.0], [2.0, 4.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 * math.sqrt(2) * math.sqrt(1.5), rel=1e-3)
    assert math.isnan(SeedSpread.pooled([[1.0]]).difference([1.0], [2.0]).low)


@pytest.mark.parametrize(
    ("found", "seeds", "verdict"),
    [
        (Interval(0.1, 0.05, 0.15), None, REPRODUCED),
        (Interval(-0.1, -0.15, -0.05), None, REFUTED),
        (Interval(0.005, -0.01, 0.015), None, NO_DIFFERENCE),
        (Interval(0.005, 0.004, 0.006), None, NO_DIFFERENCE),  # certain, and too small to matter
        (Interval(0.1, -0.05, 0.25), None, NOT_TESTED),
        (Interval(0.015, 0.005, 0.025), None, NOT_TESTED),
        (Interval(0.04, 0.03, 0.05), 2, NOT_TESTED),
        (Interval(0.04, 0.03, 0.05), 3, REPRODUCED),
        (Interval(0.1, 0.05, 0.15), 1, REPRODUCED),
        (Interval(0.1, math.nan, math.nan), 3, NOT_TESTED),
        (Interval(-math.inf, -math.inf, -math.inf), 3, NOT_TESTED),
    ],
)
def test_judgement(found: Interval, seeds: int | None, verdict: str) -> None:
    assert judge(found, 0.02, seeds=seeds) == verdict
    mirrored = {REPRODUCED: REFUTED, REFUTED: REPRODUCED}
    other = Interval(-found.mean, -found.high, -found.low)
    assert judge(other, 0.02, seeds=seeds) == mirrored.get(verdict, verdict)


def test_no_worse_is_borne_out_by_no_difference() -> None:
    assert judge_no_worse(Interval(-0.005, -0.01, 0.01), 0.02) == REPRODUCED
    assert judge_no_worse(Interval(-0.1, -0.15, -0.05), 0.02) == REFUTED
    assert judge_no_worse(Interval(-0.01, -0.05, 0.03), 0.02) == NOT_TESTED


def test_a_claim_about_several_rivals() -> None:
    assert all_of([REPRODUCED, REPRODUCED]) == REPRODUCED
    assert all_of([REPRODUCED, NO_DIFFERENCE]) == NO_DIFFERENCE
    assert all_of([REPRODUCED, NOT_TESTED]) == NOT_TESTED
    assert all_of([NOT_TESTED, REFUTED]) == REFUTED
    assert all_of([]) == NOT_TESTED


def test_a_finding_has_one_of_the_verdicts() -> None:
    with pytest.raises(InvalidInputError, match="a verdict is one of reproduced"):
        Finding("recall", "dma", "0.5", "held", [])
