"""Models from scratch at windows from the whole context down to a sixteenth of it, on tokens that are read once.

| form | attention |
| --- | --- |
| `dense` | every key |
| `paper, w = N/k` | the paper's form at that window; with k = 1 its mask drops nothing, as mostly in the paper |
| `sliding + sinks, w = N/k` | the newest keys and the first four |
| `sliding + sinks, wide start, w = N/k` | the same, four times as wide for the first fifth of the training |
| `learned, even, w = N/k` | ranks learned from future attention, one window |
| `learned, head windows, w = N/k` | the same, windows per head set after a fifth of the training; wide start |
| `newest, head windows, w = N/k` | newest keys and sinks in the windows that the run before found |
| `sliding + sinks, one wide layer, w = N/k` | as many pairs in all, 64 keys but in the fourth of six layers |
| `learned, one wide layer, w = N/k` | ranks learned in the wide layer of the same windows |
| `learned, slopes, ..., w = N/k` | ranks that rise with the position, so that a key loses as it ages |
| `learned, steep slopes, one wide layer, w = N/k` | the same; ranks rise by 8 to 32 nats over the wide window |
| `learned, slopes, late head windows, w = N/k` | the same, head windows set after three fifths; wide start |
| `random, slopes, one wide layer, w = N/k` | ranks of a random network that never learns, on the same states |
| `scored, one wide layer, w = N/k` | dynamask 0.1's form: slopes and scores on logits, ranks from attention |
| `scored, no choice, one wide layer, w = N/k` | the same logits, newest keys |
| `dense, half rate`, `dense, slopes` | at half the learning rate; with slopes on the logits as `scored` has |
| `paper, dense rate, w = N` | the paper's form at the learning rate of dense attention |
| `mla`, `nsa` | the paper's other rivals |

All runs of a size and seed read the same tokens in the same order; the test split is of documents that no run is chosen
on. Learning rates are those that study `scaling` found best for each mixer at its smallest size, scaled by the width.

What is judged, named before any run: with a window of a sixteenth of the context, which is at most an eighth of dense
attention's pairs, the test loss of `learned, head windows` lies at most 0.01 nats above that of `dense` (its 95%
interval excludes more), and below `sliding + sinks`, `newest, head windows` and `paper` of that window, by intervals
that exclude zero. Runs of one seed read the same tokens in the same order, so intervals are those of the differences
seed by seed. (Named before the runs was the spread that all forms of a size leave after their means. Two forms then had
seeds that learned late, which made every interval as wide as theirs, so each comparison uses its own two forms.)

The forms with slopes and with one wide layer were added after the first results at 4M, in which learned ranks lost to
sliding windows. They are judged by the same rule: they answer what bounds it.

Size `4M-judged`, named before its runs: the judged forms are `learned, slopes, one wide layer` and `scored, one wide
layer`, with 12.1% of dense attention's pairs, and `learned, steep slopes, one wide layer`, named after `4M-added` had
ended, in which the newest keys beat ranks with slopes. They are to lie at most 0.01 nats above `dense`, and below
`sliding + sinks`, `sliding + sinks, one wide layer` and `paper`. The other forms of that size are controls, which tell
what a difference is due to: the learning rate, the slopes, the scores, the windows or the choice.

Size `4M-rates`, named before its runs: in `4M-judged` the one dense run at half the rate that ended was far better than
the three at the rate of study `scaling`, whose steps held more tokens. So the best form of `4M-judged`, `scored, one
wide layer`, is judged at half the rate against `dense` at half of it, by the same rule.

Size `4M-tables`, named before its runs, every form at half its rate: `nsa, 5 free blocks` and `mla` against `dense`;
`paper` at N/8, N/4 and N/2 against `dense` and against `sliding + sinks` of the same window; `random` against
`learned, slopes` and `sliding + sinks` in the same windows; `dense, slopes and scores` against `dense, slopes`. The
smallest difference of interest is 0.02 nats.

Size `10M-tables`, named before its runs, every form at half its rate: `scored, one wide layer` (12.1% of dense
attention's pairs) is the form that is judged. It is to lie at most 0.01 nats above `dense`, and below `sliding + sinks`
and `sliding + sinks, one wide layer`. `learned, slopes, one wide layer` is judged by the same rule. Against `dense,
slopes` the difference says what an eighth of the pairs costs once logits have slopes. Even `sliding + sinks` and `mla`
lose far more at 4M, so they run last or not at all.

Size `20M-tables`, named before its runs, every form at half its rate, 20 fresh tokens a parameter: the judged form is
`scored, one wide layer` (12.1% of dense attention's pairs). It is to lie at most 0.01 nats above `dense`, and below
`sliding + sinks, one wide layer`, the newest keys in the same windows, which is judged against `dense` by the same
rule. The smallest difference of interest is 0.02 nats. Other forms of that size run only where time is left.

Size `60M-tables`, named before its runs, 20 fresh tokens a parameter, 65,536 tokens a step, seed 0 alone: `dense`,
`scored, one wide layer` (12.1% of dense attention's pairs) and `sliding + sinks, one wide layer`, the newest keys in
the same windows, all at half their rate. The judged form is `scored, one wide layer`, by the rule of `20M-tables`. One
seed has no spread, so the interval is that of the size's difference with the standard deviation of the differences seed
by seed at `20M-tables`, at its degrees of freedom: what would be a second seed's is not known, and rows say so.
Where cards cannot share a run, `45M-tables` takes its place, by the same rule: a run of it fits on one card.

Seeds 3 to 5 of `10M-tables`, named before their runs: `scored, one wide layer` and `sliding + sinks, one wide layer`,
whose difference three seeds left undecided. All six seeds are judged together, once.

Controls of `10M-tables` and `4M-tables`, named before their runs: `scored, no choice, one wide layer` has the logits
and the windows of `scored, one wide layer`, and the newest keys. `random` has the windows and the slopes of `learned,
slopes, one wide layer`. The choice is shown where the form that chooses lies below its control by an interval that
excludes zero; it makes no difference where that interval lies within 0.02 nats on both sides. `paper, w = N/16` of
`4M-tables` is judged as that form at the other windows. Where time is left, `scored, no choice, one wide layer` of
`10M-tables` runs with seeds 3 to 5, too; all seeds that ended are judged together.

Size `10M-choice`, named before its runs: `scored, one wide layer` and its control `scored, no choice, one wide layer`
alone, three seeds, 20 fresh tokens a parameter of the corpus of `60M-tables`, by the rule of these controls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynamask_lab.language.engine import LanguageConfig, language_cost, language_kind, run_language
from dynamask_lab.studies.judged import pairs_of, widest_of, window_share
from dynamask_lab.sweeps.registry import Config, Experiment, register
from dynamask_lab.sweeps.results import Record, run_key

SINKS = 4
CALIBRATED_AT = 0.2
WIDE_START = 4.0
SHARE = 16
"""The window of the forms that decide is a so-manieth of the context: 12.1% of dense attention's pairs."""

