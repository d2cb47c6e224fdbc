"""The lines of the conversion study as tables: what a pretrained model keeps when its cache is bounded."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask_lab.studies.conversion.forms import LOCAL, STEPS
from dynamask_lab.studies.conversion.tasks import NEEDLE_TASKS
from dynamask_lab.sweeps.provenance import short_commit
from dynamask_lab.sweeps.section import Exhibit, Row, Section

PATTERN = "conversion*.jsonl"
_BUDGET = 512
STUDY = "conversion"
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One measure of the study as a column.

    Attributes:
        title: heading.
        measure: of the lines it reads.
        settings: of the lines it reads; others are free.
        values: result of a line -> figures that are averaged.
        form: format of a cell.
        counts: settings of a line -> whether the line counts.
    """

    title: str
    measure: str
    settings: Mapping[str, Any]
    values: Callable[[Mapping[str, Any]], Iterable[float]]
    form: str
    counts: Callable[[Mapping[str, Any]], bool] = lambda settings: True


def _losses(result: Mapping[str, Any]) -> Iterable[float]:
    found = result["losses"]
    return itertools.chain.from_iterable(found) if found and isinstance(found[0], list) else found


def _scores(result: Mapping[str, Any]) -> Iterable[float]:
    return [100 * score for scores in result["scores"] for score in scores]


def _right(result: Mapping[str, Any]) -> Iterable[float]:
    return [100 * right for right in result["acc"]]


def _is_needle(settings: Mapping[str, Any]) -> bool:
    return settings["task"] in _NEEDLES and settings["length"] <= _LONGEST_NEEDLE


_DEFAULT = {"embeddings": False, "average": 0.25, "rate": 4e-4, "steps": 400}
"""Of a spec whose distillation is the product's default."""
_NEEDLES = tuple(task for task in NEEDLE_TASKS if task != "multikey_3")  # which the dense model fails, too
_LONGEST_NEEDLE = 4096
_LONG_NEEDLES = 16384

_EARLIER = {"slopes": None}
"""The run of speed without slopes; that with slopes stands among the goals."""

SHORT_COLUMNS = (
    Column("text loss", "continuation", {"corpus": "text"}, _losses, ".3f"),
    Column("code loss", "continuation", {"corpus": "code"}, _losses, ".3f"),
    Column("needles, %", "tasks", {"haystack": "essays", "first": 0}, _scores, ".1f", _is_needle),
    Column("benchmarks, %", "benchmark", {}, _right, ".1f"),
    Column("cache, MiB", "speed", {"batch": 1, "slopes": None}, lambda result: [result["cache_bytes"] / 2**20], ".1f"),
    Column(
        "tokens/s", "speed", {"batch": 16, "slopes": None}, lambda result: [result["decoded_tokens_per_second"]], ",.0f"
    ),
)
"""What the README shows of a form."""


