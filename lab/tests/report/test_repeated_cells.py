"""Cells of the exhibits that were measured again agree with the first measurement, as the page of failures says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamask_lab.sweeps.verdicts import LOSS_INTEREST

RESULTS = Path(__file__).parents[2] / "results"


def _rows(file: str, part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / file).read_text())[part]
    return rows


def test_the_cost_of_attention_repeats_on_another_card() -> None:
    shape = {"N": 32768, "D": 128, "H": 16, "G": 4, "w": 2048, "scores": "random"}
    (first,) = (row for row in _rows("h100-attention.json", "attention") if row.items() >= shape.items())
    again = next(row for row in _rows("h200-kernels-morning.json", "rows") if row["name"] == "equal 2048 bias")
    assert again["N"] == 32768
    assert again["windows"] == [2048] * 4
    parts = ("expiry", "lists", "forward", "backward")
    assert sum(again[part] for part in parts) == pytest.approx(sum(first[f"{part}_ms"] for part in parts), rel=0.05)


def test_a_loss_of_the_leak_repeats_on_the_same_corpus() -> None:
    lines = {
        name: [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
        for name in ("ablation-leak.jsonl", "again/leak.jsonl")
    }
    (again,) = lines["again/leak.jsonl"]
    (first,) = (line for line in lines["ablation-leak.jsonl"] if line["key"] == again["key"])
    assert first["result"]["corpus_content"] == again["result"]["corpus_content"]
    assert again["result"]["exact_loss"] == pytest.approx(first["result"]["exact_loss"], abs=LOSS_INTEREST)


def test_losses_by_step_repeat_on_the_same_corpus() -> None:
    first = {run["key"]: run for run in _lines("scratch-tables.jsonl")}
    again = _lines("again/scratch.jsonl")
    assert len(again) == 3
    gaps = []
    for run in again:
        before = first[run["key"]]
        assert run["commit"] != before["commit"]
        assert run["config"] == before["config"]
        assert run["result"]["corpus_content"] == before["result"]["corpus_content"]
        assert run["result"]["test"] == pytest.approx(before["result"]["test"], abs=LOSS_INTEREST / 2)
        looks = zip(run["result"]["curve"], before["result"]["curve"], strict=True)
        gaps += [abs(new["loss"] - old["loss"]) for new, old in looks]
    assert sum(gap > LOSS_INTEREST for gap in gaps) == 1
    assert max(gaps) < 2 * LOSS_INTEREST


def _lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