_COMMON: Config = {"corpus": "local", "warmup": 0.05, "test_share": 0.5}
SHAPES: dict[str, Config] = {
    "1M": {"layers": 6, "width": 128, "heads": 4, "groups": 2, "feed_forward": 352, "batch_tokens": 32_768},
    "4M": {"layers": 6, "width": 256, "heads": 4, "groups": 2, "feed_forward": 704, "batch_tokens": 65_536},
    "10M": {"layers": 6, "width": 384, "heads": 6, "groups": 3, "feed_forward": 1056, "batch_tokens": 65_536},
    "20M": {"layers": 7, "width": 512, "heads": 8, "groups": 4, "feed_forward": 1408, "batch_tokens": 131_072},
    "20M-wide": {"layers": 6, "width": 512, "heads": 8, "groups": 4, "feed_forward": 1664, "batch_tokens": 65_536},
    "21M": {"layers": 6, "width": 576, "heads": 9, "groups": 3, "feed_forward": 1536, "batch_tokens": 65_536},
    "45M": {"layers": 6, "width": 768, "heads": 12, "groups": 6, "feed_forward": 2432, "batch_tokens": 65_536},
    "60M": {"layers": 6, "width": 896, "heads": 14, "groups": 7, "feed_forward": 2816, "batch_tokens": 65_536},
}
"""Non-embedding parameters -> shape; heads of 64, at the smallest of 32."""
_RATES = {
    "1M": 3e-3,
    "4M": 2.1e-3,
    "10M": 1.7e-3,
    "20M": 1.5e-3,
    "20M-wide": 1.5e-3,
    "21M": 1.4e-3,
    "45M": 1.2e-3,
    "60M": 1.1e-3,
}
RATE_FACTORS = {
    **{"paper": 0.5, "mla": 2.0, "nsa": 2.0},
    "paper, dense rate": 1.0,
}
"""Of the rate of the others, by study `scaling`; for mla and nsa the edge of its grid. Controls change it."""
_BASE_RATES = {SHAPES[name]["width"]: rate for name, rate in _RATES.items()}
LATE = 0.6
"""When windows per head are set that wait until the model copies."""


