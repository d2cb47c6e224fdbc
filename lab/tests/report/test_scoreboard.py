"""The scoreboard: which of many findings decides a cell, and that nothing untested hides."""

from __future__ import annotations

from dataclasses import replace

from dynamask_lab.report.claims import CLAIMS, GOALS
from dynamask_lab.report.scoreboard import Placed, board, chosen, details, goals
from dynamask_lab.sweeps.section import Finding
from dynamask_lab.sweeps.verdicts import NO_DIFFERENCE, NOT_TESTED, REFUTED, REPRODUCED


def _placed(
    verdict: str,
    seeds: int,
    share: str = "1/8",
    *,
    role: str = "plain",
    appendix: bool = False,
    claim: str = "recall",
    size: str = "4.4M",
) -> Placed:
    setting = {"w/N": share, "size": size, "seeds": str(seeds), "pairs": "23%"}
    gain = "+0.100 [+0.050, +0.150] nats"
    finding = Finding(claim, f"form {verdict} {seeds}", "+0.1", verdict, [], role, setting, "0.02 nats", gain)
    return Placed(finding, f"sweep-{seeds}", "mqar.md", appendix)


def test_the_sweep_with_most_seeds_decides_and_the_appendix_comes_last() -> None:
    main, more = _placed(REFUTED, 1), _placed(NO_DIFFERENCE, 3)
    trial = _placed(REPRODUCED, 5, appendix=True)
    assert chosen([main, more, trial], "plain") == [more]
    assert chosen([trial], "plain") == [trial]
    assert chosen([main], "best") == []


def test_a_setting_that_no_run_had_is_named_until_one_has() -> None:
    run, missing = _placed(REFUTED, 3), _placed(NOT_TESTED, 0, "1")
    (row,) = [row for row in board([run, missing]) if row["claim"] == CLAIMS["recall"].text]
    told = "+0.100 [+0.050, +0.150] nats"
    first = f"**refuted**<br>{told}<br>w/N 1/8, 23% of pairs, 4.4M, 3 seeds"
    assert row["plain form"] == f"{first}<br><br>**not tested**<br>{told}<br>w/N 1, 23% of pairs, 4.4M"
    other = _placed(REPRODUCED, 3, "1")
    assert chosen([run, missing, other], "plain") == [run, other]  # of one sweep, so both windows count


def test_every_claim_has_a_row() -> None:
    rows = board([])
    assert len(rows) == 8
    assert {row["claim"] for row in rows} == {c.text for n, c in CLAIMS.items() if n not in GOALS and not c.part_of}
    assert all("not tested" in row["plain form"] for row in rows)
    shown = details([_placed(REFUTED, 3)])
    assert {row["claim"] for row in shown} == {claim.short for claim in CLAIMS.values()}
    (row,) = [row for row in shown if row["claim"] == "recall"]
    assert row["verdict"] == "**refuted**"
    assert row["from"] == "[sweep-3](mqar.md)"
    assert row["of interest"] == "0.02 nats"


def test_a_finding_with_a_note_is_a_row_of_its_own_and_decides_no_other() -> None:
    note = "one seed, interval borrowed from 20M-tables"
    three = _placed(REPRODUCED, 3, role="best", claim="scratch-dense", size="20.1M")
    one = _placed(NOT_TESTED, 1, role="best", claim="scratch-dense", size="59.9M")
    one = replace(one, finding=replace(one.finding, note=note))
    first, second = (row for row in goals([one, three]) if row["goal"] == CLAIMS["scratch-dense"].text)
    assert first == goals([three])[0]
    assert "**reproduced**" in first["verdict"]
    assert note not in first["verdict"]
    assert "**not tested**" in second["verdict"]
    assert note in second["verdict"]
    assert "59.9M" in second["verdict"]
    assert "1 seed" not in second["verdict"]
    alone = goals([one])
    assert [row["verdict"] for row in alone] == [second["verdict"]]
    shown = [row["verdict"] for row in details([one, three]) if row["form"]]
    assert shown == [f"**not tested** ({note})", "**reproduced**"]
    claimed = [replace(each, finding=replace(each.finding, claim="perplexity")) for each in (one, three)]
    assert board(claimed) == board(claimed[1:])


def test_of_as_many_seeds_the_largest_models_decide() -> None:
    small, large = _placed(REFUTED, 3, role="best"), _placed(NO_DIFFERENCE, 3, role="best", size="10.0M")
    one_seed = _placed(REPRODUCED, 1, role="best", size="20.6M")
    assert chosen([small, large, one_seed], "best") == [large]


def test_a_part_of_a_claim_is_told_where_it_decides_otherwise() -> None:
    narrow, wide = _placed(REFUTED, 3, "1/16", claim="perplexity"), _placed(NOT_TESTED, 3, "1", claim="perplexity")
    alone = [_placed(REFUTED, 3, "1/16", claim="perplexity-mha"), _placed(REPRODUCED, 3, "1", claim="perplexity-mha")]
    told = "+0.100 [+0.050, +0.150] nats<br>w/N 1{}, 23% of pairs, 4.4M, 3 seeds"

    def cell(*found: Placed) -> str:
        (row,) = [row for row in board(found) if row["claim"] == CLAIMS["perplexity"].text]
        return row["plain form"]

    # Two verdicts on one figure stand above it, and the figure stands once.
    assert cell(wide, alone[1]) == f"**not tested**<br>MHA alone: **reproduced**<br>{told.format('')}"
    assert cell(narrow, alone[0]) == f"**refuted**<br>{told.format('/16')}"
    # Two verdicts at most; the page of all verdicts has the third.
    first, second, more = cell(narrow, wide, *alone).split("<br><br>")
    assert first == f"**refuted**<br>{told.format('/16')}"
    assert second == f"**not tested**<br>{told.format('')}"
    assert more == "1 more: [every verdict](verdicts.md)"


