"""The table of features: every row names a test, and the test exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "features.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| feature", "| ---"))
]


def test_rows_are_whole() -> None:
    assert len(ROWS) > 30
    assert {len(row) for row in ROWS} == {8}
    assert all(cell for row in ROWS for cell in row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_test_that_proves_a_row_exists(row: list[str]) -> None:
    named = re.fullmatch(r"`(\S+)::(test_\w+)`", row[-1])
    assert named is not None, row[-1]
    file, test = named.groups()
    assert re.search(rf"^ *(async )?def {test}\(", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
