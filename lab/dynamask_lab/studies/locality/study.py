"""Which form of dynamic mask attention learns at a window of a sixteenth of the context, and against which rivals.

Rivals are a sliding window of as many keys and dense attention, each also with the distance penalty on the logits that
dma's recency slope amounts to. `CONTROL` has the scores, too: what dma is better than it is due to the choice of keys.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dynamask.models import uneven_windows
from dynamask_lab.language.engine import LanguageConfig, language_cost, language_kind, run_language
from dynamask_lab.studies.judged import layer_windows, pairs_of, share_of_pairs
from dynamask_lab.sweeps.registry import Config, Experiment, register
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.settings import CPU_SHAPE, ranked_by

_SHARE = 16
"""Context over window."""

_FOUR_MILLION: dict[str, Any] = {
    **{"layers": 6, "width": 256, "heads": 4, "groups": 2, "feed_forward": 704},
    "length": 2048,
}

Variant = dict[str, Any]


def wide_with_dense(layers: int, window: int, narrow: int | None = None) -> list[int]:
    """`layer_windows` that are wide where `one_dense_in_four` has its dense layers; `narrow`: a quarter by default."""
    return uneven_windows(layers, window, every=4, first=1, narrow=narrow or max(1, window // 4))


PAPER: Variant = {"attention": "dma", "local": 0, "recency": 0.0}
RIVALS: list[Variant] = [
    *({"attention": "swa"}, {"attention": "mha"}),
    *({"attention": "swa", "distance_penalty": 1.0}, {"attention": "mha", "distance_penalty": 1.0}),
    {"attention": "swa", "distance_penalty": 1.0, "recency_spread": 8.0},
    {"attention": "mha", "distance_penalty": 1.0, "recency_spread": 8.0},
]
"""Slopes in units of 1 / window."""

CONTROL: Variant = {"attention": "dma", "gate_init": "delta", "local": "window"}
"""All of the window local: a sliding window whose logits get dma's scores. dma differs from it by its choice alone."""

_SPREAD: Variant = {"attention": "dma", "gate_init": "delta", "recency_spread": 8.0}
GENTLE: Variant = {**_SPREAD, "score_form": "linear", "gate_rate": 0.1}
"""Scores that grow slowly: an exponential one, or Adam's full rate, shakes the logits early on."""
GENTLE_MEANS = (
    "`gentle`: slopes spread over the heads by 8, Delta at zero, the linear score, a tenth of the rate for the gates; "
    "`scored`: the same, with ranks from attention."
)
"""What a table says of `variant_name`."""

CEILING: Variant = {**GENTLE, "window": "all", "local": "window"}
"""The same scores over the whole prefix: what no choice of keys can beat."""

ONE_IN_SIX: Variant = {"layer_windows": "one in six"}
"""See `uneven_windows`: as many keys in all, most of them where a layer is to look far."""
ONE_IN_FOUR: Variant = {"layer_windows": "one in four"}
"""See `wide_with_dense`."""
NARROW_ROPE: Variant = {"rope_layers": "narrow"}
"""No rotary embeddings where `ONE_IN_SIX` looks far; dense attention can leave them out there, too."""
_UNEVEN: dict[str, Callable[..., list[int]]] = {"one in six": uneven_windows, "one in four": wide_with_dense}

_FROM_DENSE: Variant = {"window_schedule": [[0.0, 4.0], [0.25, 2.0], [0.5, 1.0]]}
FORMS: list[Variant] = [
    PAPER,
    *({"attention": "dma", "recency": 0.0}, {"attention": "dma", "local": 0}, {"attention": "dma"}),
    {"attention": "dma", "gate_init": "delta"},
    {"attention": "dma", "gate_init": "delta", "score_form": "linear"},
    {"attention": "dma", "gate_rate": 10.0},
    {"attention": "dma", "recency_spread": 8.0},
    _SPREAD,
    {**_SPREAD, "gate_rate": 5.0},
    {**_SPREAD, "rank_noise": 0.5},
    {**_SPREAD, "local": 0},
    {"attention": "dma", "gate_init": "delta", "rank_recency": 0.1},
    {"attention": "dma", "gate_init": "delta", "rank_recency": 0.01},
    {"attention": "dma", "gate_init": "delta", **_FROM_DENSE},
    {**_SPREAD, **_FROM_DENSE},
]