def test_a_goal_has_a_row_per_form_and_two_at_most() -> None:
    forms = [
        replace(each, finding=replace(each.finding, subject=f"dma, learned, w = N/8, 4.4M, try {number}"))
        for number, each in enumerate(
            _placed(verdict, 3, role="best", claim="retrieval")
            for verdict in (REFUTED, REPRODUCED, NOT_TESTED, NO_DIFFERENCE)
        )
    ]
    (alone,) = goals(forms[:1])
    told = "+0.100 [+0.050, +0.150] nats<br>w/N 1/8, 23% of pairs, 4.4M, 3 seeds"
    assert alone == {"goal": CLAIMS["retrieval"].text, "form": "dma, learned", "verdict": f"**refuted**<br>{told}"}
    first, second = goals(forms)
    assert first == alone
    assert second["goal"] == ""
    assert second["verdict"] == f"**reproduced**<br>{told}<br><br>2 more: [every verdict](verdicts.md)"


def test_a_goal_of_levers_shows_every_form_whatever_it_found() -> None:
    parts = ("beyond the window", "beyond the trained length")
    found = [
        replace(each, finding=replace(each.finding, subject=f"{form}, {part}", role=""))
        for form, verdict in (
            ("dma, learned, ssmax", NOT_TESTED),
            ("mha, drope", REFUTED),
            ("dma, learned", REPRODUCED),
        )
        for part in parts
        for each in [_placed(verdict, 3, claim="lever")]
    ]
    first, second = goals(found)
    told = "+0.100 [+0.050, +0.150] nats"
    assert first["form"] == "dma, learned, ssmax"
    assert (second["goal"], second["form"]) == ("", "dma, learned")
    conditions = "w/N 1/8, 23% of pairs, 4.4M, 3 seeds"
    assert second["verdict"] == "<br><br>".join(f"**reproduced**<br>{told} {part}<br>{conditions}" for part in parts)


def test_the_plain_form_is_named_where_nothing_else_tells_two_figures_apart() -> None:
    def cell(sizes: tuple[str, str], shares: tuple[str, str]) -> str:
        found = [
            Placed(replace(each.finding, subject=f"{size}, {steps} steps"), f"sweep-{steps}", "mqar.md", False)
            for size, share, steps, verdict in zip(sizes, shares, (250, 2000), (REFUTED, NOT_TESTED), strict=True)
            for each in [_placed(verdict, 3 if share == "1/8" else 0, share, size=size)]
        ]
        (row,) = [row for row in board(found) if row["claim"] == CLAIMS["recall"].text]
        return row["plain form"]

    told = cell(("4.4M", "4.4M"), ("1/8", "1/8"))
    assert [block.split("<br>")[1] for block in told.split("<br><br>")] == ["250 steps", "2000 steps"]
    assert "steps" not in cell(("4.4M", "4.4M"), ("1/8", "1/4"))


def _on(placed: Placed, task: str, gain: str, *, part: str = "", subject: str = "") -> Placed:
    """The finding on another task, with another difference."""
    finding = placed.finding
    changed = replace(
        finding, setting=finding.setting | {"task": task}, difference=gain, subject=subject or finding.subject
    )
    return replace(placed, finding=changed, part=part or placed.part)


def test_the_order_of_the_sweeps_decides_nothing() -> None:
    short = _on(_placed(REFUTED, 3, role="best"), "256 pairs in 1024 tokens", "-0.1", part="short")
    long = _on(_placed(NO_DIFFERENCE, 3, role="best"), "512 pairs in 8192 tokens", "-0.2", part="long")
    assert chosen([short, long], "best") == chosen([long, short], "best") == [long]


def test_best_forms_that_decide_otherwise_are_shown_whatever_their_widest_head() -> None:
    task = "512 pairs in 8192 tokens"
    first, other = (
        _on(_placed(verdict, 3, f"1/16 (widest head {keys} of 8192 keys: 22% of dense pairs)", role="best"), task, gain)
        for verdict, keys, gain in ((REFUTED, 1390, "-0.175"), (NOT_TESTED, 964, "-0.046"))
    )
    assert chosen([first, other], "best") == [first, other]
    (row,) = [row for row in board([first, other]) if row["claim"] == CLAIMS["recall"].text]
    assert row["best form"].count("widest head 22%") == 2


def test_a_row_compares_forms_on_the_best_forms_task_as_well() -> None:
    ours, theirs = "512 pairs in 8192 tokens", "256 pairs in 1024 tokens"
    best = _on(_placed(REFUTED, 3, role="best"), ours, "-0.2")
    many, one = _on(_placed(REFUTED, 3), theirs, "-0.3"), _on(_placed(NOT_TESTED, 1), ours, "-0.8")
    hidden = _on(_placed(NOT_TESTED, 1, appendix=True), ours, "-0.7")
    (row,) = [row for row in board([best, many, one, hidden]) if row["claim"] == CLAIMS["recall"].text]
    first, second = row["plain form"].split("<br><br>")
    assert first.startswith(f"**refuted**<br>-0.3<br>{theirs}<br>")
    assert second.startswith(f"**not tested**<br>-0.8<br>{ours}<br>")
    assert "-0.7" not in row["plain form"]
