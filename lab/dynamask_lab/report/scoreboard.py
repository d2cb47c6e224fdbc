"""The scoreboard: the paper's claims against the plain form, the form named beforehand and its control."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynamask_lab.report.claims import CLAIMS, GOALS
from dynamask_lab.sweeps.section import Finding, Row
from dynamask_lab.sweeps.verdicts import NOT_TESTED

ROLES = {"plain": "plain form", "best": "best form", "control": "control"}
_SETTING = ("w/N", "size", "seeds", "pairs", "task")
_COLUMNS = ("claim", "form", "verdict", "measured [95% interval]", "of interest", *_SETTING, "from")


@dataclass(frozen=True)
class Placed:
    """A finding and where it comes from.

    Attributes:
        finding: what was found.
        part: name of its section.
        link: of its page, relative to the index.
        appendix: whether the page is part of the appendix.
    """

    finding: Finding
    part: str
    link: str
    appendix: bool


def board(found: Sequence[Placed]) -> list[Row]:
    """One row per claim of the paper: the verdict on every role with interval, window over context, size and seeds.

    A part of a claim is shown in the claim's row, where it decides otherwise than the whole. Where the plain form or
    the control is decided on another task than the best form, its finding on that form's task stands beside it. A cell
    shows two verdicts at most; the page of all verdicts has the others.
    """
    rows: list[Row] = []
    for name, claim in CLAIMS.items():
        if name in GOALS or claim.part_of:
            continue
        row = {"claim": claim.text}
        own = _without_note(found, name)
        parts = {part: each.short for part, each in CLAIMS.items() if each.part_of == name}
        for role, title in ROLES.items():
            whole = chosen(own, role)
            whole += _on_task(own, role, whole, chosen(own, "best"))
            # Forms are named where they are chosen, and where nothing else tells two figures apart.
            named = role == "best" or len({_told(each)[-1] for each in whole}) < len(whole)
            shown = [_Verdict(f"**{each.finding.verdict}**", _told(each, named=named)) for each in whole]
            decided = {(*_place(each), each.finding.verdict) for each in whole}
            for part, label in parts.items():
                of_part = chosen(_without_note(found, part), role)
                shown += [
                    _Verdict(f"{label}: **{each.finding.verdict}**", _told(each, named=named))
                    for each in of_part
                    if (*_place(each), each.finding.verdict) not in decided
                ]
            row[title] = _cell(shown)
        if not own:
            row["plain form"] = f"**{NOT_TESTED}**"
        rows.append(row)
    return rows


@dataclass(frozen=True)
class _Verdict:
    """What a cell shows of a finding.

    Attributes:
        verdict: in bold, with the part of the claim that it is about.
        told: the lines below it: form, difference, task, conditions.
    """

    verdict: str
    told: tuple[str, ...]


_BREAK = "<br>"
_MOST = 2
"""Verdicts of a cell, and rows of a goal."""
_EVERY = "[every verdict](verdicts.md)"


def _cell(shown: Sequence[_Verdict]) -> str:
    """Verdicts below each other, each with its lines; two on the same figure stand together above it."""
    distinct = list(dict.fromkeys(shown))
    blocks: dict[tuple[str, ...], list[str]] = {}
    for each in distinct[:_MOST]:
        blocks.setdefault(each.told, []).append(each.verdict)
    told = [_BREAK.join((*verdicts, *lines)) for lines, verdicts in blocks.items()]
    if len(distinct) > _MOST:
        told.append(f"{len(distinct) - _MOST} more: {_EVERY}")
    return (2 * _BREAK).join(told)


def _on_task(found: Sequence[Placed], role: str, whole: Sequence[Placed], best: Sequence[Placed]) -> Sequence[Placed]:
    """The finding of a role on the task of the best form, with the most seeds; none where `whole` is on that task."""
    task = best[0].finding.setting.get("task", "") if best else ""
    if not task or not whole or any(each.finding.setting.get("task") == task for each in whole):
        return []
    told = {each.finding.difference for each in whole}
    alike = [
        each
        for each in found
        if each.finding.role == role and each.finding.setting.get("task") == task and not each.appendix
        if each.finding.difference not in told
    ]
    return sorted(alike, key=lambda each: (_seeds(each), _millions(each)), reverse=True)[:1]


def goals(found: Sequence[Placed]) -> list[Row]:
    """The goals of this library that runs decide: one row per verdict on a form named for it, two at most.

    A finding with a note has a row of its own behind them, and is counted with no others. Of the goals in `_EVERY_FORM`
    every form has a row, whatever it found.
    """
    rows: list[Row] = []
    for name in GOALS:
        if name in _EVERY_FORM:
            rows += _form_rows(found, name)
            continue
        own = _without_note(found, name)
        whole = chosen(own, "best", same_part=False) or chosen(own, "plain", same_part=False)
        told = list(dict.fromkeys((_form(each), _goal_cell(each)) for each in whole))
        for number, (form, verdict) in enumerate(told[:_MOST]):
            rows.append({"goal": "" if number else CLAIMS[name].text, "form": form, "verdict": verdict})
        if len(told) > _MOST:
            rows[-1] = {**rows[-1], "verdict": f"{rows[-1]['verdict']}{2 * _BREAK}{len(told) - _MOST} more: {_EVERY}"}
        noted = [each for each in found if each.finding.claim == name and each.finding.note and not each.appendix]
        rows += [
            {"goal": CLAIMS[name].text, "form": _form(each), "verdict": _goal_cell(each)}
            for each in noted
            if each.finding.role == "best"
        ]
    return rows


_EVERY_FORM = ("lever", "lever-dense")
"""Goals of which every form that chooses keys has a row, and every control: which lever decides is not chosen by what
it found. Dense attention's levers stand on the page of all verdicts."""


