"""The generated tables of README.md and of the site's pages, from the raw lines in `lab/results`.

A page marks where a table goes: `<!-- table: NAME -->` opens it and `<!-- end of table -->` closes it. `write_pages`
replaces what stands between.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamask.errors import UsageError, did_you_mean
from dynamask_lab.report.conversion import conversion_table, long_table, of_main_model, read_conversion, sources
from dynamask_lab.report.conversion_bound import bound_rows, cache_rows, read_bound, search_rows
from dynamask_lab.report.cost_table import cost_table, read_runs
from dynamask_lab.report.page_tables import NOT_MEASURED, table_with_note
from dynamask_lab.report.quality_table import quality_table
from dynamask_lab.report.speed_table import speed_table
from dynamask_lab.sweeps.section import Row

PAGES = ("README.md", "docs/performance.md", "docs/quality.md", "docs/converting-study.md", "docs/index.md")
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


def conversion_summary(results: Path) -> str:
    """Draw a pretrained model, dense and with a bounded cache. See `dynamask_lab.report.conversion_summary`."""
    # Only here: the study's modules draw pictures, and take long to import.
    from dynamask_lab.report.conversion_summary import conversion_summary as draw

    return draw(results)


def conversion_forms(results: Path) -> str:
    """All forms and budgets of the conversion study whose needles or benchmarks were measured."""
    lines = of_main_model(read_conversion(results))
    rows = conversion_table(lines)
    return _conversion(lines, [row for row in rows if row.get("needles, %") or row.get("benchmarks, %")])


def conversion_goals(results: Path) -> str:
    """The goals of the conversion study, with intervals, and whether they are met."""
    # Only here: the study's module draws pictures, and takes long to import.
    from dynamask_lab.report.conversion_goals import goal_rows

    lines = read_conversion(results)
    note = (
        "512 keys per KV head where a form names none; distilled: the default, 400 steps of 4 x 8,192 tokens at a rate "
        "of 4e-4, embeddings fixed, the mean of the last quarter's weights; forms beside it name what differs; 95% "
        "bootstrap intervals over documents, examples or "
        "questions, paired."
    )
    timed = read_runs(results)
    return table_with_note(goal_rows(lines, timed), f"{note} {sources(lines)}.") if lines else NOT_MEASURED


def conversion_verdicts(results: Path) -> str:
    """The goals of the conversion study, one row each."""
    # Only here: the study's module draws pictures, and takes long to import.
    from dynamask_lab.report.conversion_verdicts import verdict_rows

    lines = read_conversion(results)
    note = (
        "smollm2-135m-instruct unless Gemma is named; 95% bootstrap intervals over documents, examples or questions, "
        "paired; the mean decides, over several seeds where there are some, whether or not the interval holds the bar. "
        "Seconds: in brackets the fastest and the slowest seed, and the mean of each stage. Cache: share of the keys "
        "of 8,192 tokens; pairs: share of the pairs of query and key that the windows let through. Distilled: the "
        "default."
    )
    return table_with_note(verdict_rows(lines, read_runs(results)), note) if lines else NOT_MEASURED


def conversion_tasks(results: Path) -> str:
    """The generated tasks by group, beside every peer."""
    # Only here: the study's module draws pictures, and takes long to import.
    from dynamask_lab.report.conversion_tasks import task_rows

    lines = read_conversion(results)
    note = (
        "smollm2-135m-instruct, 512 keys per KV head but for dense; answers right, %, of 25 examples of each task and "
        "length, 1K to 8K where none stands, generated from the bounded cache; a press compresses the cache before "
        "the question is known. Pairs: two questions on the same cache. Empty: not measured, or not at every length."
    )
    return table_with_note(task_rows(lines), note) if lines else NOT_MEASURED


def conversion_long(results: Path) -> str:
    """Losses beyond the context that the model was trained for, dense and converted."""
    lines = read_conversion(results)
    rows = long_table([line for line in lines if line["measure"] in ("long", "tasks")])
    note = (
        "Losses in nats of all positions, in brackets of the last eighth; needles: single 1, single 2 and multi-key 1; "
        "positions scaled by YaRN. "
    )
    return table_with_note(rows, f"{note}{sources(lines)}.")


def gemma_bound(results: Path) -> str:
    """What bounds the frozen conversion of Gemma 3 270M."""
    rows = bound_rows(read_bound(results, "conversion bound"))
    note = "Gemma 3 270M, 8,192 tokens, 12 blocks; 95% bootstrap intervals over them, paired. NVIDIA H200."
    return table_with_note(rows, note)


def gemma_search(results: Path) -> str:
    """Windows and slopes of Gemma 3 270M, estimated and searched."""
    lines = read_bound(results, "conversion search")
    note = (
        "Gemma 3 270M, ranks learned on planted facts, 8,192 tokens, 12 test blocks; 95% bootstrap intervals over "
        "them, paired. NVIDIA H200."
    )
    return table_with_note(search_rows(lines), note) if lines else NOT_MEASURED


def gemma_cache(results: Path) -> str:
    """The whole cache of Gemma 3 270M, dense and converted."""
    rows = cache_rows(read_bound(results, "conversion cache"))
    note = "One sequence in bfloat16; 15 layers slide over 512 keys in both models, three are global."
    return table_with_note(rows, note)


def _conversion(lines: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    if not rows:
        return NOT_MEASURED
    model = Counter(line["model"] for line in lines).most_common(1)[0][0]
    context = next((line["settings"]["context"] for line in lines if line["measure"] == "continuation"), None)
    behind = f" behind a context of {context:,} tokens" if context else ""
    note = (
        f"{model}; losses in nats{behind}; needles: seven tasks after RULER at 1K to 4K tokens; needles and benchmarks "
        "are means over what every form was measured on; cache of one sequence; tokens/s of a batch. Empty: not "
        "measured. "
        f"{sources(lines)}."
    )
    return table_with_note(rows, note)


TABLES: dict[str, Callable[[Path], str]] = {
    "speed": speed_table,
    "quality": quality_table,
    "conversion": conversion_summary,
    "conversion-forms": conversion_forms,
    "conversion-verdicts": conversion_verdicts,
    "conversion-tasks": conversion_tasks,
    "conversion-goals": conversion_goals,
    "conversion-long": conversion_long,
    "gemma-bound": gemma_bound,
    "gemma-search": gemma_search,
    "gemma-cache": gemma_cache,
    "cost": cost_table,
}
"""Name of a marked part -> what draws it from the folder of raw lines."""


def fill(text: str, results: Path) -> str:
    """Draw the marked tables of a page.

    Args:
        text: the page, markdown.
        results: folder of raw lines.

    Returns:
        The page with its tables replaced, and everything else as it was.

    Raises:
        UsageError: a mark that names no table, or is not closed.
    """

    def drawn(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise UsageError(f"no table {name!r}{did_you_mean(name, TABLES)}; there are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name](results)}\n{match[3]}"

    if text.count("<!-- table: ") != len(_MARKED.findall(text)):
        raise UsageError("a mark <!-- table: NAME --> is not closed by <!-- end of table -->")
    return _MARKED.sub(drawn, text)


def write_pages(root: Path, results: Path) -> list[Path]:
    """Draw the marked tables of the README and of the site's pages.

    Args:
        root: the checkout.
        results: folder of raw lines.

    Returns:
        The pages that changed.

    Raises:
        UsageError: see `fill`.
    """
    changed = []
    for page in (root / name for name in PAGES):
        if page.exists():
            text = page.read_text(encoding="utf-8")
            filled = fill(text, results)
            if filled != text:
                page.write_text(filled, encoding="utf-8")
                changed.append(page)
    return changed
