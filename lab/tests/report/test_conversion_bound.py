"""Tests of the tables of what bounds a conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynamask_lab.report.conversion_bound import bound_rows, cache_rows, read_bound, search_rows


def _line(rule: str, losses: list[list[float]], **facts: Any) -> dict[str, Any]:
    usual = {"study": "conversion bound", "corpus": "text", "budget": 512, "windows": [640, 711, 185], "slopes": None}
    return {**usual, "rule": rule, "losses": losses, **facts}


def test_losses_are_above_those_of_the_same_blocks(tmp_path: Path) -> None:
    lines = [_line("dense", [[1.0, 3.0], [2.0, 4.0]], budget=None), _line("learned", [[1.1, 3.3], [2.1, 4.3]])]
    lines += [_line("oracle, max", [[1.0, 3.1], [2.0, 4.1]]), _line("learned", [[9.0, 9.0]] * 2)]
    lines += [_line("learned, one layer", [[1.0, 3.0], [2.0, 4.0]], windows=[8192, 711, 8192])]
    (tmp_path / "bound-x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = bound_rows(read_bound(tmp_path, "conversion bound"))
    found = {row["frozen, and chosen by"]: row["text loss above dense"] for row in rows}
    assert found["learned ranks"].startswith("+6.500")  # the last of two lines counts
    assert found["an oracle's ranks by the largest later attention, no slopes"].startswith("+0.050")
    assert found["learned ranks in layer 11 alone, the others dense"].startswith("+0.000")
    assert read_bound(tmp_path, "conversion cache") == []


def test_shares_are_of_the_dense_cache_as_long() -> None:
    facts = [
        (None, 8192, 2**21, None),
        (None, 32768, 2**23, None),
        (512, 8192, 2**20, 2**19),
        (512, 32768, 2**20, 2**19),
    ]
    rows = cache_rows([{"budget": b, "length": n, "bytes": size, "global": part} for b, n, size, part in facts])
    assert rows[0]["share at 8K"] == "50.0%"
    assert rows[0]["share at 32K"] == "12.5%"
    assert rows[0]["of it global heads"] == "0.5"


def test_searched_rules_stand_beside_estimated_ones() -> None:
    def line(rule: str, loss: float, part: str = "test", **more: Any) -> dict[str, Any]:
        rules = {} if rule == "dense" else {"budget": 512, "windows": [700, 324], "slopes": [0.0, 4 / 8192]}
        return {"rule": rule, "part": part, "losses": [[loss, loss], [loss + 1, loss + 1]], **rules, **more}

    lines = [line("dense", 2.0), line("dense", 9.0, "validation"), line("tried", 1.0, "validation", local=128)]
    lines += [line("estimated", 2.2, local=128), line("found", 2.1, local=32)]
    lines += [line("oracle, max, tried", 2.4), line("oracle, max, tried", 2.05)]
    rows = search_rows(lines)
    assert [row["text loss above dense"][:6] for row in rows] == ["+0.200", "+0.100", "+0.050"]
    assert [row["newest keys"] for row in rows] == ["128", "32", "128"]
    assert {row["slopes, 1/8192"] for row in rows} == {"0, 4"}
    assert "largest later attention" in rows[2]["frozen; windows and slopes"]
