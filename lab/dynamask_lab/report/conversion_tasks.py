"""The generated tasks of the conversion study, by group: the conversion, its controls and every peer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dynamask_lab.report.conversion_figures import FIRST
from dynamask_lab.report.conversion_goals import SMOLLM2
from dynamask_lab.studies.conversion import settle
from dynamask_lab.studies.conversion.levers import DENSE, FROZEN
from dynamask_lab.studies.conversion.peers import PEERS
from dynamask_lab.studies.conversion.report import GROUPS, Study
from dynamask_lab.sweeps.section import Row

FORMS = {
    "dense": DENSE,
    "learned ranks, distilled (the default)": settle.DEFAULT[0],
    "learned ranks, frozen": FROZEN,
    "newest keys, distilled": settle.NEWEST,
    "one window and sinks, frozen": settle.SINKS,
}
_NEEDLES = GROUPS["needles"]
_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[int, ...], str, int | None]] = {
    **{f"needles {n // 1024}K": (_NEEDLES, (n,), "essays", None) for n in (1024, 2048, 4096, 8192)},
    "in documents": (_NEEDLES, (1024, 2048, 4096, 8192), "documents", None),
    "multi-key 3": (GROUPS["multi-key 3"], (), "essays", None),
    "tracking": (GROUPS["tracking"], (), "essays", None),
    "common words": (("common_words",), (), "essays", None),
    "frequent words": (("frequent_words",), (), "essays", None),
    "pairs, first question": (GROUPS["pairs"], (), "essays", 0),
    "second": (GROUPS["pairs"], (), "essays", 1),
}
"""Heading -> tasks, lengths (none: all), haystack, and which question (None: the mean of all)."""


def task_rows(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Average the scores of the first examples of each task and length, those that all forms answered.

    Args:
        lines: of the study.

    Returns:
        One row per form with percentages; a cell is empty where a form lacks a task or a length that others have.
    """
    study = Study(dict(line) for line in lines if line["model"] == SMOLLM2)
    forms = FORMS | {f"kvpress {peer}": settle.Spec("peer", 512, peer=peer) for peer in PEERS}
    rows: list[dict[str, str]] = [{"form": name} for name in forms]
    for title, (tasks, lengths, haystack, question) in _COLUMNS.items():
        scored = [
            {
                key: value
                for key, value in study.scores(spec.name, tasks, question=question).items()
                if key[2] == haystack and key[3] < FIRST and (not lengths or key[1] in lengths)
            }
            for spec in forms.values()
        ]
        wanted = set(next((found for found in scored if found), {}))
        for row, found in zip(rows, scored, strict=True):
            row[title] = (
                f"{100 * np.mean([found[key] for key in wanted]):.0f}" if wanted and set(found) >= wanted else ""
            )
    return [row for row in rows if any(value for name, value in row.items() if name != "form")]
