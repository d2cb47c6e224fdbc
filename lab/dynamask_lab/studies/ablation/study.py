"""What each part of dynamic mask attention is worth: validation loss with one thing changed, everything else the same.

- Gradients: gates that start random and are trained, against the same that pass no gradient through the scores
  ("dma-detached-scores") or are absent from the logits ("dma-unbiased-logits").
- Score: exp against linear.
- Selection: the exact one, of each query's prefix, against the best keys of the whole sequence
  ("dma-LEAKY-whole-sequence", wrong on purpose), each trained model's loss measured under both.
- Window: from 1/64 to 1/4 of the sequence, dma and swa.
- Gates: per key/value head against per query head.
- Start: sparse from the first step against dense for the first part of the same steps, then upcycled, each part with
  a learning rate schedule of its own.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamask.errors import InvalidInputError
from dynamask_lab.language.engine import (
    LanguageConfig,
    evaluate_language,
    kept_run,
    language_cost,
    language_kind,
    run_language,
)
from dynamask_lab.studies.ablation.mixers import ABLATIONS, ablation_mixers
from dynamask_lab.sweeps.registry import Config, Experiment, Progress, register
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.settings import CPU_SHAPE

LEAKY = "dma-LEAKY-whole-sequence"
_DENSE_SHARE = 0.75
_KEPT = ("loss", "diverged", "curve", "tokens_per_second", "peak_memory", "parameters", "gates", "corpus_content")


def language_settings(config: Config) -> LanguageConfig:
    """The training run of an ablation's config: its fields but "dense_share" and "both_selections".

    Raises:
        InvalidInputError: a field that is unknown, or does not fit.
    """
    own = {name: value for name, value in config.items() if name not in ("dense_share", "both_selections")}
    with ablation_mixers():
        return LanguageConfig.of(own)


def run_ablation(config: Config, progress: Progress) -> dict[str, Any]:
    """Train one variant and measure it.

    Args:
        config: fields of `LanguageConfig`; "dense_share": share of the steps that a dense model takes before it gets
            gates, 0 for sparse from the start; "both_selections": measure the trained model under the exact selection
            and under the leaky one.
        progress: see `run_language`.

    Returns:
        What `run_language` found, in part; "exact_loss" and "leaky_loss" with "both_selections"; "seconds".

    Raises:
        InvalidInputError, UsageError: see `run_language`; a dense_share outside 0 to below 1.
    """
    settings = language_settings(config)
    share = config["dense_share"]
    if not 0 <= share < 1:
        raise InvalidInputError(f"dense_share is a part of the steps, from 0 to below 1; got {share}")
    with ablation_mixers():
        if share:
            return _upcycled(settings, share, progress)
        if not config["both_selections"]:
            result = run_language(settings.plain(), progress)
            return {name: result[name] for name in (*_KEPT, "seconds")}
        kept = dataclasses.replace(settings, keep_model=True)
        result, model = kept_run(kept.plain(), progress)
        losses = {
            f"{name}_loss": evaluate_language(dataclasses.replace(kept, attention=mixer).plain(), model)
            for name, mixer in (("exact", "dma"), ("leaky", LEAKY))
        }
        shutil.rmtree(model.parent, ignore_errors=True)
        return {name: result[name] for name in (*_KEPT, "seconds")} | losses


def _upcycled(settings: LanguageConfig, share: float, progress: Progress) -> dict[str, Any]:
    """Dense first, then with gates that start as a sliding window; together as many steps as the others."""
    dense_steps = max(1, round(share * settings.total_steps))
    dense = dataclasses.replace(
        settings, attention="mha", window=None, local=None, recency=None, steps=dense_steps, keep_model=True
    )
    sparse = dataclasses.replace(settings, steps=max(1, settings.total_steps - dense_steps))
    before, model = kept_run(dense.plain(), lambda done, note: progress(share * done, note))
    after = run_language(sparse.plain(), lambda done, note: progress(share + (1 - share) * done, note), model)
    shutil.rmtree(model.parent, ignore_errors=True)
    found = {name: after[name] for name in _KEPT}
    return found | {"dense_loss": before["loss"], "seconds": before["seconds"] + after["seconds"]}


def ablation_name(config: Config) -> str:
    """The variant as tables show it."""
    settings = language_settings(config)
    if settings.attention == "swa":
        return "sliding window"
    parts = [settings.attention]
    if settings.score_form != "exp":
        parts.append("linear score")
    if config["dense_share"]:
        parts.append(f"dense for {config['dense_share']:.0%}, then upcycled")
    if settings.local == 0 and settings.recency == 0:
        parts.append("paper's form")
    return ", ".join(parts)


def ablation_cost(config: Config) -> float:
    """See `language_cost`."""
    with ablation_mixers():
        return language_cost(language_settings(config).plain())


def ablation_kind(config: Config) -> str:
    """See `language_kind`."""
    with ablation_mixers():
        return language_kind(language_settings(config).plain())


def grouped(records: Sequence[Record]) -> dict[tuple[str, int], list[Record]]:
    """(variant, window) -> its runs, one per seed, in order of window and name."""
    groups: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        groups[ablation_name(record.config), record.config["window"]].append(record)
    return dict(sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])))


def mean_loss(runs: Sequence[Record], which: str = "loss") -> float:
    """Over seeds; infinite where a run diverged."""
    return float(np.mean([np.inf if run.result[which] is None else run.result[which] for run in runs]))


def ablation_summary(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row per variant and window."""
    rows = []
    for (name, window), runs in grouped(records).items():
        row = {"variant": name, "window": str(window), "runs": str(len(runs)), "loss": f"{mean_loss(runs):.4f}"}
        if "exact_loss" in runs[0].result:
            row |= {which: f"{mean_loss(runs, f'{which}_loss'):.4f}" for which in ("exact", "leaky")}
        rows.append(row)
    return rows


