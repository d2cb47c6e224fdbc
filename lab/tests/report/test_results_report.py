"""docs/results: up to date with the raw lines, the same bytes twice, and honest where there are none."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dynamask.errors import UsageError
from dynamask_lab.report.claims import CLAIMS
from dynamask_lab.report.results import render_results, trace
from dynamask_lab.studies import EXPERIMENTS, LOCALITY, MQAR, Record, run_key
from dynamask_lab.studies.mqar.report import report_mqar
from dynamask_lab.sweeps.section import Finding

ROOT = Path(__file__).parents[3]
RAW, COMMITTED = ROOT / "lab" / "results", ROOT / "docs" / "results"


def test_the_committed_report_is_that_of_the_committed_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    render_results(RAW, tmp_path)
    pages = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.md"))
    assert pages == sorted(path.relative_to(COMMITTED) for path in COMMITTED.rglob("*.md")), "dynamask report results"
    for page in pages:
        assert (tmp_path / page).read_text() == (COMMITTED / page).read_text(), f"{page}: run dynamask report results"
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.svg"))
    assert drawn == sorted(path.relative_to(COMMITTED) for path in COMMITTED.rglob("*.svg"))
    for page in pages:
        for linked in re.findall(r"\]\(([^)]+\.(?:svg|md))\)", (tmp_path / page).read_text()):
            assert (tmp_path / linked).exists(), f"{page} links to {linked}"


def test_an_empty_folder_renders_as_not_measured(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    index, *pages = render_results(tmp_path / "raw", tmp_path / "report")
    claims = [line for line in index.read_text().split("\n") if line.startswith("| ") and "not measured" in line]
    assert len([line for line in claims if any(claim.text in line for claim in CLAIMS.values())]) == len(CLAIMS)
    assert "| held |" not in index.read_text()
    assert "did not hold** |" not in index.read_text()
    assert {page.stem for page in pages} >= set(EXPERIMENTS)
    for page in pages:
        assert "Not measured" in page.read_text()


def _record(config: dict[str, Any], accuracy: float, seconds: float = 10.0) -> Record:
    slices = [{"length": length, "pairs": pairs, "accuracy": accuracy} for length, pairs, _ in config["test"]]
    result = {"accuracy": accuracy, "slices": slices, "epochs": 1}
    key = run_key("mqar", config)
    return Record("mqar", key, config, config["seed"], result, seconds, "some GPU", {"torch": "2"}, "abc")


def _write(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))


def _is_paper(config: dict[str, Any]) -> bool:
    return config["local"] == 0


def test_a_full_sweep_gets_verdicts_and_a_partial_one_does_not(tmp_path: Path) -> None:
    """dma's default form best of all, its paper form worst: one claim, two verdicts."""
    configs = MQAR.configs("smoke")
    accuracy = {run_key("mqar", c): 0.5 for c in configs}
    for config in configs:
        if config["attention"] == "dma":
            accuracy[run_key("mqar", config)] = 0.1 if _is_paper(config) else 0.8
    records = [_record(c, accuracy[run_key("mqar", c)]) for c in configs]
    _write(tmp_path / "raw" / "mqar.jsonl", records)
    index = render_results(tmp_path / "raw", tmp_path / "report")[0].read_text()
    rows = [line for line in index.split("\n") if "mqar-smoke" in line]
    recall = {row.split("|")[2].strip(): row.split("|")[4].strip() for row in rows if "of 4 comparisons" in row}
    assert len(rows) == 4
    assert recall["dma"] == "held"
    verdicts = {(f.claim, f.subject): f.held for f in report_mqar(records, tmp_path).findings}
    assert verdicts["recall", "dma"] is True
    assert verdicts["recall", "dma, paper"] is False
    assert verdicts["recall-efficiency", "dma"] is True  # all took ten seconds: level

    partial = [r for r in records if r.config["attention"] in ("dma", "swa")]
    _write(tmp_path / "raw" / "mqar.jsonl", partial)
    index = render_results(tmp_path / "raw", tmp_path / "report")[0].read_text()
    rows = [line for line in index.split("\n") if "mqar-smoke" in line]
    assert rows
    assert all("not measured" in row for row in rows)
    assert "not compared with mha, mla, nsa" in index


def test_the_same_lines_give_the_same_bytes_and_old_pages_go(tmp_path: Path) -> None:
    _write(tmp_path / "raw" / "mqar.jsonl", [_record(c, 0.25) for c in MQAR.configs("smoke")])
    shutil.copy(RAW / "h100-attention.json", tmp_path / "raw")
    contents = []
    for name in ("one", "two"):
        render_results(tmp_path / "raw", tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert any(path.suffix == ".svg" for path in contents[0])
    (tmp_path / "raw" / "mqar.jsonl").unlink()
    render_results(tmp_path / "raw", tmp_path / "one")
    assert not (tmp_path / "one" / "mqar-smoke").exists()


def test_every_exhibit_leads_back_to_its_lines(tmp_path: Path) -> None:
    raw = json.loads((RAW / "h100-attention.json").read_text())
    # Alone: to trace a row, the whole report is made, pictures and all.
    (tmp_path / "pyproject.toml").touch()
    folder = tmp_path / "lab" / "results"
    folder.mkdir(parents=True)
    shutil.copy(RAW / "h100-attention.json", folder)
    lines = trace("h100-attention-decode", folder)
    assert len(lines) == len(raw["decode"])
    file, key, row = lines[1].split(" ", 2)
    assert (file, key) == ("lab/results/h100-attention.json", "decode[1]")
    assert json.loads(row) == raw["decode"][1]
    with pytest.raises(UsageError, match="did you mean 'h100-attention-decode'"):
        trace("h100-attention-decod", folder)


def test_a_strangers_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.md").write_text("my notes")
    with pytest.raises(UsageError, match="did not write"):
        render_results(tmp_path / "raw", tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.md").read_text() == "my notes"
    with pytest.raises(UsageError, match="there is no folder"):
        render_results(tmp_path / "gone", tmp_path / "report")
    (tmp_path / "raw" / "h100-attention.json").write_text('{"environment": {}, "attention": [{"forward_ms": 1}]}')
    with pytest.raises(UsageError, match=r"h100-attention\.json is not what"):
        render_results(tmp_path / "raw", tmp_path / "report")


def test_findings_name_known_claims(tmp_path: Path) -> None:
    records = [_record(c, 0.25) for c in MQAR.configs("smoke")]
    findings: list[Finding] = list(report_mqar(records, tmp_path).findings)
    assert {finding.claim for finding in findings} <= set(CLAIMS)


def test_runs_on_another_build_of_a_corpus_stand_apart(tmp_path: Path) -> None:
    """Two seeds of every form, those of one seed on another build, but for a form that has run there alone."""
    records = []
    for config in LOCALITY.configs("smoke")[:4]:
        result = {"loss": 5.0, "curve": [{"step": 3, "tokens": 9, "loss": 5.0}], "positions": [{"loss": 5.0}]}
        content = "old" if config["attention"] == "mha" else "new"
        key = run_key("locality", config)
        own = result | {"corpus_content": content}
        records.append(Record("locality", key, config, 0, own, 1.0, "some GPU", {"torch": "2"}, "abc"))
    _write(tmp_path / "raw" / "locality.jsonl", records)
    render_results(tmp_path / "raw", tmp_path / "report")
    first, second = (tmp_path / "report" / "locality.md").read_text().split(", an earlier build of the corpora: 2 of ")
    assert "| swa |" in first
    assert "| mha |" not in first
    assert "| mha |" in second
    assert "locality-smoke-build-1-loss" in second