def _form_rows(found: Sequence[Placed], name: str) -> list[Row]:
    """One row per form of a goal, with its verdict at every distance."""
    by_form: dict[str, list[Placed]] = {}
    for each in found:
        if each.finding.claim == name and not each.appendix and not each.finding.subject.startswith("mha"):
            by_form.setdefault(_form(each).removesuffix(f", {_slice(each)}"), []).append(each)
    rows: list[Row] = []
    for form, own in by_form.items():
        shown = [_Verdict(f"**{each.finding.verdict}**", _told_apart(each)) for each in own]
        rows.append({"goal": "" if rows else CLAIMS[name].text, "form": form, "verdict": _cell(shown)})
    return rows


def _told_apart(placed: Placed) -> tuple[str, ...]:
    """The lines below a verdict, the figures of one finding below each other, and where they are about."""
    difference = placed.finding.difference
    first, *others = difference.split("; ")
    figures = (f"{first} {_slice(placed)}".rstrip(), *others)
    return tuple(part for line in _told(placed) for part in (figures if line == difference else (line,)))


def _goal_cell(placed: Placed) -> str:
    return _cell([_Verdict(f"**{placed.finding.verdict}**", _told(placed))])


def _without_note(found: Sequence[Placed], claim: str) -> list[Placed]:
    """The findings of a claim that decide rows with others: those without a note."""
    return [each for each in found if each.finding.claim == claim and not each.finding.note]


def told_verdict(finding: Finding) -> str:
    """The verdict in bold, and its note."""
    return f"**{finding.verdict}**" + (f" ({finding.note})" if finding.note else "")


def details(found: Sequence[Placed]) -> list[Row]:
    """One row per claim and finding, with interval, setting and source; goals of this library come last."""
    rows: list[Row] = []
    for name, claim in CLAIMS.items():
        own = [each for each in found if each.finding.claim == name]
        shown = [each for role in (*ROLES, "") for each in chosen(own, role, all_settings=True)]
        for number, each in enumerate(shown):
            finding = each.finding
            rows.append(
                {
                    "claim": claim.short if number == 0 else "",
                    "form": finding.subject + (f" ({ROLES[finding.role]})" if finding.role else ""),
                    "verdict": told_verdict(finding),
                    "measured [95% interval]": finding.measured,
                    "of interest": finding.interest,
                    **{title: finding.setting.get(title, "") for title in _SETTING},
                    "from": f"[{each.part}]({each.link})",
                }
            )
        if not shown:
            rows.append(
                dict.fromkeys(_COLUMNS, "")
                | {"claim": claim.short, "verdict": f"**{NOT_TESTED}**", "from": f"`{claim.command}`"}
            )
    return rows


