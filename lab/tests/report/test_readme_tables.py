"""The README's tables: those of the committed raw lines, drawn by rules that are checked apart from them."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dynamask.convert import distill
from dynamask.convert.learning_rate import RATE_SHARE
from dynamask.errors import UsageError
from dynamask.recipes import RECIPES, apply
from dynamask_lab.report.conversion import conversion_table, read_conversion
from dynamask_lab.report.cost_table import DECODE_RUNS, FIGURES, newest_pair
from dynamask_lab.report.page_tables import NOT_MEASURED
from dynamask_lab.report.quality_table import QUALITY
from dynamask_lab.report.readme import PAGES, TABLES, fill, write_pages
from dynamask_lab.report.speed_table import KERNEL_RUNS, gpu_timings
from dynamask_lab.studies.conversion import settle
from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.judged import share_of_pairs
from dynamask_lab.studies.scratch.study import scratch_name
from dynamask_lab.sweeps.results import read_results

ROOT = Path(__file__).parents[3]
RAW = ROOT / "lab" / "results"
SMOLLM2_WEIGHTS = 0.1934
"""Root mean square of the decoder's matrices of SmolLM2-135M-Instruct, read from its released file."""


def _cells(name: str) -> list[list[str]]:
    """The cells of a marked table of the README, its head and the line below included."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end of table -->", text, flags=re.DOTALL)
    assert found is not None
    lines = [line for line in found[1].split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _table(name: str) -> list[dict[str, str]]:
    """The rows of a marked table of the README, by the columns' titles."""
    cells = _cells(name)
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


def _kernel_row(window: int, length: int, own: float, dense: float) -> dict[str, Any]:
    row = {"name": "a", "windows": [window] * 4, "N": length, "H": 16, "D": 128, "expiry": 1.0}
    row |= {"forward, a call": own, "backward, a call": 2 * own}
    return row | {"dense cudnn": dense, "dense cudnn backward": 2 * dense, "dense flash": 9.0}


def test_speed_takes_the_newest_row_with_a_dense_peer_and_counts_the_mask(tmp_path: Path) -> None:
    without = {name: value for name, value in _kernel_row(2048, 8192, 5.0, 8.0).items() if "dense" not in name}
    older = {"device": "A H200", "commit": "old1234", "rows": [_kernel_row(1024, 3072, 3.0, 8.0), without]}
    newer = {"device": "A H200", "again, commit of a branch abc1234": {"rows": [_kernel_row(1024, 3072, 2.0, 6.0)]}}
    (tmp_path / KERNEL_RUNS[0]).write_text(json.dumps(older))
    (tmp_path / "h200-kernels-later.json").write_text(json.dumps(newer))
    (timing,) = gpu_timings(tmp_path)
    assert (timing.ours, timing.dense, timing.commit) == ((3.0, 7.0), (6.0, 18.0), "abc1234")
    (tmp_path / "h200-kernels-later.json").unlink()
    (timing,) = gpu_timings(tmp_path)
    assert (timing.ours, timing.dense, timing.commit) == ((4.0, 10.0), (8.0, 24.0), "old1234")


def test_every_kernel_file_and_decode_file_has_its_age() -> None:
    """A file that is not named counts as the newest; committed ones are named once a newer one is there."""
    for folder, pattern, named in ((RAW, "h*-kernels-*.json", KERNEL_RUNS), (RAW / "decode", "*.jsonl", DECODE_RUNS)):
        assert set(named) <= {file.name for file in folder.glob(pattern)}
        assert len(named) == len(set(named))


def _timed(form: str, ms: float, commit: str = "a", **more: Any) -> dict[str, Any]:
    line = {"part": "train", "model": "smollm2-135m", "B": 1, "N": 8192, "kind": "train", "form": form, "ms": ms}
    return line | {"commit": commit} | more


def test_cost_pairs_come_from_one_run_the_newest_that_has_both() -> None:
    figure = next(each for each in FIGURES if each.settings.get("N") == 8192)
    first = [_timed("dense, flash", 9.0), _timed("converted", 6.0), _timed("dense, flash, recorded", 8.0)]
    pair = newest_pair(first, "smollm2-135m", figure)
    assert pair is not None
    assert (pair.ours["ms"], pair.dense["ms"]) == (6.0, 8.0)
    alone = [*first, _timed("converted", 1.0, "b")]  # the newer run has no dense form yet
    assert newest_pair(alone, "smollm2-135m", figure) == pair
    again = [*alone, _timed("dense, flash", 5.0, "b"), _timed("converted, recorded", 0.5, "b")]
    pair = newest_pair(again, "smollm2-135m", figure)
    assert pair is not None
    assert (pair.ours["ms"], pair.dense["ms"]) == (0.5, 5.0)
    assert newest_pair(again, "qwen3-0.6b", figure) is None
    assert newest_pair([_timed("dense, flash", 9.0, B=4), _timed("converted", 6.0)], "smollm2-135m", figure) is None


