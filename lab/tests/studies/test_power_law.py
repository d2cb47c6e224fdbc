"""Fits of power laws: what is put in comes out, and the intervals say how sure that is."""

from __future__ import annotations

import numpy as np
import pytest

from dynamask.errors import InvalidInputError
from dynamask_lab.studies.scaling.power_law import fit_power_law

COMPUTE = np.array([1e15, 1e15, 4e15, 1.6e16, 6e16, 2e17])


def test_a_law_is_found_again() -> None:
    law = fit_power_law(COMPUTE, 30 * COMPUTE**-0.06)
    assert law.exponent == pytest.approx(0.06)
    assert law(COMPUTE) == pytest.approx(30 * COMPUTE**-0.06)
    assert law.exponent_interval == pytest.approx((0.06, 0.06))


def test_a_floor_is_found_where_it_is_asked_for() -> None:
    loss = 1.5 + 2.0 * (COMPUTE / 1e16) ** -0.3
    law = fit_power_law(COMPUTE, loss, floor=True, samples=20)
    assert law.floor == pytest.approx(1.5, abs=0.05)
    assert law.exponent == pytest.approx(0.3, abs=0.05)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(60):
        loss = 30 * COMPUTE**-0.06 * np.exp(random.normal(0, 0.01, len(COMPUTE)))
        low, high = fit_power_law(COMPUTE, loss, samples=200, seed=trial).exponent_interval
        inside += low <= 0.06 <= high
    assert 0.7 <= inside / 60 <= 1.0
    assert high - low > 1e-3


def test_two_points_give_a_line_and_no_interval() -> None:
    law = fit_power_law(np.array([1.0, 100.0]), np.array([4.0, 2.0]))
    assert law.exponent == pytest.approx(np.log(2) / np.log(100))
    assert np.isnan(law.exponent_interval).all()


@pytest.mark.parametrize(
    ("compute", "loss", "floor"),
    [([1.0], [1.0], False), ([1.0, 1.0], [1.0, 2.0], False), ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], True)],
)
def test_too_few_points_are_refused(compute: list[float], loss: list[float], floor: bool) -> None:
    with pytest.raises(InvalidInputError, match="different computes"):
        fit_power_law(np.array(compute), np.array(loss), floor=floor)


def test_values_that_are_no_losses_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="positive and finite"):
        fit_power_law(np.array([1.0, 2.0]), np.array([1.0, np.nan]))
