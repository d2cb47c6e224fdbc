"""`dynamask inspect`: where its text comes from, and what it refuses."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command


def data(page: Path) -> dict[str, Any]:
    inner = page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    return dict(json.loads(inner))


def test_a_text_a_file_and_standard_input(
    dynamask: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    done = dynamask("inspect", str(run / "run"), "all work and no play", "--tokens", "3", "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert "3 of them generated" in done.stdout
    shown = data(page)
    assert "".join(shown["tokens"]).startswith("all work and no play")
    assert len(shown["tokens"]) == shown["prompt"] + 3
    assert shown["model"] == "run"

    text = tmp_path / "text.md"
    text.write_text("jack is a dull boy", encoding="utf-8")
    assert dynamask("inspect", str(run / "run"), str(text), "-o", str(page)).returncode == 0
    assert "".join(data(page)["tokens"]) == "jack is a dull boy"

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"dull boys")))
    cut = dynamask("inspect", str(run / "run"), "-", "--limit", "2", "-o", str(page))
    assert cut.returncode == 0, cut.stderr
    assert "reads the first 2 of" in cut.said
    assert len(data(page)["tokens"]) == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nosuch.txt"], "there is no file nosuch.txt"),
        (["a text", "--tokens", "-1"], "--tokens must be at least 0"),
        (["a text", "--limit", "0"], "--limit must be at least 1"),
        (["a text", "--out", "nosuch/page.html"], "there is no folder nosuch"),
        (["a text", "--chat"], "has no chat template"),
        ([""], "the text is empty"),
        (["caf\udce9"], "the text is not UTF-8"),
    ],
)
def test_mistakes_end_with_one_line(dynamask: Command, run: Path, arguments: list[str], complaint: str) -> None:
    done = dynamask("inspect", str(run / "run"), *arguments)
    assert done.returncode == 2
    assert complaint in done.said
