"""Models from scratch at windows from the whole context down to an eighth of it, on tokens that are read once.

| form | attention |
| --- | --- |
| `dense` | every key |
| `paper, w = N/k` | the paper's form at that window; with k = 1 its mask drops nothing, as mostly in the paper |
| `sliding + sinks` | the newest keys and the first four |
| `learned, even` | ranks learned from future attention, one window |
| `learned, head windows` | the same, windows per head set after a fifth of the training, four times as wide before |
| `newest, head windows` | newest keys and sinks in the windows that the run before found |

All runs of a size and seed read the same tokens in the same order; the test split is of documents that no run is chosen
on. Runs of the first seed come first, and of these the ones that decide most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynamask_lab.language.engine import LanguageConfig, language_cost, language_kind, run_language
from dynamask_lab.studies.judged import pairs_of, window_share
from dynamask_lab.sweeps.registry import Config, Experiment, register
from dynamask_lab.sweeps.results import Record, run_key

SINKS = 4
CALIBRATED_AT = 0.2
WIDE_START = 4.0
SHARE = 8
"""The window of the forms that choose is a so-manieth of the context."""

_COMMON: Config = {"corpus": "local", "warmup": 0.05, "test_share": 0.5}
SHAPES: dict[str, Config] = {
    "1M": {"layers": 6, "width": 128, "heads": 4, "groups": 2, "feed_forward": 352, "batch_tokens": 32_768},
    "4M": {"layers": 6, "width": 256, "heads": 8, "groups": 4, "feed_forward": 704, "batch_tokens": 65_536},
    "20M": {"layers": 7, "width": 512, "heads": 16, "groups": 8, "feed_forward": 1408, "batch_tokens": 131_072},
}
"""Non-embedding parameters -> shape; heads of 32."""


def forms(length: int) -> dict[str, Config]:
    """Name of a form -> its settings at that context, in the order of their worth."""
    window = max(2 * SINKS, length // SHARE)
    paper: Config = {"attention": "dma", "local": 0, "recency": 0.0}
    learned: Config = {"attention": "dma", "ranking": "learned", "window": window, "sinks": SINKS}
    learned["local"] = min(128, window // 2)
    calibrated = {"calibrate_at": CALIBRATED_AT, "window_schedule": [[0.0, WIDE_START], [CALIBRATED_AT, 1.0]]}
    return {
        "dense": {"attention": "mha"},
        "paper, w = N": {**paper, "window": length},
        "sliding + sinks": {"attention": "swa", "window": window, "sinks": SINKS},
        "learned, head windows": {**learned, **calibrated},
        f"paper, w = N/{SHARE}": {**paper, "window": length // SHARE},
        "learned, even": learned,
        "paper, w = N/2": {**paper, "window": length // 2},
        "paper, w = N/4": {**paper, "window": length // 4},
    }


def config(form: Config, shape: Mapping[str, Any], seed: int, rate: float, length: int, **more: Any) -> Config:
    """One run, defaults written out."""
    settings = {**_COMMON, **shape, **form, "length": length, "seed": seed, "learning_rate": rate, **more}
    return LanguageConfig(**settings).plain()


def scratch_name(settings: Config) -> str:
    """The name of a run's form."""
    length = settings["length"]
    if settings["attention"] == "mha":
        return "dense"
    if settings.get("layer_windows"):
        return "newest, head windows"
    if settings["attention"] == "swa":
        return "sliding + sinks"
    if settings.get("ranking") == "learned":
        return "learned, head windows" if settings.get("calibrate_at") else "learned, even"
    share = length // settings["window"]
    return "paper, w = N" if share == 1 else f"paper, w = N/{share}"


_RATES = {"1M": 3e-3, "4M": 2e-3, "20M": 1.5e-3}
_SMOKE: Config = {"layers": 2, "width": 32, "heads": 2, "groups": 1, "feed_forward": 64, "batch_tokens": 256}


def _smoke() -> list[Config]:
    """Every form once, in seconds on a CPU: shows that it runs, not what it learns."""
    small = {"corpus": "bytes", "steps": 6, "validation_tokens": 256}
    return [config(form, _SMOKE, 0, 3e-3, 64, **small) for form in forms(64).values()]


def _size(shape: str, length: int, seeds: Sequence[int], **more: Any) -> list[Config]:
    made = forms(length).values()
    return [config(form, SHAPES[shape], seed, _RATES[shape], length, **more) for seed in seeds for form in made]


SIZES = {
    "smoke": _smoke,
    # Minutes of one large GPU, on what `lab/scripts/local_corpus.py` finds on a machine without a registry.
    "tiny": lambda: _size("1M", 2048, (0, 1, 2), tokens_per_parameter=16.0),
    "small": lambda: _size("4M", 2048, (0, 1, 2), corpus="code+text"),
    "paper": lambda: _size("20M", 4096, (0, 1, 2), corpus="code+text"),
}


def follow_up(size: str, finished: Sequence[Record]) -> list[Config]:
    """The newest keys in the head windows of every finished run that was calibrated."""
    known = {run_key("scratch", each): each for each in SIZES[size]()}
    made = []
    for record in finished:
        if record.key in known and record.result.get("head_windows"):
            form = {"attention": "swa", "window": record.config["window"], "sinks": SINKS}
            own = {**known[record.key], **form, "layer_windows": record.result["head_windows"]}
            for name in ("ranking", "calibrate_at", "local"):
                own.pop(name, None)
            own["window_schedule"] = []
            made.append(LanguageConfig(**own).plain())
    return made


def scratch_summary(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row per size and form: losses on both splits, mean over seeds."""
    groups: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[LanguageConfig.of(record.config).parameters, scratch_name(record.config)].append(record)
    rows = []
    for (size, name), runs in sorted(groups.items()):
        row = {"parameters": f"{size / 1e6:.1f}M", "form": name, "w/N": window_share(runs[0].config)}
        row |= {"pairs": pairs_of(runs), "runs": str(len(runs))}
        for title, key in (("validation loss", "loss"), ("test loss", "test")):
            losses = [run.result.get(key) for run in runs]
            known = [loss for loss in losses if loss is not None]
            row[title] = f"{np.mean(known):.4f}" if len(known) == len(losses) else "diverged"
        rows.append(row)
    return rows


SCRATCH = Experiment(
    name="scratch",
    description="from scratch on fresh tokens: the paper's form up to w = N, sinks, learned ranks, windows per head",
    run=run_language,
    sizes=SIZES,
    cost=language_cost,
    kind=language_kind,
    summary=scratch_summary,
    interruptible=True,
    trains_language_models=True,
    follow_up=follow_up,
)
register(SCRATCH)
