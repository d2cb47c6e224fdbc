"""Tables of the report in markdown."""

from __future__ import annotations

from collections.abc import Sequence

from dynamask_lab.report.recipe_names import by_recipe
from dynamask_lab.sweeps.section import Row


def markdown_table(rows: Sequence[Row]) -> str:
    """A table in markdown; the columns are those of any row, in order of appearance. Forms are named by recipe."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [by_recipe(str(row.get(column, ""))).replace("|", "\\|").replace("\n", " ") for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
