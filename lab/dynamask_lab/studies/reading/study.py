"""Documents of 16 thousand tokens and more, from scratch: dense attention against an eighth of its pairs, of one time.

| form | attention at 16,384 tokens |
| --- | --- |
| `dense` | every key; `dense, half rate` learns at half the rate of all others |
| `learned, slopes, one wide layer` | 5632 keys in one layer of six, 256 in the others; ranks rise with the position |
| `learned, one wide layer` | the same without slopes |
| `sliding + sinks, one wide layer` | the newest keys in the same windows |

The sparse forms run twice: on as many tokens as dense attention (`equal tokens`), and on twice as many (`twice the
tokens`), which is about half of dense attention's operations. That was meant as equal time; no run had a GPU alone, so
times are not compared. Documents are whole folders of sources, see `local_corpus.py`.

Judged, named before the runs: the test loss of tokens whose last use lies beyond the narrow windows (256 tokens and
more) and beyond every window (8192 and more), of `learned, slopes, one wide layer, twice the tokens` against `dense`
and against `sliding + sinks, one wide layer, twice the tokens`, seed by seed, by intervals that exclude zero and at
least 0.02 nats. The form without slopes was added before its runs and after those of twice the tokens; it is judged by
the same rule. Dense attention at half the rate was added after the study `scratch` had found that rate better for it:
the better of its two rates is compared, and without both there is no verdict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dynamask_lab.language.engine import language_cost, language_kind, run_language
from dynamask_lab.studies.scratch.study import SHAPES, added, config
from dynamask_lab.sweeps.registry import Config, Experiment, register
from dynamask_lab.sweeps.results import Record

LENGTH = 16_384
TOKENS = 6.0
"""Per parameter, of dense attention; of the sparse forms also twice as many."""
CHOSEN, SLIDING = "learned, slopes, one wide layer", "sliding + sinks, one wide layer"
LEVEL = "learned, one wide layer"
HALF = "dense, half rate"
EQUAL, MORE = "equal tokens", "twice the tokens"
_RATE = 2.1e-3
SLICES = {"no last use": (0, 0), "1 to 255": (1, 255), "256 to 8191": (256, 8191), "8192 and more": (8192, 1 << 30)}
"""Distances to the last use; the far ones lie beyond the narrow windows, and beyond every window."""


def forms() -> dict[str, Config]:
    """Name of a form -> its settings, in the order of their worth."""
    sparse = {name.rpartition(", ")[0]: form for name, form in added(LENGTH).items()}
    made: dict[str, Config] = {"dense": {"attention": "mha", "tokens_per_parameter": TOKENS}}
    for when, factor in ((MORE, 2.0), (EQUAL, 1.0)):
        for name in (CHOSEN, SLIDING):
            made[f"{name}, {when}"] = {**sparse[name], "tokens_per_parameter": factor * TOKENS}
    for when, factor in ((EQUAL, 1.0), (MORE, 2.0)):
        made[f"{LEVEL}, {when}"] = {**sparse[LEVEL], "tokens_per_parameter": factor * TOKENS}
    return made


def reading_name(settings: Config) -> str:
    """The name of a run's form."""
    if settings["attention"] == "mha":
        return HALF if settings["learning_rate"] < _RATE else "dense"
    when = MORE if settings["tokens_per_parameter"] > TOKENS else EQUAL
    ranked = CHOSEN if settings.get("slopes") else LEVEL
    return f"{ranked if settings['attention'] == 'dma' else SLIDING}, {when}"


def _runs(shape: str, rate: float, seeds: Sequence[int]) -> list[Config]:
    return [
        config(form, SHAPES[shape], seed, rate, LENGTH, corpus="long", by_last_use=True)
        for form in forms().values()
        for seed in seeds
    ]


def _probe() -> list[Config]:
    """4M parameters, three seeds; minutes of a large GPU. Dense attention at half the rate comes last."""
    dense = {"attention": "mha", "tokens_per_parameter": TOKENS}
    half = [config(dense, SHAPES["4M"], seed, _RATE / 2, LENGTH, corpus="long", by_last_use=True) for seed in (0, 1, 2)]
    return [*_runs("4M", _RATE, (0, 1, 2)), *half]


def _equal() -> list[Config]:
    """The same runs, those of equal tokens first: all that compare on one build of the corpus."""
    return sorted(_probe(), key=lambda config: config["tokens_per_parameter"] > TOKENS)


def sliced(record: Record) -> dict[str, tuple[float, int]]:
    """Slice -> mean test loss, and how many tokens."""
    found = {}
    for name, (first, last) in SLICES.items():
        inside = [bucket for bucket in record.result["last_use"] if first <= bucket["from"] <= last]
        count = sum(bucket["tokens"] for bucket in inside)
        if count:
            found[name] = (sum(bucket["loss"] * bucket["tokens"] for bucket in inside) / count, count)
    return found


def reading_summary(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row per form: tokens, test loss, and the loss of each slice, mean over seeds."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[reading_name(record.config)].append(record)
    rows = []
    for name in (name for name in (*forms(), HALF) if name in groups):
        runs = groups[name]
        tokens = runs[0].config["tokens_per_parameter"] * runs[0].result["parameters"]["non_embedding"]
        row = {"form": name, "runs": str(len(runs)), "training tokens": f"{tokens / 1e6:.0f}M"}
        row["operations"] = f"{np.mean([run.result['flops'] for run in runs]):.1e}"
        row["test loss"] = f"{np.mean([run.result['test'] for run in runs]):.4f}"
        for part in SLICES:
            losses = [sliced(run)[part][0] for run in runs if part in sliced(run)]
            row[part] = f"{np.mean(losses):.3f}" if losses else ""
        rows.append(row)
    return rows


READING = Experiment(
    name="reading",
    description="documents of 16 thousand tokens and more: loss by how far back a last use lies, dense against sparse",
    run=run_language,
    sizes={"4M-equal": _equal, "4M": _probe},
    cost=language_cost,
    kind=language_kind,
    summary=reading_summary,
    interruptible=True,
    trains_language_models=True,
)
register(READING)
