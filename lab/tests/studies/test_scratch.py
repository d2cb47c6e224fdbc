"""The study `scratch`: every form runs, windows per head have the mean they should, verdicts follow the test split."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask_lab.language.data import token_streams
from dynamask_lab.language.engine import (
    STATE_FOLDER,
    LanguageConfig,
    build_model,
    losses_by_last_use,
    run_language,
    windows_by_rank,
)
from dynamask_lab.studies import SCRATCH, Record, run_key
from dynamask_lab.studies.judged import share_of_pairs
from dynamask_lab.studies.scratch.report import _CAUSES, _at_share, report_scratch
from dynamask_lab.studies.scratch.study import forms, judged, larger, rates, scratch_name, shares, tables
from dynamask_lab.sweeps.registry import Lender
from dynamask_lab.sweeps.verdicts import (
    NOT_TESTED,
    REFUTED,
    REPRODUCED,
    Interval,
    judge_no_worse,
    paired_difference,
)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_FOLDER, str(tmp_path / "state"))


def _quiet(share: float, note: str) -> None:
    pass


def test_names_and_order() -> None:
    configs = SCRATCH.configs("tiny")
    assert [scratch_name(config) for config in configs[:8]] == list(forms(2048))
    assert [config["seed"] for config in configs] == [0] * 8 + [1] * 8 + [2] * 8
    assert len({run_key("scratch", config) for config in configs}) == len(configs)


@pytest.mark.parametrize(("size", "parameters", "rate"), [("60M", 59.9e6, 1.1e-3), ("45M", 44.2e6, 1.2e-3)])
def test_the_largest_sizes_read_twenty_tokens_a_parameter_in_three_forms(
    size: str, parameters: float, rate: float
) -> None:
    configs = [LanguageConfig.of(config) for config in SCRATCH.configs(f"{size}-tables")]
    assert [scratch_name(config.plain()) for config in configs] == list(larger(4096, 7))[:3]
    for config in configs:
        assert config.width == 64 * config.heads
        assert config.parameters == pytest.approx(parameters, rel=0.01)
        assert config.total_steps * config.batch_tokens == pytest.approx(20 * config.parameters, rel=1e-4)
        assert config.learning_rate == pytest.approx(0.5 * rate)
    assert share_of_pairs(configs[1].plain()) == pytest.approx(0.121, abs=0.001)


def test_a_calibrated_run_goes_on_to_the_same_numbers_and_decides_its_control() -> None:
    (calibrated,) = (c for c in SCRATCH.configs("smoke") if c.get("calibrate_at"))
    calibrated |= {"groups": 2, "window": 16, "local": 8, "steps": 20}
    whole = run_language(calibrated, _quiet)
    assert sum(sum(layer) for layer in whole["head_windows"]) == 16 * 4
    assert min(min(layer) for layer in whole["head_windows"]) >= 8 + 4

    def stop(share: float, note: str) -> None:
        if share >= 0.5:  # after the calibration
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_language(calibrated, stop)
    resumed = run_language(calibrated, _quiet)
    assert (resumed["head_windows"], resumed["loss"]) == (whole["head_windows"], whole["loss"])

    (own,) = (c for c in SCRATCH.configs("smoke") if c.get("calibrate_at"))
    record = Record("scratch", run_key("scratch", own), own, 0, {"head_windows": [[8], [8]]}, 1.0, "d", {}, None)
    (control,) = SCRATCH.configs("smoke", [record])[8:]
    assert control["window_schedule"] == own["window_schedule"]
    assert scratch_name(control) == "newest, head windows, w = N/8"
    model = build_model(LanguageConfig.of(control), 257)
    assert model.config.head_windows == ((8,), (8,))
    assert model.config.sinks == 4


def test_windows_by_rank_go_to_heads_whose_keys_matter() -> None:
    settings = LanguageConfig(
        "dma", window=16, ranking="learned", sinks=2, local=4, layers=2, width=32, heads=4, length=64
    )
    model = build_model(settings, 50)
    predictor = model.model.layers[1].mixer.rank_predictor
    with torch.no_grad():
        predictor.down.bias[1] += 2.0
    made = windows_by_rank(model, torch.randint(0, 50, (3, 64)), 16)
    assert sum(map(sum, made)) == 16 * 4
    assert made[1][1] > made[1][0]
    assert share_of_pairs({"length": 64, "layers": 2, "attention": "swa", "window": 16, "layer_windows": made}) < 1
    with pytest.raises(InvalidInputError, match="calibrate_at"):
        LanguageConfig("mha", calibrate_at=0.5)


def _records(loss: dict[str, float], seeds: int, size: str = "tiny", others: float = 3.0) -> list[Record]:
    records = []
    for config in SCRATCH.configs(size):
        if config["seed"] < seeds:
            test = loss.get(scratch_name(config), others) + 0.001 * config["seed"]
            result: dict[str, Any] = {"loss": 9.0, "test": test}
            records.append(
                Record("scratch", run_key("scratch", config), config, config["seed"], result, 1, "d", {}, None)
            )
    return records


def test_verdicts_read_the_test_split(tmp_path: Path) -> None:
    loss = {"paper, w = N/16": 3.4, "learned, head windows, w = N/16": 2.9, "paper, w = N": 3.001}
    findings = report_scratch(_records(loss, 3), tmp_path).findings
    found = {f.subject: f for f in findings if f.claim == "scratch"}
    claimed = {f.subject: f.verdict for f in findings if f.claim == "perplexity"}
    names = ("learned, head windows, w = N/16", "paper, w = N", "paper, w = N/16")
    verdicts = [found[f"{name}, 1.1M, fresh tokens"].verdict for name in names]
    # Dense attention at the whole rate is no measure for a lead.
    assert verdicts == [NOT_TESTED, NOT_TESTED, REFUTED]
    assert "dense (at twice its better rate) +0.100" in found[f"{names[0]}, 1.1M, fresh tokens"].measured
    assert found["paper, w = N, 1.1M, fresh tokens"].role == "plain"
    assert found["paper, w = N, 1.1M, fresh tokens"].setting["w/N"] == "1"
    assert [claimed[f"{name}, 1.1M, fresh tokens"] for name in names] == [NOT_TESTED, NOT_TESTED, REFUTED]  # no nsa
    one = report_scratch(_records(loss, 1), tmp_path).findings
    assert {finding.verdict for finding in one} == {NOT_TESTED}


def test_names_of_the_judged_sizes_tell_rates_and_windows() -> None:
    sizes = {"4M-judged": judged(4096) | shares(4096), "4M-rates": rates(4096), "4M-tables": tables(4096)}
    for size, made in (sizes | {"10M-tables": larger(4096, 3)}).items():
        configs = SCRATCH.configs(size)
        assert [scratch_name(config) for config in configs if config["seed"] < 3] == 3 * list(made)
        assert len({run_key("scratch", config) for config in configs}) == len(configs)


def test_half_rates_are_held_against_half_rates(tmp_path: Path) -> None:
    losses = {"dense, half rate": 3.0, "scored, half rate, one wide layer, w = N/16": 2.9, "paper, w = N": 3.2}
    section = report_scratch(_records(losses, 3, "4M-rates", others=3.05), tmp_path)
    found = {f.subject: f for f in section.findings if f.claim == "scratch"}
    best = found["scored, half rate, one wide layer, w = N/16, 4.4M, fresh tokens"]
    assert best.verdict == REPRODUCED
    assert "sliding + sinks, half rate, one wide layer, w = N/16 +0.150" in best.measured
    dense = {f.subject: f.verdict for f in section.findings if f.claim == "scratch-dense"}
    assert dense["scored, half rate, one wide layer, w = N/16, 4.4M, fresh tokens"] == REPRODUCED
    assert dense["sliding + sinks, half rate, one wide layer, w = N/16, 4.4M, fresh tokens"] == REFUTED
    assert found["paper, w = N, 4.4M, fresh tokens"].verdict == REFUTED
    causes = {row["what differs"]: row["difference"] for row in section.exhibits[1].table}
    assert causes["the choice, with scores on the logits, half rate"].startswith("-0.150")


def test_verdicts_give_the_seeds_that_two_forms_share(tmp_path: Path) -> None:
    further = {scratch_name(config) for config in SCRATCH.configs("10M-tables") if config["seed"] > 2}
    assert further == {
        "scored, half rate, one wide layer, w = N/16",
        "scored, no choice, half rate, one wide layer, w = N/16",
        "sliding + sinks, half rate, one wide layer, w = N/16",
    }
    records = _records({"dense, half rate": 3.0}, 6, "10M-tables", others=2.9)
    found = {f.claim: f.setting["seeds"] for f in report_scratch(records, tmp_path).findings if "scored" in f.subject}
    assert found["scratch"] == "3 to 6"
    assert found["scratch-dense"] == "3"


SCORED, SLIDING = (f"{name}, half rate, one wide layer, w = N/16" for name in ("scored", "sliding + sinks"))
NOTE = "one seed, interval borrowed from 20M-tables"


def _lender(scored: list[float], sliding: list[float]) -> Lender:
    """Runs of `20M-tables` whose losses lie so far above dense attention's, seed by seed."""
    above = {"dense, half rate": [0.0] * len(scored), SCORED: scored, SLIDING: sliding}
    records = []
    for config in SCRATCH.configs("20M-tables"):
        name, seed = scratch_name(config), config["seed"]
        if seed < len(above.get(name, ())):
            result = {"loss": 9.0, "test": 2.0 + 0.1 * seed + above[name][seed]}
            records.append(Record("scratch", run_key("scratch", config), config, seed, result, 1, "d", {}, None))
    return Lender("20M-tables", records)