def _sweep(seeds: Sequence[int], windows: Sequence[int], window: int, **shape: Any) -> list[Config]:
    """Every variant at `window`; dma and swa at every window."""
    default = {"attention": "dma", "local": window // 2, "recency": 1.0 / window}
    paper = {"attention": "dma", "local": 0, "recency": 0.0}
    variants: list[tuple[dict[str, Any], dict[str, Any]]] = [
        *((default, {}), ({**default, "score_form": "linear"}, {})),
        *((paper, {"both_selections": True}), ({**paper, "score_form": "linear"}, {})),
        ({**paper, "attention": LEAKY}, {"both_selections": True}),
        *(({**default, "attention": name}, {}) for name in ABLATIONS if name != LEAKY),
        ({**default, "recency": 0.0}, {"dense_share": _DENSE_SHARE}),
    ]
    for size in windows:
        variants.append(({"attention": "swa", "window": size}, {}))
        if size != window:
            variants.append(({"attention": "dma", "window": size, "local": size // 2, "recency": 1.0 / size}, {}))
    configs = []
    with ablation_mixers():
        for seed in seeds:
            for own, extra in variants:
                settings = LanguageConfig(**{"window": window, **shape, **own, "seed": seed})
                common = {"dense_share": 0.0, "both_selections": False}
                configs.append(settings.plain() | common | extra)
    return configs


def _smoke() -> list[Config]:
    """Every variant once, in seconds on a CPU: shows that it runs, not what it learns."""
    shape = {"layers": 1, "width": 32, "heads": 4, "groups": 2, "feed_forward": 48, "length": 64, "steps": 4}
    return _sweep([0], [4, 8], 8, batch_tokens=128, validation_tokens=256, corpus="bytes", **shape)


def _probe() -> list[Config]:
    """What a CPU says, three minutes a run: 0.2M parameters, 512 tokens, window 32, 300 steps, three seeds."""
    return _sweep([0, 1, 2], [8, 16, 32, 64, 128], 32, corpus="code", learning_rate=4e-3, **CPU_SHAPE)


def _quick() -> list[Config]:
    """What three minutes of a large GPU settle: as "small", 300 steps, one window; layers are not compiled."""
    shape = {"layers": 6, "width": 256, "heads": 4, "groups": 2, "feed_forward": 704, "length": 2048, "steps": 300}
    return _sweep([0], [128], 128, corpus="code", compile=False, warmup=0.05, **shape)


def _leak() -> list[Config]:
    """The paper's form at windows from half the context to a sixteenth, trained exactly and with the leak, three seeds.

    1M parameters, 20 fresh tokens a parameter; both models are measured under both selections. Layers are not compiled.
    At a sixteenth the leak has two seeds more, named after the interval of three had included zero.
    """
    shape: dict[str, Any] = {"layers": 6, "width": 128, "heads": 4, "groups": 2, "feed_forward": 352, "length": 2048}
    shape |= {"batch_tokens": 32_768, "warmup": 0.05, "corpus": "local", "compile": False, "learning_rate": 1.5e-3}
    both = {"dense_share": 0.0, "both_selections": True}
    runs = [(seed, share, name) for seed in range(3) for share in (16, 8, 4, 2) for name in (LEAKY, "dma")]
    with ablation_mixers():
        return [
            LanguageConfig(attention=name, window=2048 // share, local=0, recency=0.0, seed=seed, **shape).plain()
            | both
            for seed, share, name in [*runs, (3, 16, LEAKY), (4, 16, LEAKY)]
        ]


def _leak_part(mixer: str) -> list[Config]:
    """The runs of "leak" that are trained so, the narrowest windows first."""
    runs = [config for config in _leak() if config["attention"] == mixer]
    return sorted(runs, key=lambda config: (config["window"], config["seed"]))


def _leak_smoke() -> list[Config]:
    """Both selections of "leak" for a few steps on bytes, which need no corpus: shows on a GPU that they run."""
    return [{**config, "corpus": "bytes", "steps": 60, "validation_tokens": 65_536} for config in _leak()[:2]]


def _leak_decide() -> list[Config]:
    """Trained with the leak: by how much it lowers their own loss decides the claim."""
    return _leak_part(LEAKY)


def _leak_rest() -> list[Config]:
    """Trained exactly."""
    return _leak_part("dma")


def _small() -> list[Config]:
    """4M parameters, 2048 tokens, window 128, 1000 steps of 64K tokens, one seed."""
    shape = {"layers": 6, "width": 256, "heads": 4, "groups": 2, "feed_forward": 704, "length": 2048, "steps": 1000}
    return _sweep([0], [32, 64, 128, 256, 512], 128, corpus="code+text", **shape)


def _paper() -> list[Config]:
    """20M parameters, 4096 tokens, window 256, 20 tokens a parameter, two seeds."""
    shape = {"layers": 7, "width": 512, "heads": 8, "groups": 4, "feed_forward": 1408, "length": 4096}
    return _sweep([0, 1], [64, 128, 256, 512, 1024], 256, corpus="code+text", batch_tokens=131_072, **shape)


ABLATION = Experiment(
    name="ablation",
    description="loss with one thing changed: gradients, score form, exact selection, window, gates, start",
    run=run_ablation,
    sizes={
        "smoke": _smoke,
        "probe": _probe,
        "quick": _quick,
        "leak-smoke": _leak_smoke,
        "leak-decide": _leak_decide,
        "leak-rest": _leak_rest,
        "leak": _leak,
        "small": _small,
        "paper": _paper,
    },
    cost=ablation_cost,
    kind=ablation_kind,
    summary=ablation_summary,
    interruptible=True,
    trains_language_models=True,
)
register(ABLATION)
