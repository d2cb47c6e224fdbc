"""The study `scratch` in the report: test losses by form, and the claim about perplexity at every window share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamask_lab.language.engine import LanguageConfig
from dynamask_lab.studies.judged import pairs_of, widest_of, window_share
from dynamask_lab.studies.scratch.study import SHAPES, SHARE, scratch_name, scratch_summary
from dynamask_lab.sweeps.registry import Lender, reports
from dynamask_lab.sweeps.results import Record
from dynamask_lab.sweeps.section import Exhibit, Finding, Section
from dynamask_lab.sweeps.verdicts import (
    FEW_SEEDS_INTEREST,
    LOSS_INTEREST,
    NOT_TESTED,
    REFUTED,
    Interval,
    all_of,
    borrowed_interval,
    borrowed_note,
    judge,
    judge_no_worse,
    paired_difference,
)

GOAL_INTEREST = 0.01
"""How far above dense attention's loss the goal allows the best form's to lie, in nats per token."""
_ROLES = {
    "paper": "plain",
    "learned, head windows": "best",
    "newest, head windows": "control",
    "learned, slopes, one wide layer": "best",
    "learned, steep slopes, one wide layer": "best",
    "scored, one wide layer": "best",
    "scored, no choice, one wide layer": "control",
    "random, slopes, one wide layer": "control",
    "learned, slopes, late head windows": "",
    "sliding + sinks, one wide layer": "control",
    "learned, even": "",
    "learned, slopes, even": "",
    "sliding + sinks": "",
    "sliding + sinks, wide start": "",
}
_ONE_WIDE = ("sliding + sinks", "sliding + sinks, one wide layer", "paper")
_CHOICES = {
    "learned, slopes, one wide layer": _ONE_WIDE,
    "learned, steep slopes, one wide layer": _ONE_WIDE,
    "scored, one wide layer": _ONE_WIDE,
    "random, slopes, one wide layer": _ONE_WIDE,
    "scored, no choice, one wide layer": _ONE_WIDE,
    "sliding + sinks": (),
}
_RIVALS = ("sliding + sinks", "newest, head windows", "paper")
"""Of the same window, where `_CHOICES` names none."""
_NAMED = {
    "10M": ("sliding + sinks", "sliding + sinks, one wide layer"),
    "20M-wide": ("sliding + sinks, one wide layer",),
    "45M": ("sliding + sinks, one wide layer",),
    "60M": ("sliding + sinks, one wide layer",),
}
"""Shape -> the rivals of as many pairs that the study names before its runs, below all of which a form is to lie."""
_WHOLE_RATE = "dense"
"""Dense attention at the rate of study `scaling`. Half of it gives a lower loss, so a lead over it decides nothing."""
_CONTROLS = (
    ("scored, half rate, one wide layer", "scored, no choice, half rate, one wide layer"),
    ("learned, half rate, slopes, one wide layer", "random, half rate, slopes, one wide layer"),
)
"""A form that chooses keys, and the same without its choice: what is judged as the claim about choosing."""


@reports("scratch")
def report_scratch(records: Sequence[Record], folder: Path, lender: Lender | None = None) -> Section:
    """See `dynamask_lab.sweeps.registry.Report`."""
    lent = _Lent.of(lender)
    text = (
        "Nats per token, mean over seeds, every token read once. Verdicts read the test split, on which no form is "
        "chosen; intervals are those of the differences seed by seed. Learning rates are those that each mixer does "
        "best with at 1M parameters; they were not tuned at this size."
    )
    exhibits = [
        Exhibit("loss", "Loss by form", [record.key for record in records], text, scratch_summary(records)),
    ]
    told, keys = _causes(records, lent)
    if told:
        text = (
            "Test loss, nats, of the first form less that of the second, seed by seed; 95% interval. Below zero: the "
            "first form has the lower loss. Each pair differs in what is named alone."
        )
        exhibits.append(Exhibit("causes", "What a difference is due to", keys, text, told))
    slices = [record for record in records if record.result.get("last_use")]
    if slices:
        text = (
            "Test loss, nats per token, by how many tokens back a token last followed the same token as here; `none`: "
            "it did not. Where no form copies yet, the loss rises with the distance in all of them alike."
        )
        exhibits.append(Exhibit("last-use", "Loss by last use", [r.key for r in slices], text, _by_last_use(slices)))
    findings = _findings(records, lent)
    about = ""
    if lender is not None and any(finding.note for finding in findings):
        about = (
            f"One seed has no spread of its own. The interval of a difference is that difference with the standard "
            f"deviation that the same difference has from seed to seed at `{lender.size}`, at its degrees of freedom. "
            "What a second seed would give is not known. The seed counts as one: a difference of losses below "
            f"{FEW_SEEDS_INTEREST} nats decides nothing."
        )
    return Section(about, exhibits, findings)


@dataclass(frozen=True)
class _Lent:
    """Runs whose spread a sweep of one seed borrows, by the name of their form.

    Attributes:
        size: name of their sweep; "" where nothing is lent.
        runs: form -> its runs.
    """

    size: str
    runs: Mapping[str, Sequence[Record]]

    @classmethod
    def of(cls, lender: Lender | None) -> _Lent:
        runs: dict[str, list[Record]] = defaultdict(list)
        for record in lender.records if lender else ():
            runs[scratch_name(record.config)].append(record)
        return cls(lender.size if lender else "", runs)

    def both(self, *pair: Sequence[Record]) -> list[Sequence[Record]]:
        """Give the lender's runs of the same two forms."""
        return [self.runs.get(scratch_name(runs[0].config), ()) for runs in pair]

    def keys(self, gaps: Mapping[str, Interval], name: str) -> list[str]:
        """Name the lender's runs behind the borrowed intervals of a form against these rivals."""
        forms = dict.fromkeys(form for rival, gap in gaps.items() if gap.borrowed for form in (name, rival))
        return [run.key for form in forms for run in self.runs[form]]


