"""The heat map: cells where they belong, models side by side, what was not measured left blank."""

from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure

from dynamask import InvalidInputError
from dynamask.errors import UsageError
from dynamask.evaluation.retrieval import RetrievalScore, write_scores
from dynamask.inspect import draw_needle
from dynamask.inspect.retrieval import score_grid


def _scores(model: str, exact: dict[tuple[int, float], float]) -> list[RetrievalScore]:
    return [RetrievalScore(model, "passkey", n, d, value, 0.5, 4) for (n, d), value in exact.items()]


def test_the_grid_has_depths_as_rows_and_lengths_as_columns() -> None:
    scores = _scores("a", {(512, 0.0): 0.1, (1024, 0.0): 0.2, (1024, 1.0): 0.4})
    grid = score_grid(scores, [512, 1024], [0.0, 1.0], "exact")
    assert grid[0] == [0.1, 0.2]
    assert math.isnan(grid[1][0])
    assert grid[1][1] == 0.4
    assert score_grid(scores, [1024], [0.0], "recall") == [[0.5]]
    with pytest.raises(InvalidInputError, match="two scores for passkey at length 512"):
        score_grid(scores * 2, [512], [0.0], "exact")


def test_two_models_side_by_side(tmp_path, monkeypatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    sparse = write_scores(_scores("sparse", {(512, 0.0): 1.0, (1024, 0.0): 0.25}), tmp_path / "sparse.jsonl")
    dense = write_scores(_scores("dense", {(512, 0.0): 0.0}), tmp_path / "dense.jsonl")
    picture = draw_needle([sparse, dense], tmp_path / "needle.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in drawn[0].axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["sparse", "dense"]
    assert panels[0].get_ylabel() == "passkey\ndepth"
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [["100", "25"], ["0"]]
    assert [tick.get_text() for tick in panels[1].get_xticklabels()] == ["512", "1024"]


def test_mistakes_are_named(tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot read the scores"):
        draw_needle([tmp_path / "gone"], tmp_path / "x.png")
    file = write_scores(_scores("a", {(512, 0.0): 1.0}), tmp_path / "a.jsonl")
    with pytest.raises(InvalidInputError, match="metric must be one of exact, recall"):
        draw_needle([file], tmp_path / "x.png", metric="f1")
    with pytest.raises(InvalidInputError, match="different names"):
        draw_needle([file, file], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
