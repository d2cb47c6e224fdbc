"""The table of a converted model: the default conversion by its seeds, its controls and its rivals, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamask_lab.report.conversion import read_conversion, sources
from dynamask_lab.report.conversion_figures import BLOCK, GOAL_LENGTHS
from dynamask_lab.report.conversion_goals import SMOLLM2
from dynamask_lab.report.page_tables import NOT_MEASURED, table_with_note
from dynamask_lab.studies.conversion import close, final, settle
from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.conversion.levers import DENSE, FROZEN, converted
from dynamask_lab.studies.conversion.measure import BENCHMARKS
from dynamask_lab.studies.conversion.report import GROUPS, RESAMPLES, Study, Values, interval
from dynamask_lab.sweeps.section import Row

FORMS: dict[str, tuple[tuple[Spec, ...], ...]] = {
    "learned ranks, distilled (the default)": (tuple(settle.DEFAULT.values()),),
    "learned ranks, model frozen": ((FROZEN, *(converted(steps=0, seed=seed) for seed in (1, 2))),),
    "newest keys, distilled": ((settle.NEWEST,), (close.NEWEST,), (final.NEWEST,)),
    "dense, trained on the same tokens": ((close.ADAPTED,), (final.ADAPTED,)),
}
"""Row -> its runs, newest first, each by seed: a row is of the first run that measured the text loss."""


FAR_IN = "text loss far in"
"""Column: the loss behind most of the context, where the windows drop keys."""


def conversion_summary(results: Path) -> str:
    """Draw a pretrained model, dense and with a bounded cache, beside the best rival at the same cache."""
    lines = [line for line in read_conversion(results) if line["model"] == SMOLLM2]
    study = Study(lines)
    base = study.losses(DENSE.name, "text")
    if not base:
        return NOT_MEASURED
    far, dense_long = _far_in(study, DENSE.name), _scores(study, DENSE.name, (BLOCK,))
    dense_scores, dense_answers = _scores(study, DENSE.name), _answers(study, DENSE.name)
    rows: list[Row] = [
        {
            "form": "dense",
            "keys per head": "all",
            "seeds": "",
            "text loss": _mean(base, "{:.3f}"),
            FAR_IN: _mean(far, "{:.3f}"),
            "needles": _mean(dense_scores, "{:.0%}"),
            "needles 8K": _mean(dense_long, "{:.0%}"),
            "benchmarks": _mean(dense_answers, "{:.1%}"),
        }
    ]
    used = {DENSE.name}
    for title, choices in FORMS.items():
        measured = [[spec for spec in own if study.losses(spec.name, "text")] for own in choices]
        forms = next((found for found in measured if found), [])
        if not forms:
            continue
        if not measured[0] and forms[0].rate is not None:
            title += f" at a rate of {forms[0].rate:g}"
        names = [spec.name for spec in forms]
        used |= {*names}
        rows.append(
            {
                "form": title,
                "keys per head": f"{forms[0].budget:,}" if forms[0].budget else "all",
                "seeds": str(len(forms)),
                "text loss": _above(_over_seeds([study.losses(name, "text") for name in names]), base, len(names)),
                FAR_IN: _above(_over_seeds([_far_in(study, name) for name in names]), far, len(names)),
                "needles": _share(_over_seeds([_scores(study, name) for name in names]), dense_scores, len(names)),
                "needles 8K": _share(
                    _over_seeds([_scores(study, name, (BLOCK,)) for name in names]), dense_long, len(names)
                ),
                "benchmarks": _above(
                    _over_seeds([_answers(study, name) for name in names]), dense_answers, len(names), 100, 1
                ),
            }
        )
    peer = _best_peer(study, dense_scores)
    if peer:
        used.add(peer)
        name, _, budget = peer.rpartition("-")
        rows.append(
            {
                "form": f"kvpress {name}",
                "keys per head": budget,
                "seeds": "",
                "text loss": _above(_over_seeds([study.losses(peer, "text")]), base, 1),
                FAR_IN: _above(_over_seeds([_far_in(study, peer)]), far, 1),
                "needles": _share(_over_seeds([_scores(study, peer)]), dense_scores, 1),
                "needles 8K": _share(_over_seeds([_scores(study, peer, (BLOCK,))]), dense_long, 1),
                "benchmarks": _above(_over_seeds([_answers(study, peer)]), dense_answers, 1, 100, 1),
            }
        )
    context = next((line["settings"]["context"] for line in lines if line["measure"] == "continuation"), 0)
    measures = ("loss", "continuation", "tasks", "benchmark")
    shown = [line for line in lines if line["form"] in used and line["measure"] in measures]
    note = (
        f"{SMOLLM2}. Dense: figures; others: text loss in nats above dense, over all positions of {BLOCK:,} tokens and "
        f"`far in`, behind the first {context:,}; needles (seven tasks after RULER, 1K to 4K tokens, and at the full "
        f"8K) as a share of dense; {len(BENCHMARKS)} benchmarks in points above dense; means over seeds, 95% "
        "intervals over documents, examples and questions. In brackets the seeds where they are fewer. kvpress: the "
        f"best press on needles. Empty: not measured. {sources(shown)}."
    )
    return table_with_note(rows, note)


def _far_in(study: Study, form: str) -> Values:
    """The text losses behind a long context, which most windows do not reach back over."""
    return study.losses(form, "text", "continuation")


def _scores(study: Study, form: str, lengths: Sequence[int] = GOAL_LENGTHS) -> Values:
    """Needle scores of some lengths among essays."""
    return {
        key: value
        for length in lengths
        for key, value in study.scores(form, GROUPS["needles"], length=length).items()
        if key[2] == "essays"
    }


def _answers(study: Study, form: str) -> Values:
    """The answers to all benchmarks; nothing if one of them was not measured."""
    found = [study.answers(form, name, "acc") for name in BENCHMARKS]
    return {key: value for answers in found for key, value in answers.items()} if all(found) else {}


def _over_seeds(found: Sequence[Values]) -> tuple[Values, int]:
    """The mean over seeds of each document or example that all of them saw, and how many seeds have any."""
    own = [values for values in found if values]
    common = set.intersection(*(set(values) for values in own)) if own else set()
    return {key: float(np.mean([values[key] for values in own])) for key in common}, len(own)


def _mean(values: Values, form: str) -> str:
    return form.format(np.mean(list(values.values()))) if values else ""


def _seeds(found: int, expected: int) -> str:
    return f" ({found})" if found != expected else ""


def _above(found: tuple[Values, int], base: Values, expected: int, scale: float = 1, digits: int = 3) -> str:
    """How far the values lie above the base's: mean and interval of the paired differences."""
    values, seeds = found
    common = sorted(key for key in values if key in base)
    if not common:
        return ""
    figures = scale * np.array([values[key] - base[key] for key in common])
    low, high = interval(figures)
    return f"{figures.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{_seeds(seeds, expected)}"