def test_cost_cells_are_raw_lines_and_their_ratio() -> None:
    lines = [
        json.loads(line) for file in (RAW / "decode").glob("*.jsonl") for line in file.read_text().split("\n") if line
    ]
    figures = {f"{line[name]:,.0f}" for line in lines for name in ("ms", "tokens_per_s", "cache_mib") if name in line}
    figures |= {f"{line[name]:.1f}" for line in lines for name in ("ms", "tokens_per_s", "cache_mib") if name in line}
    compared = 0
    for title, *cells in _cells("cost")[2:]:
        for ours, dense, ratio in (cells[:3], cells[3:]):
            if ratio:
                assert {ours, dense} <= figures
                own, other = (float(cell.replace(",", "")) for cell in (ours, dense))
                assert float(ratio) == pytest.approx(own / other if "tokens/s" in title else other / own, rel=0.02)
                compared += 1
    assert compared >= 12


def test_quality_rows_are_means_over_the_seeds_of_their_runs() -> None:
    """Recomputed from the fields alone: newest keys, one layer of six wide, at half the rate of the others."""
    lines = [json.loads(line) for line in (RAW / "scratch-tables.jsonl").read_text().splitlines()]

    def losses(**fields: Any) -> dict[int, float]:
        return {
            line["seed"]: line["result"]["test"]
            for line in lines
            if all(line["config"].get(name) == value for name, value in fields.items())
        }

    own = losses(attention="swa", layer_windows=[64, 64, 64, 1408, 64, 64])
    assert len(own) == 3
    ((title, cell),) = [
        (name, row[name])
        for row in _table("quality")
        if row["recipe"].startswith("`default`")
        for name in row
        if name.startswith("4.4M, 44M tokens")
    ]
    assert cell == f"{sum(own.values()) / len(own):.3f} ({len(own)})", title


def test_differences_are_of_the_largest_models_that_ran_both_forms() -> None:
    columns = [name for name in _table("quality")[0] if "M tokens" in name]
    columns.sort(key=lambda name: -float(name.split("M,")[0]))
    (base,) = [row for row in _table("quality") if row["recipe"].startswith("`default`")]
    compared = 0
    for row in _table("quality"):
        shared = [name for name in columns if row[name] and base[name]]
        if row is base or row["recipe"] == base["recipe"] or not shared:
            assert row["above `default`"] == ""
            continue
        own, other = row[shared[0]], base[shared[0]]
        assert row["above `default`"].endswith(f"({shared[0].partition(',')[0]})")
        if own[-2] == other[-2]:  # as many seeds, so the mean of differences is the difference of means
            mean = float(own.split()[0]) - float(other.split()[0])
            assert float(row["above `default`"].split()[0]) == pytest.approx(mean, abs=1.5e-3)
            compared += 1
    assert compared >= 1


def test_a_column_of_one_seed_says_so() -> None:
    """The column of the largest models holds one run of each form, and the note names what that decides."""
    lines = [json.loads(line) for line in (RAW / "scratch-tables-60M.jsonl").read_text().splitlines()]
    (title,) = [name for name in _table("quality")[0] if name.startswith("59.9M")]
    seeds = {line["seed"] for line in lines}
    assert title.endswith("(one seed)") == (len(seeds) == 1)
    shown = {row["attention"]: row[title] for row in _table("quality") if row[title]}
    dense, scored = (
        [line["result"]["test"] for line in lines if line["config"]["attention"] == attention]
        for attention in ("mha", "dma")
    )
    assert shown["every key"] == f"{sum(dense) / len(dense):.3f} ({len(dense)})"
    assert shown["the same, scores and slopes on logits (0.1)"] == f"{sum(scored) / len(scored):.3f} ({len(scored)})"
    note = fill((ROOT / "README.md").read_text(encoding="utf-8"), RAW)
    assert ("59.9M: one seed, which decides nothing below 0.05 nats." in note) == (len(seeds) == 1)


