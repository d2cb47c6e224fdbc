"""Benchmark tasks over local data as a section of the report: every mechanism, the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamask.experiments.provenance import short_commit
from dynamask.experiments.section import Exhibit, Row, Section


def tasks_section(lines: Sequence[Any], folder: Path) -> tuple[Section, dict[str, Any], str]:
    """What `benchmarks/local_tasks.py` wrote, one line per model.

    Args:
        lines: its JSON lines.
        folder: for pictures; none are drawn.

    Returns:
        See `Benchmark.section`.
    """
    rows = {f"line[{number}]": line for number, line in enumerate(lines)}
    table: list[Row] = []
    for line in lines:
        cells = {
            "model": line["model"],
            "parameters": f"{line['parameters'] / 1e6:.2f}M",
            "loss": f"{line['loss']:.3f}",
        }
        for task, found in line["tasks"].items():
            cells[f"{task}, {found['n']} questions"] = f"{found['acc']:.1%} ± {found['acc_stderr']:.1%}"
            cells[f"{task}, by length"] = f"{found['acc_norm']:.1%}"
        table.append(cells)
    exhibit = Exhibit(
        "accuracy",
        "Accuracy",
        list(rows),
        "Share of the questions whose right choice is the likeliest, ± one standard error; `by length`: likeliest per "
        "byte. `next_line` has four choices and `plurals` two, so chance is 25% and 50%. `loss`: nats per token of "
        "held-out text.",
        table,
    )
    environments = [line["environment"] for line in lines]
    sources = "; ".join(
        dict.fromkeys(
            f"{each['device']}; dynamask {each['dynamask']}, lm_eval {each['lm_eval']}, torch {each['torch']}, "
            f"transformers {each['transformers']}; commit {short_commit(each['commit'])}"
            for each in environments
        )
    )
    return Section("", [exhibit]), rows, sources