@pytest.mark.parametrize("size", ["60M", "45M"])
def test_one_seed_borrows_the_spread_of_the_same_difference_at_20M(size: str, tmp_path: Path) -> None:
    lender = _lender([0.002, 0.003, 0.007], [0.01, 0.02, 0.03])
    loss = {"dense, half rate": 1.000, SCORED: 1.002, SLIDING: 1.080}
    records = _records(loss, 1, f"{size}-tables")
    section = report_scratch(records, tmp_path, lender=lender)
    found = {(f.claim, f.subject.partition(", half rate")[0]): f for f in section.findings}
    goal = found["scratch-dense", "scored"]
    # Standard deviations of the differences at 20M: against dense 0.002646, newest keys against dense 0.01; t is 4.303.
    assert goal.difference == "-0.002 [-0.013, +0.009] nats"
    assert found["scratch-dense", "sliding + sinks"].difference == "-0.080 [-0.123, -0.037] nats"
    # Of newest keys less scored: 0.008, 0.017, 0.023, deviation 0.00755.
    assert f"{SLIDING} +0.078 [+0.046, +0.110]" in found["scratch", "scored"].measured
    assert {f.note for f in section.findings} == {NOTE}
    assert {f.setting["seeds"] for f in section.findings} == {"1"}
    lent = {record.key for record in lender.records}
    assert lent & set(goal.keys) == {r.key for r in lender.records if scratch_name(r.config) != SLIDING}
    causes = {row["what differs"]: row for row in section.exhibits[1].table}
    assert causes["the form with scores, half rate"]["difference"] == "+0.002 [-0.009, +0.013]"
    assert causes["the form with scores, half rate"]["seeds"] == NOTE
    assert lent & set(section.exhibits[1].keys)
    # The rule that counts seeds stays: one seed decides nothing below 0.05 nats, and above it what the interval does.
    assert goal.verdict == NOT_TESTED
    assert found["scratch-dense", "sliding + sinks"].verdict == REFUTED
    assert "One seed has no spread" in section.text


