"""Benchmark tasks over local data as a section of the report: every mechanism, the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamask_lab.sweeps.provenance import short_commit
from dynamask_lab.sweeps.section import Exhibit, Row, Section

_QUESTIONS = {
    "next_line": "`next_line`: which of four lines of Python comes next, chance 25%",
    "plurals": "`plurals`: which of two, chance 50%",
    "near_word": "`near_word`: the next word of a held-out document, rare and last used at most 64 words ago",
    "far_word": "`far_word`: the same, last used at least 400 words ago, past any window of 512 tokens",
}


def tasks_section(lines: Sequence[Any], folder: Path) -> tuple[Section, dict[str, Any], str]:
    """What `lab/scripts/local_tasks.py` and `lab/scripts/sweep_tasks.py` wrote, one line per model.

    Args:
        lines: their JSON lines.
        folder: for pictures; none are drawn.

    Returns:
        See `Benchmark.section`.
    """
    rows = {f"line[{number}]": line for number, line in enumerate(lines)}
    table = [
        {
            "model": line["model"],
            "parameters": f"{line['parameters'] / 1e6:.2f}M",
            "loss": f"{line['loss']:.3f}",
            **{name: cell for task, found in line["tasks"].items() for name, cell in _cells(task, found).items()},
        }
        for line in lines
    ]
    asked = dict.fromkeys(task for line in lines for task in line["tasks"])
    explained = "; ".join(_QUESTIONS[task] for task in asked if task in _QUESTIONS)
    notes = dict.fromkeys(line["note"] for line in lines if line.get("note"))
    exhibit = Exhibit(
        "accuracy",
        "Accuracy",
        list(rows),
        "Share of the questions whose right choice is the likeliest, or whose word is, ± one standard error; `by "
        f"length`: likeliest per byte. {explained}. `loss`: nats per token of held-out text. {' '.join(notes)}".strip(),
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


def _cells(task: str, found: dict[str, float]) -> Row:
    """Accuracy, and with it what else the task tells: perplexity of the right word, or accuracy by length."""
    cells = {f"{task}, {found['n']} questions": f"{found['acc']:.1%} ± {found['acc_stderr']:.1%}"}
    if "perplexity" in found:
        cells[f"{task}, perplexity"] = f"{found['perplexity']:.1f}"
    if "acc_norm" in found:
        cells[f"{task}, by length"] = f"{found['acc_norm']:.1%}"
    return cells
