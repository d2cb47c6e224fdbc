"""Tests of the list that several processes share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynamask_lab.studies.conversion import close, final, gemma, settle
from dynamask_lab.studies.conversion.forms import Spec, Turn
from dynamask_lab.studies.conversion.jobs import Job

TRAINED = Spec("converted", 512, distilled=True)
ENTRIES = [
    final.Entry((Job(TRAINED, "loss"),), trains=True),
    final.Entry((Job(TRAINED, "tasks"), Job(TRAINED, "benchmark"))),
    final.Entry((Job(Spec("dense"), "long"),)),
]


def _take(role: str, claims: Path, *, trained: bool = True, fits: bool = True, over: bool = False) -> list[str]:
    made = final.claimed(
        role,
        claims,
        done=lambda job: False,
        ready=lambda spec: trained or not spec.trained,
        fits=lambda spec: fits,
        over=lambda: over,
        listed=ENTRIES,
    )
    return [job.measure for job in made]


def test_every_entry_is_done_once(tmp_path: Path) -> None:
    assert _take("trainer", tmp_path) == ["loss", "tasks", "benchmark", "long"]
    assert _take("trainer", tmp_path) == []


def test_an_evaluator_trains_nothing_and_takes_what_is_ready(tmp_path: Path) -> None:
    made = final.claimed(
        "evaluator",
        tmp_path,
        done=lambda job: False,
        ready=lambda spec: not spec.trained,
        fits=lambda spec: True,
        over=iter((False, False, True)).__next__,
        listed=ENTRIES,
        patience=0.0,
    )
    assert [job.measure for job in made] == ["long"]
    assert _take("evaluator", tmp_path) == ["tasks", "benchmark"]


def test_a_claim_of_a_process_that_runs_holds_and_one_of_a_dead_process_does_not(tmp_path: Path) -> None:
    (tmp_path / ENTRIES[0].key).write_text(str(os.getpid()))
    (tmp_path / ENTRIES[1].key).write_text("999999999")
    assert _take("trainer", tmp_path) == ["tasks", "benchmark", "long"]


@pytest.mark.parametrize("role", final.ROLES)
def test_nothing_begins_when_the_time_is_up(role: str, tmp_path: Path) -> None:
    assert _take(role, tmp_path, over=True) == []


def test_an_idle_entry_waits_while_something_trains(tmp_path: Path) -> None:
    listed = [final.Entry((Job(Spec("dense"), "long"),), idle=True), final.Entry((Job(Spec("dense"), "loss"),))]
    made = final.claimed(
        "evaluator",
        tmp_path,
        done=lambda job: False,
        ready=lambda spec: True,
        fits=lambda spec: True,
        over=lambda: False,
        listed=listed,
        patience=0.0,
        free=iter((False, False, True)).__next__,
    )
    assert [job.measure for job in made] == ["loss", "long"]


def test_one_process_at_a_time_has_the_turn(tmp_path: Path) -> None:
    mine, other = Turn(tmp_path / "turn"), Turn(tmp_path / "turn")
    with mine:
        assert other.free()
        mine.take()
        mine.take()
        assert not other.free()
    assert other.free()


def test_no_job_is_listed_twice_and_every_comparison_is_measured() -> None:
    entries = final.entries()
    assert len(gemma.jobs()) == len({job.key for job in gemma.jobs()})
    keys = [job.key for entry in entries for job in entry.jobs]
    assert len(keys) == len(set(keys))
    forms = {job.spec for job in final.jobs()} | {job.spec for job in close.jobs()}
    assert all(spec in forms for _, spec, _ in (*final.COMPARISONS, *close.COMPARISONS))


def test_the_list_that_settles_the_default_trains_each_form_once() -> None:
    entries = settle.entries()
    for listed in (entries, settle.tried()):
        keys = [job.key for entry in listed for job in entry.jobs]
        assert len(keys) == len(set(keys))
    assert all(not (entry.spec.average or entry.spec.mixed != 1) for entry in entries if entry.trains)
    specs = {job.spec for job in settle.jobs()}
    assert {spec for _, spec, _ in settle.COMPARISONS} <= specs | {close.ADAPTED}