def test_one_seed_without_a_lender_or_with_a_lender_of_one_seed_has_no_interval(tmp_path: Path) -> None:
    records = _records({"dense, half rate": 1.0, SCORED: 1.2, SLIDING: 1.3}, 1, "60M-tables")
    for lender in (None, Lender("20M-tables", []), _lender([0.1], [0.2]), _lender([0.1, math.inf], [0.2, 0.3])):
        section = report_scratch(records, tmp_path, lender=lender)
        found = {f.subject.partition(", half rate")[0]: f for f in section.findings if f.claim == "scratch-dense"}
        assert (found["scored"].difference, found["scored"].note) == ("-0.200 nats", "")
        assert found["scored"].verdict == NOT_TESTED


def test_several_seeds_have_their_own_interval_whatever_is_lent(tmp_path: Path) -> None:
    records = _records({"dense, half rate": 1.0, SCORED: 1.2}, 3, "10M-tables")
    own = report_scratch(records, tmp_path)
    assert report_scratch(records, tmp_path, lender=_lender([0.1, 0.5, 0.2], [0.2, 0.1, 0.0])) == own
    assert not any(finding.note for finding in own.findings)


def test_a_diverged_run_borrows_nothing(tmp_path: Path) -> None:
    records = _records({"dense, half rate": 1.0, SCORED: math.inf, SLIDING: 1.3}, 1, "60M-tables")
    section = report_scratch(records, tmp_path, lender=_lender([0.002, 0.003, 0.007], [0.01, 0.02, 0.03]))
    found = {f.subject.partition(", half rate")[0]: f for f in section.findings if f.claim == "scratch-dense"}
    assert (found["scored"].note, found["scored"].verdict) == ("", NOT_TESTED)


