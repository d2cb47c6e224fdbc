"""The generated tables of README.md and of the site's pages, from the raw lines in `lab/results`.

A page marks where a table goes: `<!-- table: NAME -->` opens it and `<!-- end of table -->` closes it. `write_pages`
replaces what stands between.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask.errors import UsageError, did_you_mean
from dynamask_lab.report.conversion import (
    conversion_table,
    long_table,
    of_main_model,
    read_conversion,
    sources,
    training_seconds,
)
from dynamask_lab.report.conversion_bound import bound_rows, cache_rows, read_bound
from dynamask_lab.studies.judged import layer_windows, share_of_pairs
from dynamask_lab.sweeps.section import Row
from dynamask_lab.sweeps.verdicts import FEW_SEEDS, FEW_SEEDS_INTEREST

PAGES = ("README.md", "docs/performance.md", "docs/quality.md", "docs/converting.md", "docs/index.md")
NOT_MEASURED = "Not measured yet."
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)
_DENSE = ("flash", "cudnn", "fa3")


# Speed: one attention, on a GPU and on a CPU.

_GPU_ROWS = ((4096, 1024), (8192, 2048), (32768, 2048), (131072, 2048))
"""Length and window of the GPU rows; heads as in `_GPU_SHAPE`."""
_GPU_SHAPE = {"D": 128, "H": 16, "G": 4, "scores": "random"}


def speed_table(results: Path) -> str:
    """One attention call against the fastest dense kernel timed beside it, wins and losses alike."""
    rows: list[Row] = []
    notes = []
    gpu = _json(results / "h100-attention.json")
    if gpu is not None:
        for length, window in _GPU_ROWS:
            shape = {"N": length, "w": window, **_GPU_SHAPE}
            for row in gpu["attention"]:
                if all(row[name] == value for name, value in shape.items()):
                    rows.append(_gpu_row(row))
        environment = gpu["environment"]
        notes.append(
            f"GPU: {environment['device']}, bfloat16, batch 1, {_GPU_SHAPE['H']} query heads, {_GPU_SHAPE['G']} KV "
            f"heads, head dimension {_GPU_SHAPE['D']}, random scores; torch {environment['torch']}, commit "
            f"{environment['commit']}"
        )
    cpu = _json(results / "cpu.json")
    if cpu is not None:
        for row in cpu["rows"]:
            ours, dense = ([row[f"{peer}_forward_s"], row[f"{peer}_train_s"]] for peer in ("interval", "dense_sdpa"))
            rows.append(_speed_row("CPU", row["length"], row["window"], *_ms(ours, dense)))
        environment = cpu["environment"]
        first = cpu["rows"][0]
        notes.append(
            f"CPU: {environment['device']}, {environment['threads']} threads, float32, {first['heads']} query heads, "
            f"{first['groups']} KV heads, head dimension {first['dim']}; dense is PyTorch's causal SDPA; commit "
            f"{environment['commit']}"
        )
    return _table(rows, "Milliseconds. " + ". ".join(notes) + ".")


def _gpu_row(row: Mapping[str, Any]) -> Row:
    def dense(kind: str) -> float:
        return min(row[f"{peer}_{kind}_ms"] for peer in _DENSE if row.get(f"{peer}_{kind}_ms") is not None)

    forward, backward = dense("forward"), dense("backward")
    ours = [row["forward_ms"], row["forward_ms"] + row["backward_ms"]]
    return _speed_row("GPU", row["N"], row["w"], ours, [forward, forward + backward])


def _ms(*seconds: Sequence[float]) -> list[list[float]]:
    return [[1e3 * each for each in pair] for pair in seconds]


def _speed_row(device: str, length: int, window: int, ours: Sequence[float], dense: Sequence[float]) -> Row:
    cells = {"": device, "N": f"{length:,}", "window": f"{window:,}"}
    for name, own, other in zip(("forward", "forward + backward"), ours, dense, strict=True):
        cells |= {name: f"{own:.3g}", f"dense {name}": f"{other:.3g}", f"x {name}": f"{other / own:.2g}"}
    titles = {"x forward": "ratio", "x forward + backward": "ratio "}
    return {titles.get(name, name): cell for name, cell in cells.items()}


# Quality: models trained from scratch.


@dataclass(frozen=True)
class Measured:
    """A row of the quality table, and the raw lines it averages.

    Attributes:
        recipe: name in `dynamask.recipes`; "" for a rival that is none.
        attention: what the row shows, in words.
        form: name of its runs in the ledger of the language sweeps (`variant_name` of their fields); "": not run there.
        needle: name of its scores in the ledger of the retrieval sweep; "": not run there.
    """

    recipe: str
    attention: str
    form: str
    needle: str = ""


QUALITY = (
    Measured("dense", "every key (mha)", "mha", "mha"),
    Measured("", "latent (mla)", "mla"),
    Measured("", "newest keys, even windows (swa)", "swa"),
    Measured("sliding", "newest keys, few layers wide", "swa, narrow windows 32", "swa, windows 128/1280"),
    Measured("default", "0.1's ranks, few layers wide", "dma, gentle, ranked by attention, narrow windows 32"),
    Measured("recall", "0.1's ranks, wide at first", "", "dma, windows 128/1280, from dense, ranked by attention^4"),
    Measured("even", "0.1's ranks, even windows", "dma, gentle, ranked by attention"),
    Measured("paper", "the paper's scores", "dma, paper", "dma, paper"),
)
"""Runs in which dynamask 0.1 ranked keys stand in for recipes whose ranks are learned from the hidden state."""


@dataclass(frozen=True)
class _Losses:
    """A column of losses: sweep, corpus and width of its runs."""

    sweep: str
    corpus: str
    width: int


_LOSSES = (
    _Losses("locality-chinchilla", "code", 256),
    _Losses("locality-chinchilla", "text", 256),
    _Losses("scaling-small", "code+text", 512),
)
_NEEDLE = "needle-long"


def quality_table(results: Path) -> str:
    """Validation losses of models trained from scratch, and what they find in a long text."""
    named = {
        sweep: _named(_lines(results / f"{sweep}.jsonl")) for sweep in dict.fromkeys(column.sweep for column in _LOSSES)
    }
    needle = _lines(results / f"{_NEEDLE}.jsonl")
    edge = max(
        (max(layer_windows(line["config"])) for line in needle if line["config"]["attention"] != "mha"), default=0
    )
    rows: list[Row] = []
    used: list[Mapping[str, Any]] = []
    for measured in QUALITY:
        own = [
            [
                line
                for line in named[column.sweep].get(measured.form, ())
                if line["config"]["corpus"] == column.corpus and line["config"]["width"] == column.width
            ]
            for column in _LOSSES
        ]
        cells = {"recipe": f"`{measured.recipe}`" if measured.recipe else "", "attention": measured.attention}
        for column, lines in zip(_LOSSES, own, strict=True):
            size = next((line["result"]["parameters"]["non_embedding"] for line in lines), None)
            title = f"{column.corpus.replace('+', ' + ')}, {_millions(named[column.sweep], column)}"
            cells[title] = "" if size is None else _loss_cell(lines)
        inside, beyond = (_retrieved(needle, measured.needle, edge, within) for within in (True, False))
        for title, found in ((f"needles within {edge:,}", inside), ("needles beyond", beyond)):
            cells[title] = "" if found is None else f"{100 * found:.0f}%"
        flat = [line for lines in own for line in lines]
        searching = _searching(needle, measured.needle)
        cells["pairs"] = _range([share_of_pairs(line["config"]) for line in [*flat, *searching]])
        cells["widest layer"] = _range([_widest_pairs(line["config"]) for line in [*flat, *searching]])
        if flat or inside is not None:
            rows.append(cells)
            used += flat
    if not used:
        return NOT_MEASURED
    contexts = sorted({line["config"]["length"] for line in used})
    context = " and ".join(f"{length:,}" for length in contexts) + " tokens"
    sizes = [line["result"]["parameters"] for line in needle]
    needles = f" ({min(sizes) / 1e6:.1f}M, one seed)" if sizes else ""
    note = (
        f"Losses in nats per token of held-out text at contexts of {context}, in brackets the seeds: with fewer than "
        f"{FEW_SEEDS}, differences below {FEW_SEEDS_INTEREST} decide nothing. Needles{needles}: found up to the "
        "trained length, those next to the question left out, by the distance of the question: the widest layer of "
        f"any sparse row sees {edge:,} keys. `pairs`: query-key pairs as a share of dense attention's, of the model "
        "and of its widest layer. Empty cells were not run."
    )
    return _table(rows, note)


def _named(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    from dynamask_lab.studies.locality.study import variant_name

    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(variant_name(line["config"], any_depth=True), []).append(line)
    return found


def _millions(named: Mapping[str, Sequence[Mapping[str, Any]]], column: _Losses) -> str:
    sizes = [
        line["result"]["parameters"]["non_embedding"]
        for lines in named.values()
        for line in lines
        if line["config"]["width"] == column.width
    ]
    return f"{min(sizes) / 1e6:.1f}M" if sizes else "?"


def _loss_cell(lines: Sequence[Mapping[str, Any]]) -> str:
    """The mean loss over seeds at the best learning rate, and how many seeds that is."""
    rates: dict[float, list[float]] = {}
    for line in lines:
        rates.setdefault(line["config"]["learning_rate"], []).append(line["result"]["loss"])
    best = min(rates.values(), key=lambda losses: sum(losses) / len(losses))
    return f"{sum(best) / len(best):.3f} ({len(best)})"


def _retrieved(lines: Sequence[Mapping[str, Any]], model: str, edge: int, within: bool) -> float | None:
    """The share of exact answers at trained lengths, by whether the needle lies within `edge` tokens of the question.

    Needles next to the question are left out.
    """
    exact = [
        score["exact"]
        for line in lines
        for score in line["result"]["scores"]
        if score["model"] == model
        and score["length"] <= line["config"]["context"]
        and score["depth"] < 1
        and (score["length"] * (1 - score["depth"]) <= edge) == within
    ]
    return sum(exact) / len(exact) if exact else None


def _widest_pairs(config: Mapping[str, Any]) -> float:
    """The widest layer's query-key pairs as a share of dense attention's."""
    length = config.get("length") or config["context"]
    widest = max(layer_windows(dict(config)))
    return share_of_pairs({"length": length, "layers": 1, "attention": "swa", "window": widest})


def _searching(lines: Sequence[Mapping[str, Any]], model: str) -> list[Mapping[str, Any]]:
    """The lines of the retrieval sweep whose trained model, not one made of it, has that name."""
    return [line for line in lines if line["result"]["scores"][0]["model"] == model]


def _range(shares: Sequence[float]) -> str:
    cells = list(dict.fromkeys(f"{100 * share:.0f}%" for share in sorted(shares)))
    return "" if not cells else cells[0] if len(cells) == 1 else f"{cells[0]} to {cells[-1]}"


# Conversion: a pretrained model.


_BUDGET = 512
_PEERS = 2


def conversion_summary(results: Path) -> str:
    """A pretrained model, dense and with a bounded cache, beside the best rivals at the same cache."""
    lines = of_main_model(read_conversion(results))
    main = [line for line in lines if _is_main(line["spec"])]
    chosen: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for line in main:
        chosen[_family(line)] = max(chosen.get(_family(line), ()), _version(line))
    main = [line for line in main if _version(line) == chosen[_family(line)]]
    rows = conversion_table(main)
    rivals = [row for row in rows if row["form"].startswith("kvpress")]
    left_out = [row["form"] for row in rivals[_PEERS:]]
    return _conversion(lines, [row for row in rows if row["form"] not in left_out])


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
    timed = [line for file in sorted((results / "decode").glob("*.jsonl")) for line in _lines(file)]
    return _table(goal_rows(lines, timed), f"{note} {sources(lines)}.") if lines else NOT_MEASURED


def conversion_long(results: Path) -> str:
    """Losses beyond the context that the model was trained for, dense and converted."""
    lines = read_conversion(results)
    rows = long_table([line for line in lines if line["measure"] in ("long", "tasks")])
    note = (
        "Losses in nats of all positions, in brackets of the last eighth; needles: single 1, single 2 and multi-key 1; "
        "positions scaled by YaRN. "
    )
    return _table(rows, f"{note}{sources(lines)}.")


def gemma_bound(results: Path) -> str:
    """What bounds the frozen conversion of Gemma 3 270M."""
    rows = bound_rows(read_bound(results, "conversion bound"))
    note = "Gemma 3 270M, 8,192 tokens, 12 blocks; 95% bootstrap intervals over them, paired. NVIDIA H200."
    return _table(rows, note) if rows else NOT_MEASURED


def gemma_cache(results: Path) -> str:
    """The whole cache of Gemma 3 270M, dense and converted."""
    rows = cache_rows(read_bound(results, "conversion cache"))
    note = "One sequence in bfloat16; 15 layers slide over 512 keys in both models, three are global."
    return _table(rows, note) if rows else NOT_MEASURED


def _family(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What forms have in common that differ by how windows were set and how they were trained."""
    return tuple(line["spec"][name] for name in ("kind", "budget", "windows", "ranks", "distilled", "peer"))


