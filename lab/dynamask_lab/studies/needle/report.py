"""The needle experiment in the report: heat maps, exact match by length, dynamic mask against dense attention."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dynamask.evaluation.retrieval import RetrievalScore
from dynamask_lab.studies.judged import NEEDLE, NEEDLE_FAR, Judged, found_windows, layer_windows, pairs_of, window_share
from dynamask_lab.studies.needle.data import same_mixture
from dynamask_lab.studies.needle.levers import LEVERS
from dynamask_lab.studies.needle.study import FROM_WIDE, NeedleConfig, mean_scores, needle_summary
from dynamask_lab.sweeps.registry import reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Row, Section
from dynamask_lab.sweeps.verdicts import (
    NOT_TESTED,
    SHARE_INTEREST,
    Interval,
    all_of,
    judge,
    judge_no_worse,
    mean_interval,
)

_UPCYCLED = "upcycled"
"""In the names of models made of a dense one (`needle_name`)."""
_LEARNT = 0.1
"""Exact match below which neither of two models has learnt to retrieve, and nothing is to be compared."""


@reports("needle")
def report_needle(records: Sequence[Record], folder: Path) -> Section:
    """See `Experiment.report`."""
    from dynamask.inspect.retrieval import draw_scores
    from dynamask_lab.report.pictures import draw_small

    scores = mean_scores(records)
    keys = [record.key for record in records]
    contexts = sorted({NeedleConfig.of(record.config).context for record in records})
    depths = {score.depth for score in scores}
    losses: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for model, loss in record.result["loss"].items():
            losses[model].append(loss)
    runs = {model: record for record in records for model in record.result["loss"] if _UPCYCLED not in model}
    training: list[Row] = [
        {"model": model, "runs": str(len(own)), "validation loss": f"{np.mean(own):.4f}"}
        | ({"pairs": pairs_of([runs[model]])} if model in runs else {})
        for model, own in losses.items()
    ]
    trained = ", ".join(map(str, contexts))
    trained_on = contexts[0] if len(contexts) == 1 else None
    exhibits = [
        Exhibit(
            "depth-length",
            "Exact match by depth and length",
            keys,
            f"Per cent of the answers decoded in full; trained at {trained} tokens, examples at most half of it. At "
            "depth 1 the needle is next to the question, where any window has it: verdicts leave it out, and of "
            f"{len(depths)} depths it is {1 / len(depths):.0%} of the answers.",
            needle_summary(records),
            draw_small(lambda file: draw_scores(scores, file, trained_on=trained_on), folder / "needle.png"),
            "heat maps of exact match, depth against length, one row per task and one column per model",
        ),
        Exhibit("training", "Loss on the mixture", keys, _loss_means(records), training),
    ]
    trained_at = {
        model: NeedleConfig.of(record.config).context for record in records for model in record.result["loss"]
    }
    edges = {model: window_of(record, model) for record in records for model in record.result["loss"]}
    exhibits.insert(
        1,
        Exhibit(
            "window", "Inside the window and beyond it", keys, _WINDOW_MEANS, _by_window(scores, edges, trained_at)
        ),
    )
    findings = []
    for form in (*NEEDLE, *NEEDLE_FAR):
        if form.name in losses:
            record = next(record for record in records if form.name in record.result["loss"])
            setting = {
                "w/N": window_share(found_windows(record)),
                "size": f"{record.result['parameters'] / 1e6:.1f}M" if "parameters" in record.result else "",
                "seeds": str(len({each.seed for each in records if form.name in each.result["loss"]})),
                "pairs": pairs_of([record]),
            }
            context = NeedleConfig.of(record.config).context
            setting["task"] = f"{context} tokens"
            seeds = _by_seed(records)
            findings += _against_dense(form, scores, keys, context, edges[form.name], setting, seeds)
            if form.role == "best":
                rival = without_choice(form.name)
                if rival in losses:  # as many keys without a choice, up to the trained length
                    parts = _parts(scores, context, edges[form.name])
                    parts = {where: parts[where] for where in ("inside the window", "beyond the window")}
                    findings += _against("retrieval", form, rival, parts, keys, setting, seeds)
    findings += _levers(records, scores, edges)
    findings += _levers_against_dense(records, scores)
    costs = _lever_losses(records)
    if costs:
        exhibits.append(Exhibit("lever-losses", "What a lever costs in loss", keys, _LEVER_LOSSES, costs))
    return Section("", exhibits, findings)


def _loss_means(records: Sequence[Record]) -> str:
    """What to know of the losses: which forms had something else held out."""
    other = {name for record in records if _held_out_otherwise(record) for name in record.result["loss"]}
    if not other:
        return ""
    return (
        f"Of what is held out of the mixture. Another twentieth of it is held out for {', '.join(sorted(other))}: "
        "these losses do not compare with the others."
    )


def _held_out_otherwise(record: Record) -> bool:
    content = record.corpus[1]
    return same_mixture(content) != content[:16]


_WINDOW_MEANS = (
    "Exact match up to the trained length, where the distance from needle to question is at most the keys of the "
    "model's widest layer, and where it is more; beside it dense attention (mha) on the same cells. Needles next to "
    "the question are left out. The mean window stands for the widest where a run with windows per head did not write "
    "them down."
)


def window_of(record: Record, model: str) -> int:
    """Keys that the widest layer of a model of the run sees; the whole length for dense attention."""
    if _UPCYCLED in model:
        return int(record.config["upcycle_window"])
    return max(layer_windows(found_windows(record))) if not model.startswith("mha") else 1 << 30


def distance(score: RetrievalScore) -> float:
    """Tokens from the needle to the question."""
    return score.length * (1 - score.depth)


def _by_window(scores: Sequence[RetrievalScore], edges: dict[str, int], trained_at: dict[str, int]) -> list[Row]:
    rows: list[Row] = []
    for model, edge in edges.items():
        if model.startswith("mha"):
            continue
        row = {"model": model, "widest window": str(edge)}
        for title, cells in _parts(scores, trained_at[model], edge).items():
            pair = _exact(model, "mha", cells)
            if pair is not None:
                row |= {title: f"{pair[0]:.0%}", f"mha {title}": f"{pair[1]:.0%}", f"cells {title}": str(pair[3])}
        rows.append(row)
    return rows


def _parts(scores: Sequence[RetrievalScore], context: int, edge: int) -> dict[str, list[RetrievalScore]]:
    """Cells up to the trained length by where the needle lies, and those beyond that length."""
    far = _far(scores)
    trained = [score for score in far if score.length <= context]
    return {
        "inside the window": [score for score in trained if distance(score) <= edge],
        "beyond the window": [score for score in trained if distance(score) > edge],
        "beyond the trained length": [score for score in far if score.length > context],
    }


def _far(scores: Sequence[RetrievalScore]) -> list[RetrievalScore]:
    """Those with the needle elsewhere than next to the question, where no choice of keys is needed to find it."""
    return [score for score in scores if score.depth < 1]


_Seeds = dict[str, dict[int, dict[str, dict[tuple[str, int, float], float]]]]
"""Model -> training seed -> digest of the mixture -> task, length and depth -> exact match."""


def _by_seed(records: Sequence[Record]) -> _Seeds:
    found: _Seeds = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for record in records:
        for score in record.result["scores"]:
            cell = (score["task"], score["length"], score["depth"])
            found[score["model"]][record.seed][record.corpus[1]][cell] = score["exact"]
    return found


_Pair = tuple[dict[tuple[str, int, float], float], dict[tuple[str, int, float], float]]


def _pairs(ours: str, rival: str, seeds: _Seeds) -> dict[int, list[_Pair]]:
    """Training seed -> runs of both models on one mixture; where no seed has such, on the same texts; else on any."""
    both = sorted(seeds[ours].keys() & seeds[rival].keys())
    alike: tuple[Callable[[str], str], ...] = (str, same_mixture, lambda build: "")
    for of in alike:
        found = {
            seed: [
                (own, theirs)
                for build, own in seeds[ours][seed].items()
                for other, theirs in seeds[rival][seed].items()
                if of(build) == of(other)
            ]
            for seed in both
        }
        if any(found.values()):
            return {seed: pairs for seed, pairs in found.items() if pairs}
    return {}


def _over_seeds(
    ours: str, rival: str, cells: Sequence[RetrievalScore], seeds: _Seeds
) -> tuple[float, float, Interval] | None:
    """Both models' exact match and their difference, seed by seed, over the cells that both were asked, of the seeds in
    common; None without any, and no interval with one."""
    asked = {(score.task, score.length, score.depth) for score in cells if score.model == ours}
    asked &= {(score.task, score.length, score.depth) for score in cells if score.model == rival}
    means = [
        [float(np.mean([side[cell] for side in own for cell in asked])) for own in zip(*pairs, strict=True)]
        for pairs in _pairs(ours, rival, seeds).values()
        if asked
    ]
    if not means:
        return None
    first, second = (float(np.mean([each[place] for each in means])) for place in (0, 1))
    return first, second, mean_interval([own - theirs for own, theirs in means])


_LEVERS = ("longer examples", FROM_WIDE, *LEVERS)


def _levers(records: Sequence[Record], scores: Sequence[RetrievalScore], edges: dict[str, int]) -> list[Finding]:
    """Every lever against the same form without it: beyond the window to that form's trained length, and beyond it."""
    found, seeds = [], _by_seed(records)
    by_model = _by_model(records)
    for model, base in _lever_forms(by_model):
        context = NeedleConfig.of(by_model[base].config).context
        edge = edges[base] if edges[base] < context else 0
        parts = _parts(scores, context, edge)
        setting = _lever_setting(model, base, by_model, context, seeds)
        keys = [each.key for each in records if {model, base} & each.result["loss"].keys()]
        beyond = {where: parts[where] for where in ("beyond the window", "beyond the trained length")}
        found += _against("lever", Judged("", model), base, beyond, keys, setting, seeds)
    return found


