"""The study `reading`: its forms, the slices of its losses, and what they say about the goal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynamask_lab.studies import READING, Record
from dynamask_lab.studies.judged import share_of_pairs
from dynamask_lab.studies.reading.report import report_reading
from dynamask_lab.studies.reading.study import (
    CHOSEN,
    HALF,
    LEVEL,
    SLIDING,
    forms,
    reading_name,
    reading_summary,
    sliced,
)
from dynamask_lab.sweeps.verdicts import NOT_TESTED, REFUTED, REPRODUCED


def test_sparse_forms_see_an_eighth_of_the_pairs() -> None:
    configs = READING.configs("4M")
    assert [reading_name(config) for config in configs[::3]] == [*forms(), HALF]
    assert {config["seed"] for config in configs} == {0, 1, 2}
    for config in configs:
        assert share_of_pairs(config) == 1 if config["attention"] == "mha" else share_of_pairs(config) < 1 / 8
    assert len({str(config) for config in configs}) == 24


def _record(config: dict[str, Any], far: float) -> Record:
    buckets = [(0, 3.0, 10), (1, 2.0, 5), (256, far, 4), (8192, far + 1, 2)]
    uses = [{"from": start, "to": 2 * start, "loss": loss, "tokens": tokens} for start, loss, tokens in buckets]
    result = {"last_use": uses, "test": far, "flops": 1e15, "parameters": {"non_embedding": 4_000_000}}
    return Record("reading", str(config), config, config["seed"], result, 1.0, "test", {}, None)


def test_the_far_slices_decide(tmp_path: Path) -> None:
    level = {"dense": 2.0, f"{CHOSEN}, twice the tokens": 1.5, f"{SLIDING}, twice the tokens": 1.0}
    records = [
        _record(config, level[name] + 0.01 * config["seed"] ** 2 * (name == "dense"))
        for config in READING.configs("4M")
        if (name := reading_name(config)) in level
    ]
    assert sliced(records[0])["8192 and more"] == (pytest.approx(3.0), 2)
    section = report_reading(records, tmp_path)
    verdicts = {finding.subject: finding.verdict for finding in section.findings}
    assert len(verdicts) == 4
    for subject, verdict in verdicts.items():
        assert verdict == (NOT_TESTED if "against dense" in subject else REFUTED)
    assert [row["form"] for row in reading_summary(records)] == list(level)


@pytest.mark.parametrize(
    ("half", "rival", "verdict"), [(1.8, HALF, REPRODUCED), (1.4, HALF, REFUTED), (2.1, "dense", REPRODUCED)]
)
def test_dense_attention_is_judged_at_its_better_rate(half: float, rival: str, verdict: str, tmp_path: Path) -> None:
    level = {"dense": 2.0, f"{CHOSEN}, twice the tokens": 1.5, HALF: half}
    records = [
        _record(config, level[name]) for config in READING.configs("4M") if (name := reading_name(config)) in level
    ]
    findings = report_reading(records, tmp_path).findings
    assert {finding.verdict for finding in findings} == {verdict}
    assert {finding.subject.partition("against ")[2].rpartition(", ")[0] for finding in findings} == {rival}


def test_the_form_without_slopes_is_judged_apart(tmp_path: Path) -> None:
    level = {"dense": 2.0, f"{LEVEL}, equal tokens": 1.5, f"{SLIDING}, equal tokens": 1.5}
    records = [
        _record(config, level[name]) for config in READING.configs("4M") if (name := reading_name(config)) in level
    ]
    subjects = [finding.subject for finding in report_reading(records, tmp_path).findings]
    assert len(subjects) == 4
    assert all(subject.startswith(f"{LEVEL}, equal tokens, against") for subject in subjects)