def _version(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells the forms of a family apart; of the highest is shown: slopes, then windows by loss, then the default's
    embeddings and mean of weights, then steps."""
    spec = line["spec"]
    by_loss = spec.get("allocation", "threshold") == "loss"
    default = not spec.get("embeddings", True), spec.get("average", 0.0)
    return bool(spec.get("slopes")), by_loss, *default, spec.get("steps") or 0, spec.get("rate") or 0.0


def _is_main(spec: Mapping[str, Any]) -> bool:
    if spec["budget"] not in (None, _BUDGET) or spec["rope"] != 1 or spec["predictor"] != "hidden":
        return False
    if spec.get("label_share") or spec.get("start_windows", 1.0) != 1:
        return False
    if spec.get("loop") or spec.get("context"):
        return False
    if spec.get("beginning_share") or spec.get("mixed", 1.0) != 1 or spec.get("average", 0.25) != 0.25:
        return False
    if spec["kind"] != "converted":
        return True
    if spec["ranks"] == "learned":
        return bool(spec["windows"] == "heads")
    return bool(spec["distilled"])  # the controls: newest keys, in the same windows and in one window for all heads


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
    return _table(rows, note)


# Cost: a whole model.


def cost_table(results: Path) -> str:
    """What a whole model takes: time, memory and cache, beside the same model with dense attention."""
    raw = _json(results / "h100-model" / "model.json")
    rows: list[Row] = []
    note = ""
    if raw is not None:
        environment = raw["environment"]
        note = (
            f"Model `{raw['settings']['preset']}` on {environment['device']}, scattered keys; dense is flash attention "
            f"and decodes from the fastest cache. torch {environment['torch']}, commit {environment['commit']}."
        )
        lengths = sorted({row["N"] for row in raw["training"]})
        for length in (lengths[0], lengths[-1]):
            pair = _pair(raw["training"], "tokens_per_s", max, N=length)
            rows.append(
                _cost(f"training at {_kilo(length)}, thousand tokens/s", pair, lambda value: f"{value / 1e3:.1f}")
            )
        memory = _pair(raw["training"], "peak_gib", min, N=lengths[-1])
        rows.append(
            _cost(f"peak memory of training at {_kilo(lengths[-1])}, GiB", memory, lambda value: f"{value:.1f}")
        )
        for length in sorted({row["N"] for row in raw["prefill"]}):
            pair = _pair(raw["prefill"], "tokens_per_s", max, N=length)
            rows.append(
                _cost(f"prefill of {_kilo(length)}, thousand tokens/s", pair, lambda value: f"{value / 1e3:.0f}")
            )
        batches = sorted({row["batch"] for row in raw["generation"]})
        contexts = sorted({row["context"] for row in raw["generation"]})
        contexts = [contexts[0], contexts[-1]]
        for batch in (batches[0], batches[-1]):
            for context in contexts if batch == 1 else contexts[-1:]:
                pair = _pair(raw["generation"], "tokens_per_s", max, context=context, batch=batch)
                title = f"decoding at {_kilo(context)}, batch {batch}, tokens/s"
                rows.append(_cost(title, pair, lambda value: f"{value:,.0f}"))
        for context in contexts:
            pair = _pair(raw["generation"], "cache_mib", min, context=context, batch=batches[0])
            rows.append(_cost(f"cache of a sequence at {_kilo(context)}, MiB", pair, lambda value: f"{value:,.0f}"))
    seconds = training_seconds(read_conversion(results))
    names = {"learn_ranks": "ranks", "allocate_windows": "windows", "train": "distillation"}
    done = [name for name in names if name in seconds]
    if done:
        title = f"conversion, {' + '.join(names[name] for name in done)}, s"
        rows.append({"": title, "dynamask": " + ".join(f"{seconds[name]:,.0f}" for name in done), "dense": ""})
    return _table(rows, note)


def _pair(
    rows: Sequence[Mapping[str, Any]], name: str, best: Callable[..., float], **settings: Any
) -> list[float | str]:
    """The best figure of the rows with dynamic masks, and of those with dense attention, or why there is none."""
    own = [row for row in rows if all(row[key] == value for key, value in settings.items())]
    found: list[float | str] = []
    for dense in (False, True):
        alike = [row for row in own if row["attention"].startswith("mha") is dense]
        values = [row[name] for row in alike if row.get(name) is not None]
        skipped = any("GiB" in row.get("skipped", "") for row in alike)
        found.append(best(values) if values else "out of memory" if skipped else "")
    return found


def _cost(title: str, pair: Sequence[float | str], cell: Callable[[float], str]) -> Row:
    ours, dense = (value if isinstance(value, str) else cell(value) for value in pair)
    return {"": title, "dynamask": ours, "dense": dense}


def _kilo(tokens: int) -> str:
    return f"{tokens // 1024}K"


# Pages.

TABLES: dict[str, Callable[[Path], str]] = {
    "speed": speed_table,
    "quality": quality_table,
    "conversion": conversion_summary,
    "conversion-forms": conversion_forms,
    "conversion-goals": conversion_goals,
    "conversion-long": conversion_long,
    "gemma-bound": gemma_bound,
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


def _table(rows: Sequence[Row], note: str) -> str:
    from dynamask_lab.report.results import markdown_table

    return f"{markdown_table(rows)}\n\n{note}" if rows else NOT_MEASURED


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
