"""The scoreboard: which of many findings decides a cell, and that nothing untested hides."""

from __future__ import annotations

from dynamask_lab.report.claims import CLAIMS, GOALS
from dynamask_lab.report.scoreboard import Placed, board, chosen, details
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
    pairs = "23% of dense pairs"
    first = f"**refuted** ({told}, w/N 1/8, {pairs}, 4.4M, 3 seeds)"
    assert row["plain form"] == f"{first}; **not tested** ({told}, w/N 1, {pairs}, 4.4M)"
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


def test_of_as_many_seeds_the_largest_models_decide() -> None:
    small, large = _placed(REFUTED, 3, role="best"), _placed(NO_DIFFERENCE, 3, role="best", size="10.0M")
    one_seed = _placed(REPRODUCED, 1, role="best", size="20.6M")
    assert chosen([small, large, one_seed], "best") == [large]


def test_a_part_of_a_claim_is_told_where_it_decides_otherwise() -> None:
    whole = [_placed(REFUTED, 3, "1/16", claim="perplexity"), _placed(NOT_TESTED, 3, "1", claim="perplexity")]
    alone = [_placed(REFUTED, 3, "1/16", claim="perplexity-mha"), _placed(REPRODUCED, 3, "1", claim="perplexity-mha")]
    (row,) = [row for row in board([*whole, *alone]) if row["claim"] == CLAIMS["perplexity"].text]
    assert row["plain form"].count("refuted") == 1
    assert "; MHA alone: **reproduced** (" in row["plain form"]