def _by_last_use(records: Sequence[Record]) -> list[dict[str, str]]:
    """One row per form: loss by the distance to the last use, in buckets of four times the distance."""
    sums: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for record in records:
        for bucket in record.result["last_use"]:
            start = bucket["from"] and 4 ** int(math.log(bucket["from"], 4) + 1e-9)
            entry = sums[scratch_name(record.config)][start]
            entry[0] += bucket["loss"] * bucket["tokens"]
            entry[1] += bucket["tokens"]
    return [
        {"form": name}
        | {
            (f"{start} to {4 * start - 1}" if start else "none"): f"{total / count:.3f}"
            for start, (total, count) in sorted(by_start.items())
        }
        for name, by_start in sums.items()
    ]


_SCORED_HALF = "scored, half rate, one wide layer"
_LEARNED_HALF = "learned, half rate, slopes, one wide layer"
_RANDOM_HALF = "random, half rate, slopes, one wide layer"
_CAUSES = (
    ("the choice, steep slopes", "learned, steep slopes, one wide layer", "sliding + sinks, one wide layer"),
    ("the choice, gentle slopes", "learned, slopes, one wide layer", "sliding + sinks, one wide layer"),
    ("the choice, with scores on the logits", "scored, one wide layer", "scored, no choice, one wide layer"),
    ("learned ranks instead of random ones", "learned, slopes, one wide layer", "random, slopes, one wide layer"),
    ("scores and slopes on the logits", "scored, no choice, one wide layer", "sliding + sinks, one wide layer"),
    ("one wide layer instead of even windows", "sliding + sinks, one wide layer", "sliding + sinks"),
    ("windows per head, set late", "learned, slopes, late head windows", "learned, slopes, even"),
    ("narrow windows, one wide", "sliding + sinks, one wide layer", "dense"),
    ("dense attention's slopes", "dense, slopes", "dense"),
    ("dense attention's rate, halved", "dense, half rate", "dense"),
    ("the paper's bias, at the rate of dense attention", "paper, dense rate, w = N", "dense"),
    ("the paper's bias, both at half the rate", "paper, w = N", "dense, half rate"),
    ("the paper's bias against slopes", "paper, w = N", "dense, slopes"),
    ("the choice, with scores on the logits, half rate", _SCORED_HALF, "scored, no choice, half rate, one wide layer"),
    (
        "scores and slopes on the logits, half rate",
        "scored, no choice, half rate, one wide layer",
        "sliding + sinks, half rate, one wide layer",
    ),
    ("one wide layer, half rate", "sliding + sinks, half rate, one wide layer", "sliding + sinks, half rate"),
    ("narrow windows, one wide, half rate", "sliding + sinks, half rate, one wide layer", "dense, half rate"),
    ("dense attention's slopes, half rate", "dense, slopes, half rate", "dense, half rate"),
    ("pairs, with scores and slopes, half rate", _SCORED_HALF, "dense, slopes, half rate"),
    ("dense attention's rate, a quarter", "dense, quarter rate", "dense, half rate"),
    ("latent attention, half rate", "mla, half rate", "dense, half rate"),
    ("latent attention, a quarter of its rate", "mla, quarter rate", "dense, half rate"),
    ("latent attention, its whole rate", "mla", "dense, half rate"),
    ("native sparse attention, half rate", "nsa, 5 free blocks, half rate", "dense, half rate"),
    ("scores on the logits of dense attention", "dense, slopes and scores, half rate", "dense, slopes, half rate"),
    ("the choice, gentle slopes, half rate", _LEARNED_HALF, "sliding + sinks, half rate, one wide layer"),
    ("random ranks instead of the newest keys", _RANDOM_HALF, "sliding + sinks, half rate, one wide layer"),
    ("learned ranks instead of random ones, half rate", _LEARNED_HALF, _RANDOM_HALF),
    ("learned ranks, one wide layer, half rate", _LEARNED_HALF, "dense, half rate"),
    ("the form with scores, half rate", _SCORED_HALF, "dense, half rate"),
    ("windows and the choice, same slopes and scores, half rate", _SCORED_HALF, "dense, slopes and scores, half rate"),
    (
        "windows per head, set late, half rate",
        "learned, half rate, slopes, late head windows",
        "learned, half rate, slopes, even",
    ),
    *(
        row
        for share in (2, 4, 8)
        for row in (
            (f"the paper's form at N/{share}", f"paper, w = N/{share}", "dense, half rate"),
            (
                f"the paper's form at N/{share}, against as many newest keys",
                f"paper, w = N/{share}",
                f"sliding + sinks, half rate, w = N/{share}",
            ),
            (f"newest keys at N/{share}", f"sliding + sinks, half rate, w = N/{share}", "dense, half rate"),
            (
                f"the choice at N/{share}, gentle slopes",
                f"learned, half rate, slopes, even, w = N/{share}",
                f"sliding + sinks, half rate, w = N/{share}",
            ),
        )
    ),
)
"""What differs alone, and the two forms of study `scratch`, at the window that decides."""