def test_every_table_of_causes_names_forms_that_run() -> None:
    known = {scratch_name(config) for size in SCRATCH.sizes for config in SCRATCH.configs(size)}
    named = {_at_share(name) for _, *pair in _CAUSES for name in pair}
    assert not named - known


def test_the_paper_between_n_and_a_sixteenth_is_held_against_half_rates(tmp_path: Path) -> None:
    losses = {"dense, half rate": 3.0, "nsa, 5 free blocks, half rate": 3.1, "paper, w = N/4": 3.2}
    section = report_scratch(_records(losses, 3, "4M-tables", others=3.05), tmp_path)
    found = {(f.claim, f.subject): f for f in section.findings}
    goal = found["scratch", "paper, w = N/4, 4.4M, fresh tokens"]
    assert goal.verdict == REFUTED
    assert "sliding + sinks, half rate, w = N/4 -0.150" in goal.measured
    claim = found["perplexity", "paper, w = N/4, 4.4M, fresh tokens"]
    assert claim.verdict == REFUTED
    assert "not compared" not in claim.measured
    causes = {row["what differs"]: row["difference"] for row in section.exhibits[1].table}
    assert causes["native sparse attention, half rate"].startswith("+0.100")


def test_a_random_network_ranks_and_never_learns() -> None:
    settings = LanguageConfig.of(next(c for c in SCRATCH.configs("4M-judged") if c.get("random_ranks")))
    model = build_model(settings, 50)
    predictor = model.model.layers[0].mixer.rank_predictor
    assert not any(parameter.requires_grad for parameter in predictor.parameters())
    assert 1.0 < float(predictor(torch.randn(1, 500, settings.width)).std()) < 4.0


def test_no_worse_needs_an_interval_that_excludes_the_loss_of_interest() -> None:
    assert judge_no_worse(Interval(0.152, -0.002, 0.306), 0.01, seeds=3) == REPRODUCED
    assert judge_no_worse(Interval(0.152, -0.02, 0.306), 0.01, seeds=3) == NOT_TESTED
    assert judge_no_worse(Interval(0.02, 0.001, 0.04), 0.01, seeds=2) == NOT_TESTED
    assert judge_no_worse(Interval(-0.05, -0.06, -0.04), 0.01, seeds=3) == REFUTED


def test_paired_differences_do_not_see_how_seeds_differ() -> None:
    theirs = {0: 1.0, 1: 5.0, 2: 3.0, 3: 9.0}
    found = paired_difference({0: 0.5, 1: 4.5, 2: 2.5}, theirs)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert math.isnan(paired_difference({7: 1.0}, theirs).mean)
    assert math.isnan(paired_difference({0: 1.0}, theirs).low)


def test_a_local_corpus_is_made_of_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[2] / "scripts" / "local_corpus.py"
    spec = importlib.util.spec_from_file_location("local_corpus", script)
    assert spec is not None
    assert spec.loader is not None
    local_corpus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local_corpus)
    monkeypatch.setattr(
        local_corpus,
        "sources",
        lambda places, more: (
            local_corpus.Document(f"{i}", f"def f{i // 2}(x):\n    return x + {i // 2}\n" * 40) for i in range(800)
        ),
    )
    tokens = local_corpus.build(tmp_path, (), sample=10_000, processes=1, parts=2)
    monkeypatch.setenv("DYNAMASK_CORPORA", str(tmp_path))
    streams = token_streams("local", 0.5)
    assert len(streams.train) == tokens
    assert len(streams.test)
    assert len(streams.validation)


def test_losses_by_last_use_find_the_pair_before() -> None:
    tokens = np.array([[1, 2, 3, 1, 2, 9, 1, 2, 5, 5, 5]])
    found = losses_by_last_use(np.arange(10.0)[None], tokens)
    assert found == [
        {"from": 0, "to": 0, "loss": 27 / 7, "tokens": 7},
        {"from": 1, "to": 2, "loss": 9.0, "tokens": 1},  # 5 after 5
        {"from": 2, "to": 4, "loss": 4.5, "tokens": 2},  # 2 after 1, twice, three tokens apart
    ]
