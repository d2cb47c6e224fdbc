"""The constants of `dynamask plan` are those that the committed steps give."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from dynamask.training.plan import MEASURED

ROOT = Path(__file__).parents[3]


def test_the_constants_are_fitted_to_the_steps_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = json.loads(MEASURED.read_text(encoding="utf-8"))
    monkeypatch.setattr("dynamask.training.plan.MEASURED", tmp_path / MEASURED.name)  # the script writes it
    script = runpy.run_path(str(ROOT / "lab" / "scripts" / "fit_plan.py"))
    fitted = script["fit"](ROOT / written["source"])
    fitted = script["fit_scale"](fitted, [ROOT / source for source in written["checked_sources"]])
    for name in ("share_of_peak", "seconds_per_step", "launch_seconds_per_layer", "buffer_bytes_per_parameter"):
        assert fitted[name] == pytest.approx(written[name], rel=1e-6)
    for name in ("largest_error", "largest_memory_error"):
        assert fitted[name] == pytest.approx(written[name], rel=1e-6)
    assert written["largest_error"] < 0.15
