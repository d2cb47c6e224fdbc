"""Loss against compute: five mixers with as many parameters each, trained on as many tokens.

The learning rate is swept for every mixer at the smallest size; larger sizes train at the best one times the root of
the ratio of widths. All runs of a size and seed see the same tokens in the same order.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynamask.models import uneven_windows
from dynamask_lab.language.engine import LanguageConfig, language_cost, language_kind, run_language
from dynamask_lab.studies.judged import pairs_of
from dynamask_lab.studies.locality.study import GENTLE, one_dense_in_four, variant_name
from dynamask_lab.sweeps.provenance import shared
from dynamask_lab.sweeps.registry import Config, Experiment, register
from dynamask_lab.sweeps.results import Record, run_key
from dynamask_lab.sweeps.settings import WINDOWLESS

SHAPES: dict[str, dict[str, int]] = {
    "4M": {"layers": 6, "width": 256, "heads": 4, "groups": 2, "feed_forward": 704, "batch_tokens": 65_536},
    "10M": {"layers": 6, "width": 384, "heads": 6, "groups": 3, "feed_forward": 1024, "batch_tokens": 131_072},
    "20M": {"layers": 7, "width": 512, "heads": 8, "groups": 4, "feed_forward": 1408, "batch_tokens": 131_072},
    "40M": {"layers": 9, "width": 640, "heads": 10, "groups": 5, "feed_forward": 1728, "batch_tokens": 262_144},
}
"""Non-embedding parameters -> shape; heads of 64."""

_NARROW: dict[str, dict[str, int]] = {
    "1.1M": {"layers": 6, "width": 128, "heads": 4, "groups": 2, "feed_forward": 352, "batch_tokens": 32_768},
    "2.4M": {"layers": 6, "width": 192, "heads": 6, "groups": 3, "feed_forward": 512, "batch_tokens": 65_536},
    "4.4M": {"layers": 6, "width": 256, "heads": 8, "groups": 4, "feed_forward": 704, "batch_tokens": 65_536},
    "9.7M": {"layers": 6, "width": 384, "heads": 12, "groups": 6, "feed_forward": 1024, "batch_tokens": 131_072},
    "20.6M": {"layers": 7, "width": 512, "heads": 16, "groups": 8, "feed_forward": 1408, "batch_tokens": 131_072},
}
"""Heads of 32, for as many key/value heads, and so masks, to grow with the width as in `SHAPES`."""

_EVEN: list[dict[str, Any]] = [
    *({"attention": "mha"}, {"attention": "swa"}, {"attention": "dma"}),
    {"attention": "dma", "local": 0, "recency": 0.0},
    *({"attention": "mla"}, {"attention": "nsa"}),
    *({"attention": "dma", "mixed": True}, {"attention": "swa", "mixed": True}),
]
_UNEVEN = [{**GENTLE, "ranking": "attention", "uneven": True}, {"attention": "swa", "uneven": True}]
MECHANISMS = [*_EVEN, *_UNEVEN]
"""Settings; "mixed": see `one_dense_in_four`; "uneven": see `uneven_windows`; "narrow": the window over that of its
narrow layers, where it is not the usual one; "rates": tried, where not those of the plan."""

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep over sizes.

    Attributes:
        shapes: smallest first.
        seeds: of each shape.
        rates: swept at the smallest shape with the first seed.
        common: settings of all runs.
        window: of the mixers that choose.
        mechanisms: the mixers.
    """

    shapes: Mapping[str, dict[str, int]]
    seeds: Mapping[str, Sequence[int]]
    rates: Sequence[float]
    common: Mapping[str, Any]
    window: int
    mechanisms: Sequence[dict[str, Any]] = tuple(MECHANISMS)

    def config(self, mechanism: dict[str, Any], shape: str, seed: int, rate: float) -> Config:
        """One run, defaults written out."""
        own = dict(mechanism)
        own.pop("rates", None)
        if own.pop("mixed", False):
            own["layer_attention"] = one_dense_in_four(own["attention"], self.shapes[shape]["layers"])
        if own["attention"] not in WINDOWLESS:
            own["window"] = self.window
        share = own.pop("narrow", None)
        narrow = self.window // share if share else None
        if own.pop("uneven", False):
            own["layer_windows"] = uneven_windows(self.shapes[shape]["layers"], self.window, narrow=narrow)
        if own["attention"] == "dma":
            own = {"local": self.window // 2, "recency": 1.0 / self.window, **own}
        settings = {**self.common, **self.shapes[shape], **own, "seed": seed, "learning_rate": rate}
        return LanguageConfig(**settings).plain()

    def tuning(self) -> list[Config]:
        """The runs that find each mixer's rate."""
        smallest = next(iter(self.shapes))
        seed = self.seeds[smallest][0]
        return [
            self.config(each, smallest, seed, rate)
            for each in self.mechanisms
            for rate in each.get("rates", self.rates)
        ]

    def follow_up(self, finished: Sequence[Record]) -> list[Config]:
        """The runs whose rate is known: those of each mixer of which every rate has been tried."""
        losses = {record.key: record.result["loss"] for record in finished}
        smallest = next(iter(self.shapes))
        first = self.seeds[smallest][0]
        found = []
        for mechanism in self.mechanisms:
            rates = mechanism.get("rates", self.rates)
            tried = {rate: run_key("scaling", self.config(mechanism, smallest, first, rate)) for rate in rates}
            if not all(key in losses for key in tried.values()):
                continue
            best = min(tried, key=lambda rate: np.inf if losses[tried[rate]] is None else losses[tried[rate]])
            for shape, sizes in self.shapes.items():
                rate = best * (self.shapes[smallest]["width"] / sizes["width"]) ** 0.5
                for seed in self.seeds[shape]:
                    if (shape, seed) != (smallest, first):
                        found.append(self.config(mechanism, shape, seed, round(rate, 8)))
        return found


_TINY = {"layers": 2, "heads": 2, "groups": 1, "feed_forward": 64, "batch_tokens": 256}
PLANS: dict[str, Plan] = {
    # Every mixer at two sizes, in seconds on a CPU: shows that it runs, not what it learns.
    "smoke": Plan(
        {"2K": {**_TINY, "width": 16}, "8K": {**_TINY, "width": 32}},
        {"2K": [0], "8K": [0]},
        [3e-3],
        {"corpus": "bytes", "length": 64, "steps": 3, "validation_tokens": 256},
        16,
    ),
    # Small models, but 20 tokens a parameter each: meant for some 15 minutes of one large GPU. The largest models
    # read the corpora one and a half times. With several workers, one compiles while the others train.
    "quick": Plan(
        {name: _NARROW[name] for name in ("1.1M", "2.4M", "4.4M")},
        {"1.1M": [0], "2.4M": [0], "4.4M": [0]},
        (1.5e-3, 3e-3),
        {"corpus": "code+text", "length": 4096, "warmup": 0.05},
        512,
    ),
    # The same to 20M parameters, with more rates and seeds: an hour and a half of one large GPU, several runs at a
    # time. The largest models read the corpora six times. Narrow layers of a quarter of the window came first, and the
    # usual ones have the rate that was best for those.
    "small": Plan(
        _NARROW,
        {name: [0, 1] if name in ("1.1M", "2.4M", "4.4M") else [0] for name in _NARROW},
        (7.5e-4, 1.5e-3, 3e-3, 6e-3),
        {"corpus": "code+text", "length": 4096, "warmup": 0.05},
        512,
        [
            *_EVEN,
            *({**each, "narrow": 4} for each in _UNEVEN),
            *({**each, "rates": (3e-3,)} for each in _UNEVEN),
        ],
    ),
    "paper": Plan(
        SHAPES,
        {"4M": [0, 1], "10M": [0, 1], "20M": [0], "40M": [0]},
        RATES,
        {"corpus": "code+text", "length": 4096},
        512,
    ),
}


def scaling_summary(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row per mechanism: loss at each size at its best rate, and the share of dense attention's pairs."""
    runs: dict[str, dict[int, dict[float, list[Record]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in records:
        size = LanguageConfig.of(record.config).parameters
        runs[variant_name(record.config, any_depth=True)][size][record.config["learning_rate"]].append(record)
    rows = []
    for name, by_size in runs.items():
        row = {"mechanism": name}
        chosen: list[Record] = []
        row["pairs"] = pairs_of([run for by_rate in by_size.values() for group in by_rate.values() for run in group])
        for size, by_rate in sorted(by_size.items()):
            means = {rate: _mean_loss(group) for rate, group in by_rate.items()}
            best = min(means, key=lambda rate: means[rate])
            chosen += [run for run in by_rate[best] if run.result["loss"] is not None]
            label = f"{size / 1e6:.1f}M" if size >= 1e5 else f"{size / 1e3:.0f}K"
            row[label] = f"{means[best]:.4f}"
            row[f"{label} rate"] = f"{best:.1e}"
        speeds = [run.result["tokens_per_second"] for run in chosen if run.result["tokens_per_second"]]
        if speeds and not any(shared(run.device) for run in chosen):
            row["tokens/s, largest"] = f"{speeds[-1]:,.0f}"
        rows.append(row)
    return rows


def _mean_loss(group: Sequence[Record]) -> float:
    return float(np.mean([np.inf if run.result["loss"] is None else run.result["loss"] for run in group]))


SCALING = Experiment(
    name="scaling",
    description="loss against compute for the five mixers, parameter-matched",
    run=run_language,
    sizes={name: plan.tuning for name, plan in PLANS.items()},
    cost=language_cost,
    kind=language_kind,
    summary=scaling_summary,
    interruptible=True,
    trains_language_models=True,
    follow_up=lambda size, finished: PLANS[size].follow_up(finished),
)
register(SCALING)
