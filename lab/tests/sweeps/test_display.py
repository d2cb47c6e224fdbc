"""A sweep on a terminal: every run in progress has its bar, and a line when it ends."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from dynamask_lab.studies import Record
from dynamask_lab.sweeps.display import SweepDisplay


@pytest.fixture
def display() -> SweepDisplay:
    return SweepDisplay(Console(file=io.StringIO(), width=90), [config(0.1), config(0.2)])


def shown(display: SweepDisplay) -> str:
    console = Console(file=io.StringIO(), width=90)
    console.print(display.bars)
    return console.file.getvalue()


def said(display: SweepDisplay) -> str:
    return display.console.file.getvalue()


def config(rate: float, width: int = 32) -> dict[str, Any]:
    return {"rate": rate, "width": width, "seed": 0}


def test_runs_in_progress_have_a_bar_each_until_they_end(display: SweepDisplay) -> None:
    display.resumed(0, 2, 0)
    display.started(config(0.1), None)
    display.started(config(0.2), 125.0)
    display.advanced(config(0.2), 0.5, "loss 3.1")
    lines = shown(display).splitlines()
    assert ["sweep" in lines[0], "rate=0.1" in lines[1], "loss 3.1 rate=0.2, about 2m05s" in lines[2]] == [True] * 3
    assert "50%" in lines[2]
    display.finished(Record("toy", "key", config(0.2), 0, {"loss": 3.0, "curve": []}, 60.0, "", {}, None))
    assert "rate=0.2" not in shown(display)
    assert "rate=0.1" in shown(display)
    assert " 50%" in shown(display).splitlines()[0], "one of two runs is done"
    assert "rate=0.2: loss 3 in 1m00s" in said(display)
    display.failed(config(0.1), RuntimeError("out of memory"))
    assert "rate=0.1: RuntimeError: out of memory" in said(display)
    assert len(shown(display).splitlines()) == 1


def test_runs_that_finished_ones_decide_count_and_are_told_apart(display: SweepDisplay) -> None:
    display.resumed(2, 0, 0)
    display.added([config(0.1, width=64), config(0.1, width=128)])
    display.started(config(0.1, width=128), None)
    assert "rate=0.1 width=128" in shown(display)
    assert " 50%" in shown(display).splitlines()[0], "two of four are done"
    display.interrupted(config(0.1, width=128))
    assert "width" not in shown(display)


def test_a_setting_that_some_runs_leave_out_tells_them_apart() -> None:
    plain, ranked = config(0.1), {**config(0.1), "ranking": "attention"}
    display = SweepDisplay(Console(file=io.StringIO(), width=90), [plain, ranked])
    for each in (plain, ranked):
        display.started(each, None)
    assert {bar.description for bar in display.bars.tasks} >= {"run", "ranking=attention"}