def _by_model(records: Sequence[Record]) -> dict[str, Record]:
    """Model -> the last of its runs."""
    return {model: record for record in records for model in record.result["loss"]}


def _lever_setting(model: str, rival: str, by_model: Mapping[str, Record], context: int, seeds: _Seeds) -> Row:
    """The setting of a form with a lever against a rival, trained at `context` tokens."""
    record = by_model[model]
    return {
        "task": f"{context} tokens",
        "w/N": window_share(found_windows(record)),
        "size": f"{record.result['parameters'] / 1e6:.1f}M",
        "seeds": str(len(_pairs(model, rival, seeds)) or 1),
        "pairs": pairs_of([record]),
    }


def _lever_forms(by_model: Mapping[str, Record]) -> list[tuple[str, str]]:
    """Every form with a lever, and the same form without it, where both ran."""
    parts = [(model, *model.rpartition(", ")[::2]) for model in by_model]
    return [(model, base) for model, base, lever in parts if lever in _LEVERS and base in by_model]


_CONTROLS = ("swa, sinks, windows 16/352, drope", "one dense layer of six, the others newest keys, drope")
"""Forms that tell whether learned ranks make the difference with "drope": what they lack is the choice of keys."""


def _levers_against_dense(records: Sequence[Record], scores: Sequence[RetrievalScore]) -> list[Finding]:
    """Every form of chosen keys with a lever against dense attention without one: no fewer needles to its trained
    length, and more beyond it, as the study named it; the controls that have not run stand beside them."""
    by_model = _by_model(records)
    forms = [(model, base) for model, base in _lever_forms(by_model) if not base.startswith("mha")]
    if not forms or "mha" not in by_model:
        return []
    seeds, losses = _by_seed(records), _losses(records)
    context = NeedleConfig.of(by_model["mha"].config).context
    within, beyond = ([score for score in _far(scores) if (score.length <= context) == to] for to in (True, False))
    interest, best = f"{100 * SHARE_INTEREST:g} points", _best_dense_lever(scores, by_model)
    found = []
    for model, base in forms:
        verdicts: list[str] = []
        measured: list[str] = []
        differences: list[str] = []
        for where, cells, rule in ((f"to {context} tokens", within, judge_no_worse), ("beyond", beyond, judge)):
            compared = _over_seeds(model, "mha", cells, seeds)
            if compared is None:
                continue
            ours, theirs, gain = compared
            learnt = max(ours, theirs) >= _LEARNT
            verdicts.append(rule(gain, SHARE_INTEREST) if learnt else NOT_TESTED)
            beside = f" ({best}: {_mean(best, cells):.1%})" if best else ""
            measured.append(
                f"{where}: {ours:.1%} of the answers exact, mha {theirs:.1%}{beside}: {gain.shown(100, 1)} points"
                + ("" if learnt else ", neither learnt to retrieve")
            )
            shown = f"{gain.shown(100, 1)} points"
            differences.append(f"{where}: {shown}" if differences else f"{shown} {where}")
        if len(verdicts) < 2:
            continue
        cost, own_cost = (_loss_above(model, rival, losses) for rival in ("mha", base))
        shown = "loss not compared: other texts"
        if cost and own_cost:
            shown = f"loss above mha's: {cost.shown()} nats"
            measured.append(f"{shown}, above that of {base}: {own_cost.shown()}")
        else:
            measured.append(shown)
        setting = _lever_setting(model, "mha", by_model, context, seeds)
        keys = [each.key for each in records if {model, base, "mha", best} & each.result["loss"].keys()]
        told = "; ".join([*differences, shown])
        found.append(
            Finding("lever-dense", model, "; ".join(measured), all_of(verdicts), keys, "best", setting, interest, told)
        )
    missing = [name for name in _CONTROLS if name not in by_model]
    if any(model.endswith(", drope") for model, _ in forms):
        found += [
            Finding("lever-dense", name, "not run", NOT_TESTED, [], "control", {"seeds": "0"}, interest, "not run")
            for name in missing
        ]
    return found