def _at_share(name: str) -> str:
    """With the window that decides, of a form that has one."""
    whole = name.startswith(("dense", "mla", "nsa"))
    return name if whole or ", w = " in name else f"{name}, w = N/{SHARE}"


def _causes(records: Sequence[Record], lent: _Lent) -> tuple[list[dict[str, str]], list[str]]:
    """Differences between two forms that one thing tells apart, and the keys of their runs."""
    found: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for record in records:
        found[LanguageConfig.of(record.config).parameters, scratch_name(record.config)].append(record)
    rows, keys = [], []
    for size in sorted({size for size, _ in found}):
        for cause, *pair in _CAUSES:
            first, second = (_at_share(name) for name in pair)
            ours, theirs = found.get((size, first)), found.get((size, second))
            if not ours or not theirs:
                continue
            gap = _gap(theirs, ours, lent)
            seeds = len({run.seed for run in ours} & {run.seed for run in theirs})
            row = {"parameters": f"{size / 1e6:.1f}M", "what differs": cause, "first": first, "second": second}
            rows.append(row | {"difference": str(gap), "seeds": borrowed_note([gap]) or str(seeds)})
            keys += [run.key for run in (*ours, *theirs)] + lent.keys({second: gap}, first)
    return rows, list(dict.fromkeys(keys))


