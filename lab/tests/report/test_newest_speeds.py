"""The claim about speed reads the newest timing of each shape, as the README's table does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynamask_lab.report.benchmarks import newest_speeds
from dynamask_lab.report.speed_table import gpu_timings
from dynamask_lab.sweeps.verdicts import REFUTED, REPRODUCED

RAW = Path(__file__).parents[2] / "results"


def _run(length: int, ours: float, dense: float) -> dict[str, Any]:
    row = {"name": "a", "windows": [2048] * 4, "N": length, "H": 16, "D": 128, "expiry": 0.0}
    row |= {"forward, a call": ours, "backward, a call": ours, "dense cudnn": dense, "dense cudnn backward": dense}
    return row


def _write(folder: Path, name: str, device: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text(json.dumps({"device": device, "commit": "abcdef123", "rows": rows}))


def test_the_newest_run_of_a_shape_decides_and_names_its_gpu(tmp_path: Path) -> None:
    assert newest_speeds(tmp_path) is None
    first = [_run(6144, 2.0, 1.6), _run(65536, 1.0, 30.0)]
    _write(tmp_path, "h100-kernels-evening.json", "NVIDIA H100 80GB HBM3", first)
    _write(tmp_path, "h200-kernels-afternoon.json", "NVIDIA H200", [_run(6144, 2.0, 2.4), _run(131072, 1.0, 24.6)])
    found = newest_speeds(tmp_path)
    assert found is not None
    section, rows, sources = found
    (finding,) = section.findings
    assert finding.verdict == REPRODUCED
    assert finding.difference == "1.2 to 30 times, 6,144 to 65,536 tokens, H200 and H100"
    assert "at least 1.2 times at N = 6,144, window 2048 on H200" in finding.measured
    assert rows["6144 tokens, window 2048"]["file"] == "h200-kernels-afternoon.json"
    assert "NVIDIA H200, commit abcdef1 (`h200-kernels-afternoon.json`)" in sources
    _write(tmp_path, "h200-kernels-new.json", "NVIDIA H200", [_run(65536, 1.0, 9.0), _run(131072, 1.0, 9.5)])
    found = newest_speeds(tmp_path)
    assert found is not None
    (finding,) = found[0].findings
    assert finding.verdict == REFUTED


def test_the_figures_are_those_of_the_readmes_table() -> None:
    found = newest_speeds(RAW)
    assert found is not None
    shown = {(row["N"], row["window"]): float(row["x"]) for row in found[0].exhibits[0].table}
    timings = gpu_timings(RAW)
    assert timings
    for timing in timings:
        ratio = timing.dense[1] / timing.ours[1]
        assert abs(shown[f"{timing.length:,}", f"{timing.window:,}"] - ratio) <= 0.005 * ratio