def _best_dense_lever(scores: Sequence[RetrievalScore], by_model: Mapping[str, Record]) -> str:
    """The form of dense attention with a lever that finds most; "" where none ran."""
    forms = [model for model, base in _lever_forms(by_model) if base == "mha"]
    return max(forms, key=lambda model: _mean(model, _far(scores)), default="")


def _mean(model: str, cells: Sequence[RetrievalScore]) -> float:
    return float(np.mean([score.exact for score in cells if score.model == model]))


def _losses(records: Sequence[Record]) -> dict[str, dict[tuple[int, str], float]]:
    """Model -> training seed and digest of the mixture -> loss."""
    found: dict[str, dict[tuple[int, str], float]] = defaultdict(dict)
    for record in records:
        for model, loss in record.result["loss"].items():
            found[model][record.seed, record.corpus[1]] = loss
    return found


def _loss_above(ours: str, rival: str, losses: Mapping[str, Mapping[tuple[int, str], float]]) -> Interval | None:
    """How far our loss lies above a rival's on the same mixtures, seed by seed; None where they share none."""
    shared = sorted(losses[ours].keys() & losses[rival].keys())
    return mean_interval([losses[ours][run] - losses[rival][run] for run in shared]) if shared else None


_LEVER_LOSSES = (
    "How far the loss of the mixture lies above that of the same form without the lever, and above dense attention's "
    "without one, in nats per token: each seed, then the mean and its 95% interval. Forms that read other texts than "
    "the one without the lever are left out."
)


