"""Commands of the laboratory about runs and machines, as a person types them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dynamask.cli import common, main
from dynamask.training import TrainConfig, train


def dynamask(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dynamask", *arguments])
    monkeypatch.setattr(common.console, "_width", 200)
    with pytest.raises(SystemExit) as ended:
        main.main()
    return int(ended.value.code or 0)


def test_report_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(10):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i}: " + "all work and no play makes jack a dull boy. " * 10)
    shape = "model={vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
    shape += "ranking: paper, windows: 8}"
    small = [shape, "context=32", "batch_size=2", "steps=2", "save_every=0", "validation=0.3"]
    train(TrainConfig.load(None, [f"data={tmp_path / 'texts'}", f"output={tmp_path / 'run'}", *small]), quiet=True)
    output = tmp_path / "masks"
    asked = ["--length", "32", "--texts", "2", "--output", str(output)]
    assert dynamask(monkeypatch, "report", "masks", str(tmp_path / "run"), *asked) == 0, capsys.readouterr().err
    assert "newest keys" in capsys.readouterr().out
    assert (output / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "masks.jsonl").read_text())["length"] == 32


def test_cpu_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cpu.json"
    asked = ["benchmark", "cpu", "--length", "256", "--window", "32", "--repeats", "1", "--output"]
    assert dynamask(monkeypatch, *asked, str(file)) == 0
    assert json.loads(file.read_text())["rows"][0]["error"] < 1e-4
    assert dynamask(monkeypatch, *asked, str(tmp_path / "no" / "such.json")) == 2
    assert dynamask(monkeypatch, "benchmark", "cpu", "--length", "0") == 2
    assert "--length must be at least 1" in capsys.readouterr().err