def variant_name(config: Config, *, any_depth: bool = False) -> str:
    """What distinguishes a run's mechanism, as a table shows it.

    Args:
        config: fields of `LanguageConfig`.
        any_depth: leave out what the number of layers decides: how many are dense, how far a wide one sees.
    """
    settings = LanguageConfig.of(config)
    window = settings.window or 1
    parts = [settings.attention]
    if settings.layer_attention:
        counts = {name: settings.layer_attention.count(name) for name in dict.fromkeys(settings.layer_attention)}
        parts = ["+".join(f"{count} {name}" for name, count in counts.items())]
        mixed = [name for name in counts if name != "mha"]
        if any_depth and settings.layer_attention == one_dense_in_four(mixed[0], settings.layers):
            parts = [mixed[0], "one layer in four dense"]
    if "dma" in settings.mixers:
        local = window // 2 if settings.local is None else settings.local
        recency = 1 / window if settings.recency is None else settings.recency
        if not local and not recency:
            parts.append("paper")
        elif window >= settings.length:
            parts.append("all keys")
        elif local == window:
            parts.append("no choice")
        elif not local or not recency:
            parts.append("local only" if local else "recency only")
        if local not in (0, window // 2, window):
            parts.append(f"local {local}")
    gentle = all(getattr(settings, name) == value for name, value in GENTLE.items() if name != "attention")
    if gentle:
        parts.append("gentle")
    defaults = {entry.name: entry.default for entry in dataclasses.fields(LanguageConfig)}
    for name in ("recency_spread", "gate_init", "score_form", "gate_rate", "rank_noise"):
        value = getattr(settings, name)
        if value != defaults[name] and not (gentle and name in GENTLE):
            parts.append(f"{name.split('_')[-1]} {value:g}" if isinstance(value, float) else f"{name} {value}")
    parts += ranked_by(settings.ranking, settings.rank_power)
    if settings.rank_recency is not None:
        parts.append(f"rank slope {settings.rank_recency * window:.2g}")
    if settings.distance_penalty:
        parts.append("penalty")
    parts += named_windows(settings.layer_windows, window, any_depth=any_depth) + named_rope(settings.rope_layers)
    if settings.window_schedule:
        parts.append("from dense")
    return ", ".join(parts)


def named_windows(windows: Sequence[int] | None, window: int, *, any_depth: bool = False) -> list[str]:
    """What a mechanism's name says of windows that differ: "windows 32/608", and each layer's where the wide layers are
    not in their usual places; of even windows, nothing.

    Args:
        windows: `layer_windows`.
        window: on average.
        any_depth: see `variant_name`; "narrow windows 32" is said of one wide layer in six.
    """
    if not windows:
        return []
    if any_depth and list(windows) == uneven_windows(len(windows), window, narrow=min(windows)):
        return [f"narrow windows {min(windows)}"]
    usual = list(windows) in [of(len(windows), window, narrow=min(windows)) for of in _UNEVEN.values()]
    return ["windows " + "/".join(map(str, sorted(set(windows)) if usual else windows))]


def named_rope(layers: Sequence[bool] | None) -> list[str]:
    """What a mechanism's name says of `rope_layers`: "no RoPE in 1 of 6 layers"; where all rotate, nothing."""
    without = 0 if layers is None else list(layers).count(False)
    return [f"no RoPE in {without} of {len(layers or ())} layers"] if without else []


def locality_summary(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row per corpus and mechanism: validation loss along the run, mean over seeds, at the best learning rate."""
    groups: dict[tuple[str, int, str], dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        config = record.config
        size = LanguageConfig.of(config).parameters
        groups[config["corpus"], size, variant_name(config)][config["learning_rate"]].append(record)
    rows = []
    for (corpus, size, name), by_rate in groups.items():
        rate = min(by_rate, key=lambda each: _mean([run.result["loss"] for run in by_rate[each]]))
        runs = by_rate[rate]
        row = {"corpus": corpus, "parameters": f"{size / 1e6:.1f}M", "mechanism": name}
        row |= {"pairs": pairs_of(runs), "widest layer": _widest(runs[0].config), "runs": str(len(runs))}
        if len(by_rate) > 1:
            row["rate"] = f"{rate:.1e} of {len(by_rate)}"
        steps = [look["step"] for look in runs[0].result["curve"]]
        for place, step in enumerate(steps[:-1]):
            looks = [run.result["curve"] for run in runs]
            row[f"@{step}"] = f"{_mean([look[place]['loss'] for look in looks if len(look) > place]):.4f}"
        final = _mean([run.result["loss"] for run in runs])
        row |= {"final": f"{final:.4f}", "last positions": f"{_mean([_far(run) for run in runs]):.4f}"}
        rows.append((corpus, size, final, row))
    return [row for *_, row in sorted(rows, key=lambda item: item[:3])]


def _widest(config: Config) -> str:
    """Keys of the widest layer's queries, and its share of dense attention's pairs."""
    widest, length = max(layer_windows(config)), config["length"]
    pairs = share_of_pairs({"length": length, "layers": 1, "attention": "swa", "window": widest})
    return f"{widest} of {length} ({pairs:.0%})"


def _far(record: Record) -> float | None:
    return record.result["positions"][-1]["loss"]


def _mean(values: Sequence[float | None]) -> float:
    """Infinite where a run diverged."""
    return float(np.mean([np.inf if value is None else value for value in values]))


def configs(
    variants: Sequence[Variant], corpora: Sequence[str], seeds: Sequence[int], rates: Sequence[float], **shape: Any
) -> list[Config]:
    """Every variant on every corpus, at a window of a sixteenth of the length, defaults written out."""
    length = shape["length"]
    window = max(1, length // _SHARE)
    found = []
    for variant in variants:
        own = dict(variant)
        for slope in ("distance_penalty", "rank_recency"):
            if own.get(slope):
                own[slope] /= window
        if own["attention"] != "mha" or own.get("layer_attention"):
            own["window"] = length if own.get("window") == "all" else window
        if isinstance(own.get("layer_windows"), str):
            own["layer_windows"] = _UNEVEN[own["layer_windows"]](shape["layers"], window)
        if own.get("rope_layers") == "narrow":
            own["rope_layers"] = [each <= window for each in uneven_windows(shape["layers"], window)]
        if own.get("local") == "window":
            own["local"] = own["window"]
        if own["attention"] == "dma":  # the library's defaults may change, a run's meaning may not
            own = {"local": window // 2, "recency": 1.0 / window, **own}
        for corpus in corpora:
            for seed in seeds:
                for rate in rates:
                    settings = LanguageConfig(**{**shape, **own, "corpus": corpus, "seed": seed, "learning_rate": rate})
                    found.append(settings.plain())
    return found


def hybrids(layers: int) -> list[Variant]:
    """Layers of two kinds: swa and dma in turn; one of mha in four, the others dma, or swa for comparison."""
    dma = {"attention": "dma", "gate_init": "delta"}
    alternating = ["swa" if layer % 2 == 0 else "dma" for layer in range(layers)]
    return [
        {**dma, "layer_attention": alternating},
        {**dma, "layer_attention": one_dense_in_four("dma", layers)},
        {"attention": "swa", "layer_attention": one_dense_in_four("swa", layers)},
    ]


def one_dense_in_four(attention: str, layers: int) -> list[str]:
    """`layer_attention`: mha in the second layer and every fourth from there, the others as named."""
    return ["mha" if layer % 4 == 1 else attention for layer in range(layers)]


def _smoke() -> list[Config]:
    """Every form once, in seconds on a CPU: shows that it runs, not what it learns."""
    shape: dict[str, Any] = {
        "layers": 2,
        "width": 32,
        "heads": 4,
        "groups": 2,
        "feed_forward": 64,
        "length": 64,
        "steps": 3,
    }
    shape |= {"batch_tokens": 256, "validation_tokens": 512}
    variants = [*RIVALS, CONTROL, *FORMS, *hybrids(2), {**GENTLE, "ranking": "attention", **ONE_IN_FOUR}]
    variants.append({"attention": "swa", **NARROW_ROPE, **ONE_IN_SIX})
    return configs(variants, ["bytes"], [0], [3e-3], **shape)


def _probe() -> list[Config]:
    """What a CPU ranks, three minutes a run: 0.2M parameters, 512 tokens, window 32, two seeds."""
    linear: Variant = {**GENTLE, "gate_rate": 1.0}
    gentle = [GENTLE, {**GENTLE, "score_form": "exp"}, {**GENTLE, "gate_rate": 0.3}, linear]
    controls = [{**form, "local": "window"} for form in (*gentle, _SPREAD)]
    apart = [{**GENTLE, "gate_rate": rate, "ranking": "attention"} for rate in (0.1, 0.3, 1.0)]
    forms = [*FORMS, *gentle, *controls, CEILING, *apart]
    return configs([*RIVALS, CONTROL, *forms, *hybrids(2)], ["code", "text"], [0, 1], [4e-3], **CPU_SHAPE)


def _quick() -> list[Config]:
    """What five minutes of a large GPU settle: 4M parameters, 2048 tokens, window 128, 300 steps of 64K tokens of code.

    Layers are not compiled: that takes longer than it saves in so short a run.
    """
    linear: Variant = {**_SPREAD, "score_form": "linear"}
    apart: Variant = {**GENTLE, "ranking": "attention"}
    shape = {**_FOUR_MILLION, "steps": 300, "compile": False, "warmup": 0.05}
    forms = [PAPER, {"attention": "dma"}, _SPREAD, *({**linear, "gate_rate": rate} for rate in (1.0, 0.3, 0.1, 0.03))]
    forms += [{**_SPREAD, "gate_rate": 0.1}, apart, {**apart, "local": 32}]
    controls = [CEILING, CONTROL, *({**form, "local": "window"} for form in (_SPREAD, GENTLE))]
    mixed = [{**GENTLE, "layer_attention": one_dense_in_four("dma", 6)}, hybrids(6)[2]]
    return configs([*RIVALS, *controls, *forms, *mixed], ["code"], [0], [3e-3], **shape)


def _chinchilla() -> list[Config]:
    """What the goal asks, at 4M parameters: 2048 tokens, window 128, 20 tokens a parameter, two corpora, two seeds.

    The forms that shorter sweeps left standing, the paper's, their rivals and hybrids; all of one seed come first.
    """
    forms = [PAPER, {"attention": "dma"}, GENTLE, {**GENTLE, "ranking": "attention"}]
    forms += [{**GENTLE, "local": "window"}, CEILING]
    dense = one_dense_in_four("dma", 6)
    forms += [{"attention": "dma", "ranking": "attention"}, {"attention": "dma", "ranking": "attention", **_FROM_DENSE}]
    forms += [{"attention": "dma", "layer_attention": dense}, {**GENTLE, "local": "window", "layer_attention": dense}]
    forms += [{**GENTLE, "ranking": "attention", "layer_attention": dense}]
    uneven = [{**GENTLE, "ranking": "attention"}, {**GENTLE, "local": "window"}, RIVALS[0]]
    forms += [{**form, **windows} for form in uneven for windows in (ONE_IN_SIX, ONE_IN_FOUR)]
    forms += [{**form, **NARROW_ROPE, **ONE_IN_SIX} for form in (uneven[0], RIVALS[0])]
    variants = [*forms, *RIVALS[:2], *RIVALS[4:], hybrids(6)[2], {"attention": "mha", **NARROW_ROPE}]
    return [run for seed in (0, 1) for run in configs(variants, ["code", "text"], [seed], [3e-3], **_FOUR_MILLION)]


def _small() -> list[Config]:
    """4M parameters, 2048 tokens, window 128, 1000 steps of 64K tokens, one seed."""
    return configs([*RIVALS, CONTROL, *FORMS, *hybrids(6)], ["code", "text"], [0], [3e-3], **_FOUR_MILLION, steps=1000)


def _paper() -> list[Config]:
    """20M parameters, 4096 tokens, window 256, 20 tokens a parameter, two seeds, two rates."""
    shape: dict[str, Any] = {"layers": 7, "width": 512, "heads": 8, "groups": 4, "feed_forward": 1408, "length": 4096}
    shape |= {"batch_tokens": 262_144}
    return configs([*RIVALS, CONTROL, *FORMS, *hybrids(7)], ["code", "text"], [0, 1], [1.5e-3, 3e-3], **shape)


LOCALITY = Experiment(
    name="locality",
    description="validation loss of dma's forms and rivals at a window of a sixteenth of the context",
    run=run_language,
    sizes={
        "smoke": _smoke,
        "probe": _probe,
        "quick": _quick,
        "chinchilla": _chinchilla,
        "small": _small,
        "paper": _paper,
    },
    cost=language_cost,
    kind=language_kind,
    summary=locality_summary,
    interruptible=True,
    trains_language_models=True,
)
register(LOCALITY)