def _share(found: tuple[Values, int], base: Values, expected: int) -> str:
    """The values as a share of the base's: ratio of the sums, with its interval."""
    values, seeds = found
    pairs = np.array([(values[key], base[key]) for key in sorted(values) if key in base])
    if not len(pairs) or not pairs[:, 1].sum():
        return ""
    drawn = pairs[np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))].sum(1)
    low, high = np.percentile(drawn[:, 0] / np.maximum(drawn[:, 1], 1e-9), (2.5, 97.5))
    return f"{pairs[:, 0].sum() / pairs[:, 1].sum():.2f} [{low:.2f}, {high:.2f}]{_seeds(seeds, expected)}"


def _best_peer(study: Study, base: Values) -> str:
    """The press of most needles among those that saw all of dense's examples, at the budget of the forms."""
    peers = {row["form"] for row in study.rows if row["spec"]["kind"] == "peer" and row["spec"]["rope"] == 1}
    scored: Mapping[str, Any] = {
        peer: _scores(study, peer) for peer in sorted(peers) if peer.endswith(f"-{FROZEN.budget}")
    }
    whole = {peer: values for peer, values in scored.items() if values and set(values) >= set(base)}
    return max(whole, key=lambda peer: float(np.mean(list(whole[peer].values()))), default="")
