"""The constants of `dynamask plan` are those that the committed steps give."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from dynamask.training.plan import MEASURED

ROOT = Path(__file__).parents[3]


def test_the_constants_are_fitted_to_the_steps_they_name() -> None:
    written = json.loads(MEASURED.read_text(encoding="utf-8"))
    fit = runpy.run_path(str(ROOT / "lab" / "scripts" / "fit_plan.py"))["fit"]
    fitted = fit(ROOT / written["source"])
    assert fitted["share_of_peak"] == pytest.approx(written["share_of_peak"], rel=1e-6)
    assert fitted["largest_error"] == pytest.approx(written["largest_error"], rel=1e-6)
    assert written["largest_error"] < 0.15