def _lever_losses(records: Sequence[Record]) -> list[Row]:
    by_model = _by_model(records)
    losses = _losses(records)
    rows: list[Row] = []
    for model, base in _lever_forms(by_model):
        own = _loss_above(model, base, losses)
        if own is None:
            continue
        shared = sorted(losses[model].keys() & losses[base].keys())
        dense = _loss_above(model, "mha", losses)
        row = {"model": model, "seeds": str(len(shared))}
        row["each seed above the same form"] = ", ".join(
            f"{losses[model][run] - losses[base][run]:+.3f}" for run in shared
        )
        rows.append(row | {"above the same form": own.shown(), "above dense attention": dense.shown() if dense else ""})
    return rows


def _against_dense(
    form: Judged,
    scores: Sequence[RetrievalScore],
    keys: Sequence[str],
    context: int,
    edge: int,
    setting: Row,
    seeds: _Seeds,
) -> list[Finding]:
    """The form against mha: all cells up to the trained length, those beyond the window, those beyond that length."""
    parts = _parts(scores, context, edge)
    parts = {f"to {context} tokens": [*parts["inside the window"], *parts["beyond the window"]]} | parts
    found = []
    for where, cells in parts.items():
        if where == "inside the window" or not any(score.model == form.name for score in cells):
            continue
        subject = f"{form.name}, {where}"
        finding = _finding("needle", subject, form, "mha", cells, keys, setting, seeds)
        found.append(finding or Finding("needle", subject, "mha was not tested", NOT_TESTED, keys, form.role, setting))
    return found