def _at(window: int, length: int) -> str:
    """A window's share; where layers differ, of one window of as many pairs."""
    return "w = N" if window >= length else f"w = N/{length // window}"


def chosen(length: int, share: int) -> dict[str, Config]:
    """Name of a form -> its settings, where the window is a so-manieth of the context, in the order of their worth."""
    window = max(2 * SINKS, length // share)
    at = _at(window, length)
    learned: Config = {"attention": "dma", "ranking": "learned", "window": window, "sinks": SINKS}
    learned["local"] = min(128, window // 4)
    wide_start = {"window_schedule": [[0.0, min(WIDE_START, length / window)], [CALIBRATED_AT, 1.0]]}
    sliding: Config = {"attention": "swa", "window": window, "sinks": SINKS}
    return {
        f"learned, head windows, {at}": {**learned, **wide_start, "calibrate_at": CALIBRATED_AT},
        f"sliding + sinks, {at}": sliding,
        f"paper, {at}": paper(window),
        f"learned, even, {at}": learned,
        f"sliding + sinks, wide start, {at}": {**sliding, **wide_start},
    }


_STEEP = (8, 32)
"""Nats over the wide window, of the first and the last head: nearly the newest keys."""


def added(length: int, share: int = SHARE, groups: int = 2) -> dict[str, Config]:
    """Forms named after the first results: as many pairs as `forms`, spent in one layer, and ranks with slopes.

    The narrow layers slide, and the wide one keeps 60 of its keys by recency. Slopes of its heads: over the window,
    one and eight nats; of more heads, in a geometric sequence between.
    """
    at = _at(length // share, length)
    sliding, learned = (chosen(length, share)[f"{name}, {at}"] for name in ("sliding + sinks", "learned, even"))
    narrow = max(2 * SINKS, length // 64)
    # Five layers see 3.1% of dense attention's pairs, and the wide one 57%: 12.1% in all, as with `share` 16.
    wide = length * 11 // 32
    one: Config = {"layer_windows": [*3 * [narrow], wide, *2 * [narrow]]}
    one["window"] = sum(one["layer_windows"]) // 6
    ranked = {**learned, **one, "local": narrow - SINKS}
    slopes = [round(8192 * nats / wide) / 8192 for nats in np.geomspace(1, 8, groups)]
    steep = [round(8192 * nats / wide) / 8192 for nats in np.geomspace(*_STEEP, groups)]
    even = [round(float(each)) / 8192 for each in np.geomspace(16, 64, groups)]
    return {
        f"learned, slopes, one wide layer, {at}": {**ranked, "slopes": slopes},
        f"sliding + sinks, one wide layer, {at}": {**sliding, **one},
        f"learned, slopes, even, {at}": {**learned, "slopes": even},
        f"learned, one wide layer, {at}": ranked,
        f"learned, steep slopes, one wide layer, {at}": {**ranked, "slopes": steep},
    }


def controls(length: int, share: int = SHARE, groups: int = 2) -> dict[str, Config]:
    """Forms that tell what a difference is due to: learning rate, slopes, scores, windows or the choice of keys."""
    at = _at(length // share, length)
    new = added(length, share, groups)
    ranked, one = new[f"learned, slopes, one wide layer, {at}"], new[f"sliding + sinks, one wide layer, {at}"]
    window = one["window"]
    scored: Config = {"attention": "dma", "window": window, "layer_windows": one["layer_windows"], **_SCORED}
    head_windows = chosen(length, share)[f"learned, head windows, {at}"]
    late = {
        **head_windows,
        "window_schedule": [[0.0, head_windows["window_schedule"][0][1]], [LATE, 1.0]],
        "calibrate_at": LATE,
        "slopes": new[f"learned, slopes, even, {at}"]["slopes"],
    }
    return {
        f"scored, one wide layer, {at}": {**scored, "ranking": "attention"},
        "dense, half rate": {"attention": "mha"},
        f"scored, no choice, one wide layer, {at}": {**scored, "local": window},
        "dense, slopes": {"attention": "mha", "distance_penalty": share / length, "recency_spread": 8.0},
        f"random, slopes, one wide layer, {at}": {**ranked, "random_ranks": True},
        f"learned, slopes, late head windows, {at}": late,
        "paper, dense rate, w = N": paper(length),
    }


_SCORED: Config = {"gate_init": "delta", "recency_spread": 8.0, "score_form": "linear", "gate_rate": 0.1}
"""Form `gentle` of study `locality`."""


def paper(window: int) -> Config:
    """The paper's form."""
    return {"attention": "dma", "local": 0, "recency": 0.0, "window": window}


def forms(length: int, share: int = SHARE) -> dict[str, Config]:
    """Name of a form -> its settings at that context, in the order of their worth."""
    first, *others = chosen(length, share).items()
    return {
        "dense": {"attention": "mha"},
        first[0]: first[1],
        **dict(others[:2]),
        "paper, w = N": paper(length),
        **dict(others[2:]),
        "mla": {"attention": "mla"},
    }


def by_window(length: int) -> dict[str, Config]:
    """Name of a form -> its settings: the plain form, sliding windows and learned ranks from N to N/16, and rivals."""
    made: dict[str, Config] = {"dense": {"attention": "mha"}, "paper, w = N": paper(length)}
    for share in (16, 8, 4, 2):
        made |= {name: form for name, form in chosen(length, share).items() if "even" not in name}
    even = {name: form for name, form in chosen(length, SHARE).items() if "even" in name}
    return made | even | {"mla": {"attention": "mla"}, "nsa": {"attention": "nsa", "window": length // 8}}


def config(form: Config, shape: Mapping[str, Any], seed: int, rate: float, length: int, **more: Any) -> Config:
    """One run, defaults written out."""
    settings = {**_COMMON, **shape, **form, "length": length, "seed": seed, "learning_rate": rate, **more}
    return LanguageConfig(**settings).plain()


def scratch_name(settings: Config) -> str:
    """The name of a run's form."""
    attention = settings["attention"]
    factor = settings["learning_rate"] / _BASE_RATES.get(settings["width"], settings["learning_rate"])
    slower = ", quarter rate" if factor < 0.375 else ", half rate" if factor < 0.75 else ""
    if attention == "mha":
        return f"dense{', slopes' if settings.get('distance_penalty') else ''}{slower}"
    if attention in ("mla", "nsa"):
        blocks = ", 5 free blocks" if attention == "nsa" and settings["window"] > settings["length"] // 8 else ""
        slower = ", quarter rate" if factor < 0.75 else ", half rate" if factor < 1.5 else ""
        return f"{attention}{blocks}{slower}"
    if attention == "dma" and settings.get("gate_init") == "delta" and not settings.get("layer_windows"):
        return f"dense, slopes and scores{slower}"
    uneven = settings.get("layer_windows") and not isinstance(settings["layer_windows"][0], list)
    at = _at(settings["length"] // SHARE if uneven else settings["window"], settings["length"])
    learned, slopes = settings.get("ranking") == "learned", ", slopes" if settings.get("slopes") else ""
    if uneven and slopes and settings["slopes"][0] * max(settings["layer_windows"]) > _STEEP[0] / 2:
        slopes = ", steep slopes"
    if settings.get("layer_windows"):
        if isinstance(settings["layer_windows"][0], list):
            late = (
                ", late" if settings["window_schedule"] and settings["window_schedule"][1][0] > CALIBRATED_AT else ","
            )
            return f"newest{slower}{late} head windows, {at}"
        if attention == "dma" and not learned:
            choice = "" if settings.get("ranking") == "attention" else ", no choice"
            return f"scored{choice}{slower}, one wide layer, {at}"
        ranks = "random" if settings.get("random_ranks") else "learned"
        form = f"{ranks}{slower}{slopes}" if learned else f"sliding + sinks{slower}"
        return f"{form}, one wide layer, {at}"
    if attention == "swa":
        return (
            f"sliding + sinks, wide start, {at}"
            if settings.get("window_schedule")
            else f"sliding + sinks{slower}, {at}"
        )
    if learned and settings.get("calibrate_at"):
        late = ", late" if settings["calibrate_at"] > CALIBRATED_AT else ","
        return f"learned{slower}{slopes}{late} head windows, {at}"
    if learned:
        return f"learned{slower}{slopes}, even, {at}"
    return f"paper, dense rate, {at}" if factor > 0.75 and settings["width"] in _BASE_RATES else f"paper, {at}"


_SMOKE: Config = {"layers": 2, "width": 32, "heads": 2, "groups": 1, "feed_forward": 64, "batch_tokens": 256}


def _smoke() -> list[Config]:
    """Every form once, in seconds on a CPU: shows that it runs, not what it learns."""
    small = {"corpus": "bytes", "steps": 6, "validation_tokens": 256}
    return [config(form, _SMOKE, 0, 3e-3, 64, **small) for form in forms(64).values()]


def _size(shape: str, length: int, seeds: Sequence[int], **more: Any) -> list[Config]:
    return _runs(forms(length), shape, length, seeds, **more)


def _runs(made: Mapping[str, Config], shape: str, length: int, seeds: Sequence[int], **more: Any) -> list[Config]:
    return [
        config(form, SHAPES[shape], seed, _RATES[shape] * _rate_factor(name), length, **more)
        for seed in seeds
        for name, form in made.items()
    ]


def _rate_factor(name: str) -> float:
    """Of a form's name without its window, or of the first part of it."""
    own = name.rpartition(", w =")[0] or name
    slower = 0.5 if "half rate" in own else 0.25 if "quarter rate" in own else 1.0
    return slower * RATE_FACTORS.get(own, RATE_FACTORS.get(own.partition(",")[0], 1.0))


def judged(length: int, groups: int = 2) -> dict[str, Config]:
    """The forms that decide and their controls, first those without which nothing is decided."""
    new, known, control = added(length, SHARE, groups), forms(length), controls(length, SHARE, groups)
    at = _at(length // SHARE, length)
    wide = f"one wide layer, {at}"
    order = (
        *("dense", f"learned, steep slopes, {wide}", f"scored, {wide}", f"sliding + sinks, {wide}"),
        *(f"scored, no choice, {wide}", "dense, half rate", f"learned, slopes, {wide}", f"sliding + sinks, {at}"),
        *("dense, slopes", "paper, w = N", f"random, slopes, {wide}", "paper, dense rate, w = N"),
        *(f"paper, {at}", "mla", f"learned, slopes, late head windows, {at}", f"learned, slopes, even, {at}"),
    )
    every = {**known, **new, **control}
    return {name: every[name] for name in order} | {"nsa": {"attention": "nsa", "window": length // 8}}


def rates(length: int) -> dict[str, Config]:
    """The forms that decide at half the rate, and dense attention at a quarter of it, too."""
    new, control, at = added(length), controls(length), _at(length // SHARE, length)
    scored, wide = control[f"scored, one wide layer, {at}"], new[f"sliding + sinks, one wide layer, {at}"]
    return {
        "dense, half rate": {"attention": "mha"},
        f"scored, half rate, one wide layer, {at}": scored,
        f"sliding + sinks, half rate, one wide layer, {at}": wide,
        "paper, w = N": paper(length),
        "dense, quarter rate": {"attention": "mha"},
        f"scored, no choice, half rate, one wide layer, {at}": control[f"scored, no choice, one wide layer, {at}"],
        "dense, slopes, half rate": control["dense, slopes"],
        f"sliding + sinks, half rate, {at}": chosen(length, SHARE)[f"sliding + sinks, {at}"],
    }


def tables(length: int) -> dict[str, Config]:
    """What `rates` left open, at the rates of `rates`: rivals, the paper's form between N and N/16, and controls."""
    new, control, at = added(length), controls(length), _at(length // SHARE, length)
    wide = f"one wide layer, {at}"

    def at_share(share: int) -> dict[str, Config]:
        at = _at(length // share, length)
        sliding = chosen(length, share)[f"sliding + sinks, {at}"]
        learned = added(length, share)[f"learned, slopes, even, {at}"]
        return {f"sliding + sinks, half rate, {at}": sliding, f"learned, half rate, slopes, even, {at}": learned}

    late = f"late head windows, {at}"
    return {
        "dense, half rate": {"attention": "mha"},
        "mla, half rate": {"attention": "mla"},
        "nsa, 5 free blocks, half rate": {"attention": "nsa", "window": length // 4},
        "paper, w = N/4": paper(length // 4),
        "paper, w = N/2": paper(length // 2),
        "paper, w = N/8": paper(length // 8),
        f"sliding + sinks, half rate, {wide}": new[f"sliding + sinks, {wide}"],
        f"random, half rate, slopes, {wide}": control[f"random, slopes, {wide}"],
        f"learned, half rate, slopes, {wide}": new[f"learned, slopes, {wide}"],
        f"scored, half rate, {wide}": control[f"scored, {wide}"],
        "dense, slopes, half rate": control["dense, slopes"],
        "dense, slopes and scores, half rate": dense_scores(length),
        "paper, w = N": paper(length),
        **at_share(4),
        **at_share(2),
        **at_share(8),
        f"learned, half rate, slopes, {late}": control[f"learned, slopes, {late}"],
        **at_share(SHARE),
        "mla, quarter rate": {"attention": "mla"},
        "mla": {"attention": "mla"},
        f"paper, {at}": paper(length // SHARE),
        f"scored, no choice, half rate, {wide}": control[f"scored, no choice, {wide}"],
    }


def dense_scores(length: int) -> Config:
    """Every key, with slopes as those of `dense, slopes` and scores as those of `scored` on the logits."""
    return {"attention": "dma", "window": length, "local": length, "recency": SHARE / length, **_SCORED}


def larger(length: int, groups: int) -> dict[str, Config]:
    """The forms that decide above 4M, all at half the rate."""
    new, control, at = added(length, SHARE, groups), controls(length, SHARE, groups), _at(length // SHARE, length)
    wide = f"one wide layer, {at}"
    return {
        "dense, half rate": {"attention": "mha"},
        f"scored, half rate, {wide}": control[f"scored, {wide}"],
        f"sliding + sinks, half rate, {wide}": new[f"sliding + sinks, {wide}"],
        "dense, slopes, half rate": control["dense, slopes"],
        f"learned, half rate, slopes, {wide}": new[f"learned, slopes, {wide}"],
        f"scored, no choice, half rate, {wide}": control[f"scored, no choice, {wide}"],
        f"random, half rate, slopes, {wide}": control[f"random, slopes, {wide}"],
        f"sliding + sinks, half rate, {at}": chosen(length, SHARE)[f"sliding + sinks, {at}"],
    }


def shares(length: int) -> dict[str, Config]:
    """The paper's form, sliding windows and learned ranks with slopes from N/2 to N/8; N and N/16 are in `judged`."""
    made: dict[str, Config] = {}
    for share in (8, 4, 2):
        known, at = chosen(length, share), _at(length // share, length)
        made[f"learned, slopes, even, {at}"] = added(length, share)[f"learned, slopes, even, {at}"]
        made |= {name: known[name] for name in (f"sliding + sinks, {at}", f"paper, {at}")}
    return made


def _with_rivals(length: int) -> dict[str, Config]:
    """The added forms and the two they are judged against, the four that decide first."""
    made, known = list(added(length).items()), forms(length)
    rivals = [
        (name, form) for name, form in known.items() if name == "dense" or name.startswith("sliding + sinks, w =")
    ]
    return dict([*made[:2], *rivals, *made[2:]])


def _reading(seeds: Sequence[int]) -> list[Config]:
    """Long documents: the forms that decide, a context of 16,384 tokens, losses by how far back a last use lies."""
    length = 16_384
    made = {name: form for name, form in forms(length).items() if name == "dense" or "N/16" in name}
    made = {name: form for name, form in made.items() if "paper" not in name and "even" not in name}
    return _runs(made, "1M", length, seeds, corpus="long", by_last_use=True)


def _judged(
    shape: str, made: Mapping[str, Config], tokens: float, seeds: Sequence[int] = (0, 1, 2), **more: Any
) -> list[Config]:
    settings: Config = {"tokens_per_parameter": tokens, "batch_tokens": 32_768, **more}
    return _runs(made, shape, 4096, seeds, **settings)


def _one_wide(length: int, groups: int) -> dict[str, Config]:
    """Of `larger` the form that is judged, and the newest keys in its windows with its logits and without."""
    made = larger(length, groups)
    return {name: form for name, form in made.items() if name.startswith(("scored", "sliding")) and "wide" in name}


def _choice() -> list[Config]:
    """The judged form of 10M and the same without its choice."""
    made = {name: form for name, form in _one_wide(4096, 3).items() if name.startswith("scored")}
    return _judged("10M", made, 20.0, corpus="tables-1200M")


def _large(shape: str) -> list[Config]:
    """The three forms that decide at once, one seed."""
    groups = SHAPES[shape]["groups"]
    made = dict([*larger(4096, groups).items()][:3])
    return _judged(shape, made, 20.0, (0,), corpus="tables-1200M", batch_tokens=65_536)


SIZES = {
    "smoke": _smoke,
    # Minutes of one large GPU each, on what `lab/scripts/local_corpus.py` finds on a machine without a registry.
    "tiny": lambda: _size("1M", 2048, (0, 1, 2), tokens_per_parameter=16.0),
    # What minutes of one GPU allow: fewer tokens, with rivals of as many.
    "4M-added": lambda: _runs(_with_rivals(4096), "4M", 4096, (0, 1, 2), tokens_per_parameter=12.0),
    # Half the tokens of a step, so that as many tokens are more steps: what copies forms after some hundred of them.
    "4M-judged": lambda: _judged("4M", judged(4096) | shares(4096), 12.0),
    "4M-rates": lambda: _judged("4M", rates(4096), 10.0),
    # On a corpus of carried tables alone, the same on every machine: runs of several days pair.
    "4M-tables": lambda: _judged("4M", tables(4096), 10.0, corpus="tables"),
    "10M-tables": lambda: [
        *_judged("10M", larger(4096, 3), 20.0, corpus="tables"),
        *_judged("10M", _one_wide(4096, 3), 20.0, (3, 4, 5), corpus="tables"),
    ],
    "20M-tables": lambda: _judged("20M-wide", larger(4096, 4), 20.0, corpus="tables-400M"),
    # A run of 60M is longer than one card's hour: DYNAMASK_PROCESSES shares it between cards.
    "60M-tables": lambda: _large("60M"),
    "45M-tables": lambda: _large("45M"),
    # The choice alone, where the corpus of 60M is there anyway.
    "10M-choice": _choice,
    "10M-judged": lambda: _judged("10M", judged(4096, 3), 7.0),
    "20M-judged": lambda: _judged("21M", judged(4096, 3), 5.0),
    "windows": lambda: _runs(by_window(4096), "1M", 4096, (0, 1, 2)),
    # Documents of 16 to 64 thousand tokens, see `local_corpus.py`.
    "reading": lambda: _reading((0, 1, 2)),
    "4M": lambda: _size("4M", 4096, (0, 1, 2)),
    "10M": lambda: _size("10M", 4096, (0, 1, 2)),
    "paper": lambda: _size("20M", 4096, (0, 1, 2), corpus="code+text"),
}


def follow_up(size: str, finished: Sequence[Record]) -> list[Config]:
    """See `newest_in_head_windows`, for the runs of a sweep."""
    known = {run_key("scratch", each) for each in SIZES[size]()}
    return newest_in_head_windows([record for record in finished if record.key in known])


def newest_in_head_windows(finished: Sequence[Record]) -> list[Config]:
    """The newest keys in the head windows of every finished run that was calibrated, with its wide start."""
    made = []
    for record in finished:
        if record.result.get("head_windows") and record.result.get("diverged") is None:
            own = {**record.config, "attention": "swa", "layer_windows": record.result["head_windows"]}
            for name in ("ranking", "calibrate_at", "local", "slopes"):
                own.pop(name, None)
            own["compile"] = False  # torch 2.11 cannot compile masks of unlike windows
            made.append(LanguageConfig(**own).plain())
    return made


def scratch_summary(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row per size and form: losses on both splits, mean over seeds."""
    groups: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[LanguageConfig.of(record.config).parameters, scratch_name(record.config)].append(record)
    rows = []
    for (size, name), runs in sorted(groups.items()):
        row = {"parameters": f"{size / 1e6:.1f}M", "form": name, "w/N": window_share(widest_of(runs))}
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
    lenders={"60M-tables": "20M-tables", "45M-tables": "20M-tables"},
)
register(SCRATCH)
