"""Tests of the table of goals."""

from __future__ import annotations

from typing import Any

from dynamask_lab.report.conversion import long_table
from dynamask_lab.report.conversion_figures import Measured, ahead, seconds
from dynamask_lab.report.conversion_goals import SMOLLM2, goal_rows
from dynamask_lab.report.conversion_verdicts import verdict_rows
from dynamask_lab.studies.conversion import settle
from dynamask_lab.studies.conversion.final import LONGER
from dynamask_lab.studies.conversion.forms import Spec
from dynamask_lab.studies.conversion.jobs import key_of
from dynamask_lab.studies.conversion.levers import DENSE, converted
from dynamask_lab.studies.conversion.report import Study


def _line(spec: Spec, measure: str, settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    key = key_of(spec.facts(), measure, settings)
    facts = {"study": "conversion", "model": SMOLLM2, "key": key, "form": spec.name, "spec": spec.facts()}
    return {**facts, "measure": measure, "settings": settings, "result": result}


def _losses(spec: Spec, above: float) -> dict[str, Any]:
    settings = {"corpus": "text", "blocks": 100}
    return _line(spec, "loss", settings, {"losses": [[2.0 + above, 1.0 + above], [3.0 + above, 2.0 + above]]})


def _row(rows: Any, what: str, form: str) -> Any:
    return next(row for row in rows if row["what"] == what and row["form"] == form)


def test_a_goal_is_met_missed_or_not_run() -> None:
    rows = goal_rows([_losses(DENSE, 0.0), _losses(settle.DEFAULT[0], 0.02), _losses(LONGER, -0.01)])
    what = "text loss above dense"
    missed = _row(rows, what, "distilled, seed 0")
    assert missed["measured"].startswith("+0.020 ")
    assert missed[""].startswith("**missed**: bounded by")
    met = _row(rows, what, "embeddings learning, last weights, 800 steps")
    assert met["measured"].startswith("-0.010 ")
    assert met[""] == "met"
    assert _row(rows, what, "frozen")["measured"] == "not run"
    assert all(row[""] == "" for row in rows if row["measured"] == "not run")


def test_needles_are_judged_by_their_share_of_the_dense_models() -> None:
    settings = {"task": "single_1", "length": 1024, "haystack": "essays", "first": 0, "count": 2}
    lines = [
        _line(spec, "tasks", settings, {"scores": scores})
        for spec, scores in ((DENSE, [[1.0], [1.0]]), (settle.DEFAULT[0], [[1.0], [0.5]]))
    ]
    row = _row(goal_rows(lines), "needle tasks at 1K to 4K, share of dense", "distilled, seed 0")
    assert row["measured"].startswith("0.750 ")
    assert row[""].startswith("**missed**")


def test_distillation_is_timed_by_batch() -> None:
    line: dict[str, Any] = {"part": "distillation", "model": "smollm2-135m", "compiled": True, "recorded": True, "B": 8}
    line["tokens_per_s"] = 130_000.0
    others = [line | {"compiled": False, "B": 2}, line | {"tokens_per_s": 90_000.0}, {"part": "decode"}]
    rows = [row for row in goal_rows([], [line, *others]) if row["what"] == "distillation, tokens/s"]
    assert rows[0]["form"] == "alone on the GPU, batches of 8 blocks"
    assert rows[0]["measured"] == "130,000"
    assert rows[0][""] == "met"


def test_benchmarks_are_judged_by_the_mean_of_the_seeds() -> None:
    def answers(spec: Spec, right: list[int]) -> dict[str, Any]:
        return _line(spec, "benchmark", {"name": "copa", "limit": 1000}, {"acc": right, "acc_norm": right})

    lines = [answers(DENSE, [1, 0, 1, 0]), answers(settle.DEFAULT[0], [0] * 4), answers(settle.DEFAULT[2], [1] * 4)]
    rows = goal_rows(lines)
    what = "benchmarks: converted - dense"
    assert _row(rows, what, "distilled, seed 0")["measured"].startswith("-0.5000 ")
    assert _row(rows, what, "distilled, seed 1")["measured"] == "not run"
    mean = _row(rows, what, "distilled, mean of the seeds (2)")
    assert mean["measured"].startswith("+0.0000 ")
    assert mean[""] == "met"


def test_a_goal_has_one_verdict_over_its_seeds() -> None:
    lines = [_losses(DENSE, 0.0), _losses(settle.DEFAULT[0], 0.02), _losses(settle.DEFAULT[2], -0.02)]
    row = next(row for row in verdict_rows(lines) if row["what"] == "text loss above dense, distilled")
    assert row["measured"].startswith("+0.000 ")
    assert (row["seeds"], row["cache"], row[""]) == ("2", "1/16", "met")


def test_further_examples_count_that_every_peer_answered() -> None:
    def pairs(spec: Spec, first: int, right: float) -> dict[str, Any]:
        settings = {"task": "pairs", "length": 1024, "haystack": "essays", "first": first, "count": 2}
        return _line(spec, "tasks", settings, {"scores": [[right], [right]]})

    form, peers = settle.DEFAULT[0], [Spec("peer", 512, peer=peer) for peer in ("snapkv", "tova")]
    lines = [pairs(form, 0, 1.0), pairs(peers[0], 0, 0.0), pairs(peers[1], 0, 0.5)]
    lines += [pairs(form, 100, 0.0), pairs(peers[0], 100, 1.0)]
    assert ahead(Study(lines), form, ["pairs"]) == ("tova", Measured("+0.50 (+0.50 to +0.50)", 0.5, 0.5))
    lines.append(pairs(peers[1], 100, 0.0))
    assert ahead(Study(lines), form, ["pairs"])[0] == "snapkv"


def test_needles_at_16k_stand_beside_long_losses() -> None:
    settings = {"task": "single_1", "length": 16384, "haystack": "essays", "first": 0, "count": 2}
    spec = Spec("dense", rope=2)
    lines = [_line(spec, "tasks", settings | {"task": task}, {"scores": [[1.0], [0.0]]}) for task in ("a", "b")]
    lines.append(_line(spec, "tasks", settings | {"length": 4096}, {"scores": [[1.0]]}))
    assert long_table(lines) == [{"form": "dense", "keys per head": "all", "16K needles, %": "50.0"}]


def test_long_losses_show_the_last_eighth() -> None:
    losses = [[float("nan"), *[2.0] * 14, 4.0, 4.0]]
    line = _line(Spec("dense", rope=2), "long", {"corpus": "text", "length": 16384}, {"losses": losses})
    assert long_table([line]) == [{"form": "dense", "keys per head": "all", "16K text": "2.250 (4.000)"}]


def test_seconds_are_the_mean_of_the_seeds_not_the_fastest_one() -> None:
    def lines(seed: int, ranks: float, trained: float) -> list[dict[str, Any]]:
        stages = {
            "learn_ranks": (Spec("converted", None, seed=seed), ranks),
            "allocate_windows": (converted(steps=0, seed=seed), 10.0),
            "train": (settle.LAST[seed], trained),
        }
        return [_line(spec, stage, {}, {"seconds": took, "windows": [[512]]}) for stage, (spec, took) in stages.items()]

    study = Study([*lines(0, 40.0, 200.0), *lines(1, 60.0, 400.0)])
    assert seconds(study, (0, 1, 2)) == Measured("60 (50 to 70; 50 + 10)", 60.0)
    assert seconds(study, (0, 1, 2), settle.LAST) == Measured("360 (250 to 470; 50 + 10 + 300)", 360.0)
    assert seconds(study, (1,), settle.LAST).value == 470.0
    assert seconds(study, (2,)).value is None
    row = next(row for row in verdict_rows(study.rows) if row["what"].endswith("converted, distilled"))
    assert row["seeds"] == "2"
    assert row[""].startswith("**missed**")


def test_seconds_leave_out_runs_that_found_compiled_kernels() -> None:
    spec = Spec("converted", None)
    rows = [_line(spec, "learn_ranks", {}, {"seconds": 5.0, "warm": True})]
    rows.append(_line(converted(steps=0), "allocate_windows", {}, {"seconds": 10.0}))
    assert seconds(Study(rows), (0,)).value is None


def test_needles_in_documents_do_not_hide_the_comparison_with_peers() -> None:
    def answers(spec: Spec, haystack: str) -> dict[str, Any]:
        settings = {"task": "single_1", "length": 1024, "haystack": haystack, "first": 0, "count": 2}
        return _line(spec, "tasks", settings, {"scores": [[1.0], [1.0]] if spec.kind != "peer" else [[0.0], [0.0]]})

    form, peer = converted(steps=0), Spec("peer", 512, peer="keydiff")
    study = Study([answers(form, "essays"), answers(form, "documents"), answers(peer, "essays")])
    assert ahead(study, form, ["single_1"])[0] == "keydiff"
    assert ahead(study, form, ["single_1"])[1].value == 1.0
