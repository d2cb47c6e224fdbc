"""The README's tables: those of the committed raw lines, drawn by rules that are checked apart from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dynamask.errors import UsageError
from dynamask.recipes import RECIPES
from dynamask_lab.report.conversion import conversion_table, read_conversion
from dynamask_lab.report.readme import NOT_MEASURED, PAGES, QUALITY, TABLES, fill, write_pages
from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.judged import share_of_pairs

ROOT = Path(__file__).parents[3]
RAW = ROOT / "lab" / "results"


def _table(name: str) -> list[dict[str, str]]:
    """The rows of a marked table of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end of table -->", text, flags=re.DOTALL)
    assert found is not None
    lines = [line for line in found[1].split("\n") if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@pytest.mark.parametrize("page", [page for page in PAGES if (ROOT / page).exists()])
def test_the_committed_tables_are_those_of_the_raw_lines(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert fill(text, RAW) == text, f"{page}: run dynamask report results"


def test_the_readme_has_the_four_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- table: (\S+) -->", text) == ["speed", "quality", "conversion", "cost"]


def test_speed_rows_are_raw_rows_and_hold_losses() -> None:
    raw = json.loads((RAW / "cpu.json").read_text())["rows"]
    rows = {row["N"].replace(",", ""): row for row in _table("speed") if row[""] == "CPU"}
    assert len(rows) == len(raw)
    for row in raw:
        shown = rows[str(row["length"])]
        assert float(shown["forward"]) == pytest.approx(1e3 * row["interval_forward_s"], rel=1e-2)
        assert float(shown["dense forward"]) == pytest.approx(1e3 * row["dense_sdpa_forward_s"], rel=1e-2)


def test_quality_rows_are_means_over_the_seeds_of_their_runs() -> None:
    """Recomputed for the paper's form from its fields alone: neither newest keys nor slopes."""
    lines = [json.loads(line) for line in (RAW / "locality-chinchilla.jsonl").read_text().splitlines()]
    losses = [
        line["result"]["loss"]
        for line in lines
        if line["config"]["attention"] == "dma" and line["config"]["local"] == 0 and line["config"]["corpus"] == "code"
    ]
    (row,) = [row for row in _table("quality") if row["recipe"] == "`paper`"]
    assert row["code, 4.4M"] == f"{sum(losses) / len(losses):.3f} ({len(losses)})"


def test_every_quality_row_has_runs_and_every_recipe_a_row() -> None:
    shown = {row["attention"] for row in _table("quality")}
    assert shown == {measured.attention for measured in QUALITY}
    assert {measured.recipe for measured in QUALITY} - {""} == set(RECIPES)


def test_the_share_of_pairs() -> None:
    config = {"length": 4, "layers": 2, "window": 2, "attention": "swa"}
    assert share_of_pairs(config) == pytest.approx(7 / 10)  # 1 + 2 + 2 + 2 of 1 + 2 + 3 + 4
    assert share_of_pairs({**config, "layer_windows": [2, 4]}) == pytest.approx(17 / 20)
    assert share_of_pairs({**config, "attention": "mha", "window": None}) == 1


def _line(spec: Spec, measure: str, settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    line = {"study": "conversion", "model": "small", "form": spec.name, "spec": vars(spec), "measure": measure}
    key = json.dumps([spec.name, measure, settings])
    return line | {"key": key, "settings": settings, "result": result, "device": "a GPU", "commit": "abc"}


def _write(folder: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "conversion-one.jsonl").write_text(text + '{"study": "conversion", "torn')


def test_conversion_cells_compare_over_what_every_form_has(tmp_path: Path) -> None:
    dense, sparse = Spec("dense"), Spec("converted", 512)
    task = {"haystack": "essays", "first": 0, "count": 2, "task": "single_1"}
    lines = [
        _line(dense, "tasks", {**task, "length": 1024}, {"scores": [[1.0], [1.0]]}),
        _line(dense, "tasks", {**task, "length": 2048}, {"scores": [[0.0], [0.0]]}),
        _line(sparse, "tasks", {**task, "length": 1024}, {"scores": [[1.0], [0.0]]}),
        _line(dense, "continuation", {"corpus": "text", "context": 64}, {"losses": [2.0, 3.0]}),
    ]
    _write(tmp_path, lines)
    assert len(read_conversion(tmp_path)) == 4
    first, second = conversion_table(read_conversion(tmp_path))
    assert first == {"form": "dense", "keys per head": "all", "text loss": "2.500", "needles, %": "100.0"}
    assert second["needles, %"] == "50.0"
    assert second["keys per head"] == "512"
    assert "text loss" not in second
    shown = TABLES["conversion"](tmp_path)
    assert "| dense | all |" in shown
    assert "context of 64 tokens" in shown


def test_what_has_no_lines_is_not_measured(tmp_path: Path) -> None:
    for name, draw in TABLES.items():
        assert draw(tmp_path) == NOT_MEASURED, name


def test_pages_are_filled_in_place_and_bad_marks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a\n<!-- table: speed -->\nold\n<!-- end of table -->\nb\n")
    (changed,) = write_pages(tmp_path, tmp_path)
    assert changed.read_text() == f"a\n<!-- table: speed -->\n{NOT_MEASURED}\n<!-- end of table -->\nb\n"
    assert write_pages(tmp_path, tmp_path) == []
    with pytest.raises(UsageError, match="did you mean 'speed'"):
        fill("<!-- table: sped -->\n<!-- end of table -->", tmp_path)
    with pytest.raises(UsageError, match="not closed"):
        fill("<!-- table: speed -->\n", tmp_path)