def _against(
    claim: str,
    form: Judged,
    rival: str,
    parts: Mapping[str, Sequence[RetrievalScore]],
    keys: Sequence[str],
    setting: Row,
    seeds: _Seeds,
) -> list[Finding]:
    """The form against a rival in each part of the cells that both were asked."""
    made = [
        _finding(claim, f"{form.name}, {where}", form, rival, cells, keys, setting, seeds)
        for where, cells in parts.items()
    ]
    return [finding for finding in made if finding]


def _finding(
    claim: str,
    subject: str,
    form: Judged,
    rival: str,
    cells: Sequence[RetrievalScore],
    keys: Sequence[str],
    setting: Row,
    seeds: _Seeds,
) -> Finding | None:
    pair = _exact(form.name, rival, cells)
    if pair is None:
        return None
    ours, theirs, noise, count = pair
    gain = Interval(ours - theirs, math.nan, math.nan)
    ours, theirs, of_seeds = _over_seeds(form.name, rival, cells, seeds) or (ours, theirs, gain)
    one_seed = math.isnan(of_seeds.low)
    gain = Interval(ours - theirs, ours - theirs - noise, ours - theirs + noise) if one_seed else of_seeds
    measured = f"{ours:.1%} of the answers exact, {rival} {theirs:.1%}: {gain.shown(100, 1)} points, over {count} cells"
    if one_seed:
        measured += ", the interval over the answers of one training seed"
    verdict, difference = judge(gain, SHARE_INTEREST), f"{gain.shown(100, 1)} points"
    difference += " over answers" if one_seed else ""
    if max(ours, theirs) < _LEARNT:
        measured, verdict = f"{measured}: neither learnt to retrieve", NOT_TESTED
    interest = f"{100 * SHARE_INTEREST:g} points"
    return Finding(claim, subject, measured, verdict, keys, form.role, setting, interest, difference)


def without_choice(model: str) -> str:
    """Sliding windows of the sizes of a model whose ranks learn."""
    sinks = ["sinks"] if "learned" in model.split(", ") else []
    return ", ".join(["swa", *sinks, *(part for part in model.split(", ") if part.startswith(("windows ", "no RoPE")))])


def _exact(model: str, rival: str, scores: Sequence[RetrievalScore]) -> tuple[float, float, float, int] | None:
    """Mean exact match of two models over the cells that both were asked, two standard errors of the difference, and
    how many cells; None where they share none."""
    ours, theirs = (
        {(score.task, score.length, score.depth): score for score in scores if score.model == name}
        for name in (model, rival)
    )
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    means = [float(np.mean([found[cell].exact for cell in both])) for found in (ours, theirs)]
    noise = 2 * sum(_variance(found[cell]) for found in (ours, theirs) for cell in both) ** 0.5 / len(both)
    return means[0], means[1], noise, len(both)


def _variance(score: RetrievalScore) -> float:
    """Of a cell's exact match, a share of its samples."""
    return score.exact * (1 - score.exact) / score.samples
