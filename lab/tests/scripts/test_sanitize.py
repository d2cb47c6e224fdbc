"""`lab/scripts/sanitize.py` on a CPU: every stage runs, and a wrong result ends it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def sanitize(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "sanitize.py"
    spec = importlib.util.spec_from_file_location("sanitize", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LENGTH", 131)
    monkeypatch.setattr(module, "WINDOW", 40)
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "0")  # restored with it
    return module


def test_every_stage_runs(sanitize: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    sanitize.main()
    said = capsys.readouterr().out
    assert said.count("error") == len(sanitize.stages("cpu", "torch")) == 10
    assert said.endswith("done\n")
    assert not torch.are_deterministic_algorithms_enabled()


def test_wrong_results_are_named_at_the_end(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = sanitize.key_expiry

    # One more key than the bounded cache and the definition keep.
    def wider(scores: torch.Tensor, window: int | tuple[int, ...], **given: object) -> torch.Tensor:
        more = window + 1 if isinstance(window, int) else tuple(each + 1 for each in window)
        return real(scores, more, **given)

    monkeypatch.setattr(sanitize, "key_expiry", wider)
    with pytest.raises(SystemExit, match="wrong results: decoding"):
        sanitize.main()
    assert "the last third of the queries" in capsys.readouterr().out


def test_no_stage_begins_after_its_time(sanitize: ModuleType, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--seconds", "-1"])
    sanitize.main()
    assert capsys.readouterr().out.count("not begun") == 10