def chosen(found: Sequence[Placed], role: str, *, all_settings: bool = False, same_part: bool = True) -> list[Placed]:
    """The findings of one claim and role to show.

    Sections outside the appendix come first. Within them the one with the most seeds decides, of those the largest
    models, then the task of the longest texts, and its first finding is the claim as it was made. With `all_settings`,
    every finding of the sections outside the appendix. Without `same_part`, other best forms also by what they find at
    other distances.

    Returns:
        The finding that decides, those of its sweep at other windows, or of other forms named as best that decide
        otherwise in it, those of other sweeps with as many seeds that decide otherwise at the same window and size, and
        those on settings that no run had; empty where there is none.
    """
    own = [each for each in found if each.finding.role == role or (role == "plain" and not each.finding.role)]
    if all_settings:
        own = [each for each in found if each.finding.role == role]
    main = [each for each in own if not each.appendix] or own
    if not main or all_settings:
        return main
    tested = [each for each in main if _seeds(each) > 0 or "seeds" not in each.finding.setting]
    first = max(tested, key=lambda each: (_seeds(each), _millions(each), _tokens(each))) if tested else None
    others: list[Placed] = []
    if first is not None and role == "plain":  # what its sweep found at other windows counts as well
        seen = {first.finding.setting.get("w/N")}
        for each in tested:
            share = each.finding.setting.get("w/N")
            if each.part == first.part and each.finding.role == role and share not in seen:
                seen.add(share)
                others.append(each)
        # Another sweep of as many seeds that decides otherwise at the same window counts, too.
        shown = [first, *others]
        others += [
            each
            for each in tested
            if each.finding.role == role and each.part != first.part and _seeds(each) == _seeds(first)
            if any(_place(each) == _place(own) and each.finding.verdict != own.finding.verdict for own in shown)
        ]
    if first is not None and role == "best":
        others += [
            each
            for each in tested
            if each.part == first.part and _seeds(each) == _seeds(first) and _place(each) == _place(first)
            if each.finding.verdict != first.finding.verdict and (_slice(each) == _slice(first) or not same_part)
        ]
    shares = {each.finding.setting.get("w/N") for each in tested}
    untested = [each for each in main if each not in tested and each.finding.setting.get("w/N") not in shares]
    return ([first] if first else []) + others + untested


def _place(placed: Placed) -> tuple[str, str | None]:
    return placed.finding.setting.get("w/N", "").partition(" (")[0], placed.finding.setting.get("size")


def _slice(placed: Placed) -> str:
    """What part of the measurement a finding is about, behind form and size: "to 1024 tokens"."""
    last = placed.finding.subject.rpartition(", ")[2]
    return last if last.startswith(("to ", "inside ", "beyond ")) else ""


def _seeds(placed: Placed) -> int:
    return int((placed.finding.setting.get("seeds") or "0").partition(" ")[0])  # "3 to 6" counts as 3


def _tokens(placed: Placed) -> int:
    """Of the longest texts of the task: "512 pairs in 8192 tokens"; 0 where the setting names no task."""
    numbers = re.findall(r"(\d+) tokens", placed.finding.setting.get("task", ""))
    return int(numbers[-1]) if numbers else 0


def _millions(placed: Placed) -> float:
    """Parameters, in millions; 0 where the size is a width or a name."""
    size = placed.finding.setting.get("size", "")
    return float(size[:-1]) if size.endswith("M") else 0.0


def _form(placed: Placed) -> str:
    """The form that a finding is about, without what its conditions tell: size, window and length of the texts."""
    size, task = (placed.finding.setting.get(name, "") for name in ("size", "task"))
    form = placed.finding.subject
    form = form.removeprefix(f"{size}, ").partition(f", {size}")[0] if size else form
    return re.sub(r", w = (N/)?\d+$", "", form.removesuffix(f", to {task}"))


def _told(placed: Placed, *, named: bool = False) -> tuple[str, ...]:
    """The lines below a verdict: its note, the form where it is named, the difference, the task, the conditions."""
    setting: Mapping[str, str] = placed.finding.setting
    share, _, widest = setting.get("w/N", "").partition(" (")
    which = "widest head" if widest.startswith("widest head") else "widest layer"
    amount, _, shorter = setting.get("pairs", "").partition(" (")
    seen = f"{amount} of pairs" if "%" in amount and amount != "100%" else ""
    seeds = "" if placed.finding.note else f"{_seeds(placed)} seed{'s' if _seeds(placed) > 1 else ''}"
    conditions = (
        f"w/N {share}" if share and not widest else "",
        f"{seen} ({shorter}" if seen and shorter else seen,
        f"{which} {widest.rpartition(': ')[2].partition(' ')[0]}" if widest else "",
        setting.get("size", ""),
        seeds if _seeds(placed) else "",
    )
    lines = (
        placed.finding.note,
        _form(placed) if named else "",
        placed.finding.difference,
        setting.get("task", ""),
        ", ".join(fact for fact in conditions if fact),
    )
    return tuple(line for line in lines if line)