def test_every_quality_row_has_runs_and_every_recipe_a_row() -> None:
    shown = {row["attention"] for row in _table("quality")}
    assert shown == {measured.attention for measured in QUALITY}
    assert {name for measured in QUALITY for name in measured.recipe.split(", ")} - {""} == set(RECIPES)


@pytest.mark.parametrize("name", ["default", "sliding", "recall"])
def test_what_the_table_shows_of_a_recipe_is_what_the_recipe_makes(name: str) -> None:
    """The fields of the runs, in a model of six layers, are those that `recipes.apply` gives."""
    measured = next(row for row in QUALITY if name in row.recipe.split(", "))
    runs = [
        run
        for file in ("needle-far", "scratch-tables", *(f"scratch-tables-{size}M" for size in (10, 20, 60)))
        for run in read_results(RAW / f"{file}.jsonl")
    ]
    shown = [run for run in runs if run.experiment == "needle" and measured.needle in run.result["loss"]]
    shown += [run for run in runs if run.experiment == "scratch" and scratch_name(run.config) in measured.forms]
    assert shown
    for run in shown:
        length = run.config.get("length") or run.config["context"]
        config = apply(name, "tiny", length, num_hidden_layers=run.config["layers"])
        assert config.attention == run.config["attention"]
        assert list(config.windows) == run.config["layer_windows"]
        assert config.sinks == run.config["sinks"]
        assert not config.slopes
        if config.attention == "dma":
            assert (config.ranking, config.local) == (run.config["ranking"], run.config["local"])
        assert not RECIPES[name].training.get("window_schedule")
        assert not run.config.get("window_schedule")


def test_the_default_conversion_in_the_table_is_the_products() -> None:
    given = {name: parameter.default for name, parameter in inspect.signature(distill).parameters.items()}
    for spec in settle.DEFAULT.values():
        assert (spec.steps, spec.average) == (given["steps"], given["average_share"])
        assert given["learning_rate"] is None  # scaled to the weights
        assert spec.rate == float(f"{RATE_SHARE * SMOLLM2_WEIGHTS:.0e}")
        assert spec.beginning_share == given["beginning_share"]
        assert spec.label_share == given["label_share"]
        assert not spec.embeddings
        assert given["train_embeddings"] is None  # which leaves them where no next tokens are learned


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
    shown = TABLES["conversion-forms"](tmp_path)
    assert "| dense | all |" in shown
    assert "context of 64 tokens" in shown


def test_the_summary_averages_the_seeds_of_the_default_over_the_same_documents(tmp_path: Path) -> None:
    dense, seeds = Spec("dense"), list(settle.DEFAULT.values())
    task = {"haystack": "essays", "first": 0, "count": 2, "task": "single_1", "length": 1024}
    lines = [
        _line(dense, "loss", {"corpus": "text"}, {"losses": [[2.0, 2.0], [3.0, 3.0]]}),
        _line(seeds[0], "loss", {"corpus": "text"}, {"losses": [[2.1, 2.1], [3.1, 3.1]]}),
        _line(seeds[1], "loss", {"corpus": "text"}, {"losses": [[2.3, 2.3], [3.3, 3.3]]}),
        _line(dense, "tasks", task, {"scores": [[1.0], [1.0]]}),
        _line(seeds[1], "tasks", task, {"scores": [[1.0], [0.0]]}),
        _line(dense, "tasks", task | {"length": 8192}, {"scores": [[1.0], [0.0]]}),
        _line(seeds[0], "tasks", task | {"length": 8192}, {"scores": [[0.0], [1.0]]}),
        _line(dense, "continuation", {"corpus": "text", "context": 64}, {"losses": [2.0, 3.0]}),
        _line(seeds[0], "continuation", {"corpus": "text", "context": 64}, {"losses": [2.3, 3.3]}),
    ]
    _write(tmp_path, [line | {"model": "smollm2-135m-instruct"} for line in lines])
    shown = TABLES["conversion"](tmp_path).split("\n")
    (row,) = [line for line in shown if line.startswith("| learned ranks, distilled")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["512", "2", "+0.200 [+0.200, +0.200]"]
    assert cells[4] == "+0.300 [+0.300, +0.300] (1)"
    assert cells[5].startswith("0.50 [")
    assert cells[5].endswith("(1)")
    assert cells[6].startswith("1.00 [")
    assert cells[7] == ""


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