def _test_loss(record: Record) -> float:
    loss = record.result.get("test")
    return math.inf if loss is None else float(loss)


def _findings(records: Sequence[Record], lent: _Lent) -> list[Finding]:
    """Every form against dense attention of the same size, and against the rivals of its window."""
    sizes: dict[int, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        sizes[LanguageConfig.of(record.config).parameters][scratch_name(record.config)].append(record)
    findings = []
    for size, found in sizes.items():
        for name, runs in sorted(found.items(), key=lambda item: _place(item[0], item[1][0])):
            form, _, at = name.rpartition(", ")
            role = _ROLES.get(form.replace(", half rate", ""))
            if role is None:
                continue
            denses = _denses(found)
            # The paper's form has half the rate of the others at any size.
            slower = ", half rate" in form or (form == "paper" and "dense" not in found)
            choices = _CHOICES.get(form.replace(", half rate", ""), _RIVALS)
            choices = tuple(rival if rival == "paper" else _slower(rival) for rival in choices) if slower else choices
            rivals = [*denses, *(f"{rival}, {at}" for rival in choices if at != "w = N" and rival != form)]
            named = tuple(f"{_slower(rival) if slower else rival}, {at}" for rival in _named(size))
            lacking = [rival for rival in named if rival not in found and rival != name] if role == "best" else []
            rivals = [rival for rival in rivals if rival in found]
            against = {rival: _gap(runs, found[rival], lent) for rival in rivals}
            told, verdicts = [], [NOT_TESTED for _ in lacking]
            for rival, gap in against.items():
                seeds = min(len(runs), len(found[rival]))
                told.append(f"{_called(rival)} {gap}")
                decide = judge_no_worse if role == "best" and rival in denses else judge
                verdict = decide(gap, GOAL_INTEREST if role == "best" else LOSS_INTEREST, seeds=seeds)
                verdicts.append(_decided(rival, verdict))
            setting = {
                "w/N": window_share(widest_of(runs)),
                "size": f"{size / 1e6:.1f}M",
                "seeds": str(len({run.seed for run in runs})),
                "pairs": pairs_of(runs),
            }
            keys = [run.key for each in (name, *rivals) for run in found[each]] + lent.keys(against, name)
            measured = f"test loss, nats below {', '.join(told)}" if told else "no rival ran"
            measured += f"; not compared with {', '.join(lacking)}" if lacking else ""
            verdict = all_of(verdicts) if denses else NOT_TESTED
            subject = f"{name}, {setting['size']}, fresh tokens"
            interest = f"{GOAL_INTEREST if role == 'best' else LOSS_INTEREST} nats"
            setting = setting | {"seeds": _shared_seeds(runs, [found[rival] for rival in rivals])}
            short = f"{min(against.values(), key=lambda gap: gap.mean)} nats" if against else ""
            note = borrowed_note(against.values())
            findings.append(Finding("scratch", subject, measured, verdict, keys, role, setting, interest, short, note))
            setting = setting | {"seeds": _shared_seeds(runs, [found[dense] for dense in denses])}
            if role in ("best", "control") and denses and at != "w = N":
                findings.append(_no_worse_than_dense(subject, name, found, setting, role, lent))
            if role in ("plain", "best", "control"):
                findings.append(_perplexity(subject, name, found, setting, role, lent))
                if denses:
                    gaps = {dense: _gap(runs, found[dense], lent) for dense in denses}
                    verdict = all_of(
                        [
                            _decided(dense, judge(gap, LOSS_INTEREST, seeds=min(len(runs), len(found[dense]))))
                            for dense, gap in gaps.items()
                        ]
                    )
                    keys = [run.key for run in (*runs, *(run for dense in denses for run in found[dense]))]
                    keys += lent.keys(gaps, name)
                    note = borrowed_note(gaps.values())
                    measured = f"test loss, nats below {_listed(gaps)}"
                    interest, short = f"{LOSS_INTEREST} nats", f"{gaps[denses[0]]} nats{_at_rate(denses[0])}"
                    claim = "perplexity-mha"
                    findings.append(
                        Finding(claim, subject, measured, verdict, keys, role, setting, interest, short, note)
                    )
        findings += _choices(found, f"{size / 1e6:.1f}M", lent)
    return findings


def _named(size: int) -> tuple[str, ...]:
    """The rivals named beforehand for models of so many parameters."""
    for shape, rivals in _NAMED.items():
        if LanguageConfig(attention="mha", **SHAPES[shape]).parameters == size:
            return rivals
    return ()


def _decided(rival: str, verdict: str) -> str:
    """What a verdict against a rival is worth: against dense attention at too high a rate only a loss counts."""
    return NOT_TESTED if rival == _WHOLE_RATE and verdict != REFUTED else verdict


def _at_rate(rival: str) -> str:
    """What a difference to a rival must tell of its rate."""
    return ", dense at twice its better rate" if rival == _WHOLE_RATE else ""


def _called(rival: str) -> str:
    return "dense (at twice its better rate)" if rival == _WHOLE_RATE else rival


def _listed(gaps: Mapping[str, Interval]) -> str:
    return ", ".join(f"{_called(rival)} {gap}" for rival, gap in gaps.items())


def _choices(found: Mapping[str, list[Record]], size: str, lent: _Lent) -> list[Finding]:
    """Forms that choose keys against the same forms without their choice."""
    findings = []
    for form, control in _CONTROLS:
        ours, theirs = found.get(_at_share(form)), found.get(_at_share(control))
        if not ours or not theirs:
            continue
        gap = _gap(ours, theirs, lent)
        seeds = _shared_seeds(ours, [theirs])
        setting = {"w/N": window_share(ours[0].config), "size": size, "seeds": seeds, "pairs": pairs_of(ours)}
        keys = [run.key for run in (*ours, *theirs)] + lent.keys({_at_share(control): gap}, _at_share(form))
        measured = f"test loss, nats below {control} {gap}"
        verdict = judge(gap, LOSS_INTEREST, seeds=int(seeds))
        subject, interest = f"{_at_share(form)}, {size}, fresh tokens", f"{LOSS_INTEREST} nats"
        short, note = f"{gap} nats", borrowed_note([gap])
        findings.append(Finding("choice", subject, measured, verdict, keys, "best", setting, interest, short, note))
    return findings


def _no_worse_than_dense(
    subject: str, name: str, found: Mapping[str, list[Record]], setting: dict[str, str], role: str, lent: _Lent
) -> Finding:
    """The first half of the goal: at most `GOAL_INTEREST` nats above dense attention."""
    gaps = {dense: _gap(found[name], found[dense], lent) for dense in _denses(found)}
    verdict = all_of(
        [
            _decided(dense, judge_no_worse(gap, GOAL_INTEREST, seeds=min(len(found[name]), len(found[dense]))))
            for dense, gap in gaps.items()
        ]
    )
    keys = [run.key for each in (name, *gaps) for run in found[each]] + lent.keys(gaps, name)
    measured = f"test loss, nats below {_listed(gaps)}"
    interest, short = f"{GOAL_INTEREST} nats", f"{next(iter(gaps.values()))} nats"
    note = borrowed_note(gaps.values())
    return Finding("scratch-dense", subject, measured, verdict, keys, role, setting, interest, short, note)


def _shared_seeds(runs: Sequence[Record], rivals: Sequence[Sequence[Record]]) -> str:
    """Seeds that a form has in common with its rivals: "3", or "3 to 6" where rivals differ in that; alone, its own."""
    own = {run.seed for run in runs}
    counts = [len(own & {run.seed for run in rival}) for rival in rivals] or [len(own)]
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _denses(found: Mapping[str, Any]) -> list[str]:
    """Dense attention at the rate of study `scaling`, or where that did not run, at the lower rates that did."""
    slower = [name for name in ("dense, half rate", "dense, quarter rate") if name in found]
    return ["dense"] if "dense" in found else slower


def _slower(name: str) -> str:
    """The form at half the rate."""
    first, *rest = name.split(", ")
    return ", ".join([first, "half rate", *rest])


def _gap(ours: Sequence[Record], theirs: Sequence[Record], lent: _Lent) -> Interval:
    """How far our test losses lie below theirs, seed by seed; one seed has the spread of the sweep that lends it."""
    own, other = ({run.seed: _test_loss(run) for run in runs} for runs in (ours, theirs))
    found = paired_difference(own, other)
    if len(own.keys() & other.keys()) != 1:
        return found
    first, second = ({run.seed: _test_loss(run) for run in runs} for runs in lent.both(ours, theirs))
    return borrowed_interval(
        found.mean, [second[seed] - first[seed] for seed in first.keys() & second.keys()], lent.size
    )


def _perplexity(
    subject: str,
    name: str,
    found: Mapping[str, list[Record]],
    setting: dict[str, str],
    role: str,
    lent: _Lent,
) -> Finding:
    """The paper's claim about perplexity: below dense attention, sliding windows, mla and nsa."""
    at = name.rpartition(", ")[2]
    known = [next((rival for rival in found if rival.startswith(kind)), kind) for kind in ("mla", "nsa")]
    rivals = [*(_denses(found) or ["dense"]), f"sliding + sinks, {at}", *known]
    if ", half rate" in name or (name.startswith("paper, w") and "dense" not in found):
        rivals = [_slower(rival) if rival.startswith("sliding") else rival for rival in rivals]
    if at == "w = N":  # a sliding window is dense attention itself
        rivals = [rival for rival in rivals if not rival.startswith("sliding")]
    told, verdicts, keys, difference = [], [], [run.key for run in found[name]], ""
    gaps: dict[str, Interval] = {}
    for rival in rivals:
        if rival in found:
            gap = gaps[rival] = _gap(found[name], found[rival], lent)
            told.append(f"{_called(rival)} {gap}")
            difference = difference or f"{gap} nats{_at_rate(rival)}"
            verdict = judge(gap, LOSS_INTEREST, seeds=min(len(found[name]), len(found[rival])))
            verdicts.append(_decided(rival, verdict))
            keys += [run.key for run in found[rival]]
        else:
            verdicts.append(NOT_TESTED)
    lacking = [rival for rival in rivals if rival not in found]
    measured = f"test loss, nats below {', '.join(told)}" if told else "no rival ran"
    if lacking:
        measured += f"; not compared with {', '.join(lacking)}"
        kinds = dict.fromkeys(
            "even sliding windows" if rival.startswith("sliding") else rival.partition(",")[0] for rival in lacking
        )
        difference += f"; {', '.join(kinds)} not run" if difference else ""
    keys += lent.keys(gaps, name)
    interest, note = f"{LOSS_INTEREST} nats", borrowed_note(gaps.values())
    return Finding("perplexity", subject, measured, all_of(verdicts), keys, role, setting, interest, difference, note)


def _place(name: str, run: Record) -> tuple[int, str]:
    return (int(run.config.get("window") or 0), name)
