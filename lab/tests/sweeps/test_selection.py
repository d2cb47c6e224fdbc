"""Part of a sweep, chosen by settings."""

from __future__ import annotations

import pytest

from dynamask.errors import UsageError
from dynamask_lab.sweeps.selection import parse_conditions, select

RUNS = [
    {"corpus": corpus, "seed": seed, "window": window}
    for corpus in ("code", "text")
    for seed in (0, 1)
    for window in (None, 32)
]


def test_every_setting_must_have_one_of_its_wanted_values() -> None:
    found = select(RUNS, parse_conditions(["corpus=code", "seed=0", "seed=1", "window=null"]))
    assert found == [{"corpus": "code", "seed": seed, "window": None} for seed in (0, 1)]
    assert select(RUNS, {}) == RUNS


def test_a_setting_that_no_run_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'corpsu' \(did you mean 'corpus'\?\)"):
        select(RUNS, parse_conditions(["corpsu=code"]))


@pytest.mark.parametrize("text", ["corpus", "=code"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=VALUE"):
        parse_conditions([text])
