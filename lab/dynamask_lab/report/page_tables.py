"""What the tables of README.md and of the site's pages share: reading raw files, drawing rows with a note."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dynamask_lab.report.markdown import markdown_table
from dynamask_lab.sweeps.provenance import short_commit
from dynamask_lab.sweeps.section import Row

NOT_MEASURED = "Not measured yet."


def table_with_note(rows: Sequence[Row], note: str) -> str:
    """Return a table in markdown and the text below it; `NOT_MEASURED` without rows."""
    return f"{markdown_table(rows)}\n\n{note}" if rows else NOT_MEASURED


def read_json(file: Path) -> Any:
    """Return what a JSON file holds; None where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSON-lines file; none where there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def named_commits(commits: Iterable[str | None]) -> str:
    """Name the commits of raw lines, each once."""
    return f"commit {', '.join(dict.fromkeys(short_commit(commit) for commit in commits))}"