def read_conversion(results: Path) -> list[dict[str, Any]]:
    """Read the study's lines, each job of a model once: of lines with one key the last counts.

    Args:
        results: folder of raw lines.

    Returns:
        The lines of `conversion*.jsonl`, in order; a last line that a kill cut off is left out.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted(results.glob(PATTERN)):
        for text in file.read_text(encoding="utf-8").split("\n"):
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and line.get("study") == STUDY and "limit" not in line:
                found[line["model"], line["key"]] = line
    return list(found.values())


def of_main_model(lines: Sequence[dict[str, Any]] | Sequence[Line]) -> list[Any]:
    """Return the lines of the model that has most of them."""
    models = Counter(line["model"] for line in lines).most_common(1)
    return [line for line in lines if line["model"] == models[0][0]]


def form_name(spec: Mapping[str, Any]) -> str:
    """Describe a form of the study in words."""
    kind = spec["kind"]
    if kind == "dense":
        words = ["dense"]
    elif kind == "dense trained":
        words = ["dense, trained as long"]
    elif kind == "peer":
        words = [f"kvpress {spec['peer']}"]
    else:
        chosen = "learned ranks" if spec["ranks"] == "learned" else "newest keys"
        words = [chosen, "a window per head" if spec["windows"] == "heads" else "one window"]
        if spec["predictor"] != "hidden":
            words.append({"linear": "linear predictor", "values": "ranks from values"}[spec["predictor"]])
        if spec.get("allocation", "threshold") != "threshold":
            words.append("windows and slopes by loss" if spec.get("slopes") else "windows by loss")
        default = spec["distilled"] and all(spec.get(name) == value for name, value in _DEFAULT.items())
        if default:
            spec = {name: value for name, value in spec.items() if name not in _DEFAULT}
        words.append("distilled by default" if default else "distilled" if spec["distilled"] else "model frozen")
        if spec.get("label_share"):
            words.append(f"{spec['label_share']:.0%} next tokens")
        if spec.get("start_windows", 1.0) != 1:
            words.append(f"from {spec['start_windows']:g} times the windows")
    if spec.get("origin"):
        words.append("from the trained dense model")
    if spec.get("loop") and kind == "dense trained":
        words.append("in distillation's loop")
    if spec.get("beginning_share"):
        words.append(f"{spec['beginning_share']:.0%} of the loss at the beginning")
    if not spec.get("embeddings", True):
        words.append("embeddings fixed")
    if spec.get("average"):
        words.append(f"mean of the last {spec['average']:.0%} of the steps")
    if spec.get("mixed", 1.0) != 1:
        words.append(f"{1 - spec['mixed']:.0%} dense weights")
    if spec.get("context"):
        words.append(f"learned at {spec['context'] // 1024}K under YaRN")
    texts = {"plain": "plain text", "spans": "text with copied spans", "facts": "text with planted facts"}
    if spec.get("texts"):
        words.append(f"ranks from {texts[spec['texts']]}")
    if spec.get("distil_texts") and spec["distil_texts"] != spec.get("texts"):
        words.append(f"distilled on {texts[spec['distil_texts']]}")
    if spec.get("local", LOCAL) != LOCAL:
        words.append(f"{spec['local']} newest keys")
    if spec.get("target"):
        words.append("ranks by their effect on the loss")
    if spec.get("width"):
        words.append(f"predictors of {spec['width']} units")
    if spec.get("rank_steps"):
        words.append(f"ranks for {spec['rank_steps']} steps")
    if spec.get("rate") is not None:
        words.append(f"rate {spec['rate']:g}")
    if spec.get("steps", STEPS) != STEPS:
        words.append(f"{spec['steps']} steps")
    if spec["rope"] != 1:
        words.append(f"YaRN {spec['rope']}")
    return ", ".join(words)


def conversion_table(lines: Sequence[Line], columns: Sequence[Column] = SHORT_COLUMNS, *, model: str = "") -> list[Row]:
    """Average the measures of every form of one model.

    A mean is over the settings (tasks and lengths, benchmarks) that the forms have in common, so that the cells of a
    column compare. A form that lacks a measure, or most of its settings, has an empty cell.

    Args:
        lines: of the study.
        columns: measures to show.
        model: name of the model; "": the one with most lines.

    Returns:
        One row per form and budget, the dense model first, then by needles.
    """
    if not lines:
        return []
    model = model or Counter(line["model"] for line in lines).most_common(1)[0][0]
    lines = [line for line in lines if line["model"] == model]
    rows: dict[tuple[str, int | None], dict[str, str]] = {}
    order: dict[tuple[str, int | None], float] = {}
    for column in columns:
        cells: dict[tuple[str, int | None], dict[str, list[float]]] = {}
        for line in lines:
            if line["measure"] != column.measure:
                continue
            if any(line["settings"].get(name) != value for name, value in column.settings.items()):
                continue
            if not column.counts(line["settings"]):
                continue
            setting = json.dumps(line["settings"], sort_keys=True)
            name = form_name(line["spec"]), line["spec"]["budget"]
            cells.setdefault(name, {}).setdefault(setting, []).extend(column.values(line["result"]))
        shared = _in_common(list(cells.values()))
        for name, found in cells.items():
            row = rows.setdefault(name, {})
            if shared and shared <= set(found):
                means = [sum(found[setting]) / len(found[setting]) for setting in sorted(shared)]
                mean = sum(means) / len(means)
                row[column.title] = format(mean, column.form)
                if column.measure == "tasks":
                    order[name] = mean
    made: list[Row] = []
    for name in sorted(rows, key=lambda name: (not name[0].startswith("dense"), -order.get(name, 0), name[0])):
        made.append({"form": name[0], "keys per head": "all" if name[1] is None else f"{name[1]:,}", **rows[name]})
    return made


def long_table(lines: Sequence[Line]) -> list[Row]:
    """Losses of long blocks: of all positions, and in brackets of their last eighth. And needles at 16K.

    Args:
        lines: of the measures "long" and "tasks"; of tasks, those at 16K count.

    Returns:
        One row per form, with a column for each length and corpus.
    """
    rows: dict[tuple[str, int | None], dict[str, str]] = {}
    found: dict[tuple[str, int | None], list[float]] = {}
    for line in lines:
        if line["measure"] == "tasks" and line["settings"]["length"] != _LONG_NEEDLES:
            continue
        spec = {**line["spec"], "rope": 1}
        row = rows.setdefault(
            (form_name(spec), spec["budget"]),
            {"form": form_name(spec), "keys per head": "all" if spec["budget"] is None else f"{spec['budget']:,}"},
        )
        if line["measure"] == "tasks":
            name = form_name(spec), spec["budget"]
            found.setdefault(name, []).extend(_scores(line["result"]))
            row["16K needles, %"] = format(sum(found[name]) / len(found[name]), ".1f")
            continue
        blocks = [[loss for loss in block if not math.isnan(loss)] for block in line["result"]["losses"]]
        whole = [sum(block) / len(block) for block in blocks]
        ends = [block[-len(block) // 8 :] for block in blocks]
        last = [sum(end) / len(end) for end in ends]
        title = f"{line['settings']['length'] // 1024}K {line['settings']['corpus']}"
        row[title] = f"{sum(whole) / len(whole):.3f} ({sum(last) / len(last):.3f})"
    return [*rows.values()]


def _in_common(found: Sequence[Mapping[str, Any]]) -> set[str]:
    """The settings that all forms have, those that hold less than half of the most left out of account."""
    most = max((len(settings) for settings in found), default=0)
    whole = [set(settings) for settings in found if 2 * len(settings) >= most]
    return set.intersection(*whole) if whole else set()


def sources(lines: Sequence[Line]) -> str:
    """Name the devices and commits that the lines come from."""
    devices = dict.fromkeys(str(line.get("device")).replace("))", ")") for line in lines)
    commits = dict.fromkeys(short_commit(line.get("commit")) for line in lines)
    return f"{', '.join(devices)}; commit {', '.join(commits)}"


def conversion_section(lines: Sequence[Any], folder: Path) -> tuple[Section, dict[str, Any], str]:
    """Show one file of the study. See `dynamask_lab.report.benchmarks.Benchmark.section`."""
    own = [line for line in lines if line.get("study") == STUDY]
    rows = {f"{line['form']}-{line['key']}": line for line in own}
    exhibits = []
    for model in dict.fromkeys(line["model"] for line in own):
        keys = [key for key, line in rows.items() if line["model"] == model]
        table = conversion_table(own, model=model)
        text = (
            "Losses in nats behind a compressed context; needles: seven tasks of one or more needles at 1K to 4K "
            "tokens; `keys per head`: the mean over KV heads. Empty cells were not measured."
        )
        exhibits.append(Exhibit(f"forms-{model}", f"{model}", keys, text, table))
    return Section("", exhibits), rows, sources(own)
