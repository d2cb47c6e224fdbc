"""Scaling and locality in the report: verdicts on figures whose outcome is known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynamask_lab.report.pictures import pictures
from dynamask_lab.studies import LOCALITY as LOCALITY_STUDY
from dynamask_lab.studies import SCALING, Record, run_key
from dynamask_lab.studies.judged import LOCALITY, LOCALITY_EVEN
from dynamask_lab.studies.judged import SCALING as SCALING_FORMS
from dynamask_lab.studies.locality.report import report_locality, without_choice
from dynamask_lab.studies.locality.study import variant_name
from dynamask_lab.studies.scaling.report import report_scaling
from dynamask_lab.sweeps.section import Finding
from dynamask_lab.sweeps.verdicts import NO_DIFFERENCE, NOT_TESTED, REFUTED, REPRODUCED

Loss = Callable[[str, int], float | None]


def _records(experiment: str, configs: list[dict[str, Any]], loss: Loss, early: Loss | None = None) -> list[Record]:
    """Runs of the sweep with losses by mechanism and width; compute is a run's width to the third."""
    records = []
    for config in configs:
        name, width = variant_name(config), config["width"]
        final, first = loss(name, width), (early or loss)(name, width)
        result = {
            "loss": final,
            "curve": [{"step": 100, "tokens": 1, "loss": first}, {"step": 200, "tokens": 2, "loss": final}],
            "positions": [{"from": 0, "to": 64, "loss": final}, {"from": 64, "to": 128, "loss": final}],
            "flops": float(width) ** 3,
            "parameters": {"embedding": 10, "non_embedding": 20, "gates": 1},
            "tokens_per_second": 1e6,
            "peak_memory": None,
        }
        records.append(
            Record(experiment, run_key(experiment, config), config, config["seed"], result, 1.0, "d", {}, None)
        )
    return records


def _scaling(loss: Loss) -> list[Record]:
    first = _records("scaling", SCALING.configs("smoke"), loss)
    return _records("scaling", SCALING.configs("smoke", first), loss)


PLAIN, BEST, CONTROL = (form.name for form in SCALING_FORMS)


def _sweep(loss: Loss, sizes: tuple[int, ...] = (128, 192, 256), seeds: int = 2) -> list[Record]:
    """The runs of the sweep "small" at some widths: every rate at the least, the best at the others."""
    first = _records("scaling", SCALING.configs("small"), loss)
    runs = [r for r in _records("scaling", SCALING.configs("small", first), loss) if r.config["width"] in sizes]
    runs = list({r.key: r for r in (*first, *runs)}.values())
    for record in runs:  # seeds differ a little
        record.result["loss"] = record.result["loss"] and record.result["loss"] + 0.002 * record.seed
    return [record for record in runs if record.seed < seeds]


def _quietly(records: list[Record], folder: Path) -> list[Finding]:
    with pictures(drawn=False):
        return list(report_scaling(records, folder).findings)


def _bracketed(records: list[Record]) -> list[Record]:
    """The same, the best rate of every mechanism inside the grid."""
    rates = sorted({r.config["learning_rate"] for r in records if r.config["width"] == 128})
    for record in records:
        if record.config["width"] == 128 and record.config["learning_rate"] in (rates[0], rates[-1]):
            record.result["loss"] += 0.5
    return records


def test_lower_perplexity_must_hold_against_every_rival(tmp_path: Path) -> None:
    def loss(name: str, width: int) -> float:
        small = {PLAIN: 0.3}.get(name, -0.2 if "windows" in name and "ranked" in name else 0.0)
        return 10 * width**-0.3 + small

    section = report_scaling(_bracketed(_sweep(loss)), tmp_path)
    found = {finding.role: finding for finding in section.findings if finding.setting["seeds"] != "0"}
    assert found["best"].verdict == REPRODUCED
    assert found["best"].setting["size"] == "4.4M"
    assert found["best"].setting["seeds"] == "2"
    assert "92% of dense pairs" in found["best"].setting["w/N"]
    assert "mha +0.200 [+0.200" in found["best"].measured
    assert found["plain"].verdict == REFUTED
    assert found["control"].verdict == NOT_TESTED  # level, but two seeds tell no difference below 0.05 nats
    (own,) = [finding for finding in section.findings if finding.setting["seeds"] == "0"]
    assert own.verdict == NOT_TESTED
    assert own.setting["w/N"] == "1"
    assert (tmp_path / "scaling.svg").exists() or (tmp_path / "scaling.png").exists()
    gap = next(exhibit for exhibit in section.exhibits if exhibit.name == "gap")
    assert {row["mechanism"]: row["@200"] for row in gap.table}[BEST] == "+0.200"


def test_losses_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Differences that vary from seed to seed leave a verdict open, though other forms' seeds hardly differ."""

    def loss(name: str, width: int) -> float:
        return 10 * width**-0.3 - (0.3 if "ranked by attention, windows 32/" in name else 0.0)

    records = _bracketed(_sweep(loss))
    for record in records:
        if variant_name(record.config, any_depth=True) == BEST:
            record.result["loss"] -= 0.1 * record.seed
    (found,) = [f for f in _quietly(records, tmp_path) if f.role == "best"]
    assert "mha +0.350 [-0.286, +0.986]" in found.measured
    assert found.verdict == NOT_TESTED


def test_one_seed_has_no_interval_and_no_verdict(tmp_path: Path) -> None:
    def loss(name: str, width: int) -> float:
        return 10 * width**-0.3 - (0.3 if "ranked by attention, windows 32/" in name else 0.0)

    records = _bracketed(_sweep(loss))
    records = [record for record in records if record.seed == 0 or record.config["width"] != 256]
    (_, found) = [f for f in _quietly(records, tmp_path) if f.role == "best"]
    assert (found.setting["size"], found.setting["seeds"]) == ("4.4M", "1")
    assert found.difference == "+0.300 nats"
    assert "[" not in found.measured
    assert found.verdict == NOT_TESTED


def test_rates_are_compared_by_the_seeds_that_all_of_them_ran(tmp_path: Path) -> None:
    """A second seed that learns late is no ground for a rate that one seed tried."""
    records = [r for r in _sweep(lambda *_: 3.0, sizes=(128,)) if variant_name(r.config) == "mha"]
    twice = next(record.config["learning_rate"] for record in records if record.seed == 1)
    for record in records:
        record.result["loss"] += 5.0 * record.seed - 0.1 * (record.config["learning_rate"] == twice)
    with pictures(drawn=False):
        section = report_scaling(records, tmp_path)
    shown = next(exhibit for exhibit in section.exhibits if exhibit.name == "loss").keys
    assert {record.seed for record in records if record.key in shown} == {0, 1}


def test_a_lead_over_a_rival_whose_rate_is_at_the_edge_decides_nothing(tmp_path: Path) -> None:
    """And a rival that is ahead there is ahead all the more."""

    def loss(name: str, width: int) -> float:
        return 2.0 if name == "mha" else 2.8 if "ranked by attention, windows 32/" in name else 3.0

    records = _bracketed(_sweep(loss))
    for record in records:
        if record.config["attention"] in ("mha", "mla") and record.config["width"] == 128:
            record.result["loss"] += 0.1 if record.config["learning_rate"] > 5e-3 else 0.9  # best at the highest rate
    found = {f.role: f for f in _quietly(records, tmp_path) if f.setting["seeds"] != "0"}
    assert "the best rate of mha and mla is the edge of the grid" in found["best"].measured
    assert found["best"].verdict == REFUTED
    alone = [r for r in records if r.config["attention"] != "mha"]
    found = {f.role: f for f in _quietly(alone, tmp_path) if f.setting["seeds"] != "0"}
    assert found["best"].verdict == NOT_TESTED
    assert "not compared with mha" in found["best"].measured


def test_a_mechanism_keeps_its_name_where_models_differ_in_depth() -> None:
    """How far a wide layer sees, and how many are dense, follows from the number of layers."""
    rates = _records("scaling", SCALING.configs("small"), lambda name, width: 1.0)
    configs = [run for run in SCALING.configs("small", rates) if run["seed"] == 0]
    assert {run["layers"] for run in configs} == {6, 7}
    sizes: dict[str, set[int]] = defaultdict(set)
    for run in configs:
        sizes[variant_name(run, any_depth=True)].add(run["width"])
    assert set(map(frozenset, sizes.values())) == {frozenset({128, 192, 256, 384, 512})}
    assert {"dma, one layer in four dense", "swa, narrow windows 32", "swa, narrow windows 128"} < set(sizes)


def test_a_diverged_run_has_no_good_news(tmp_path: Path) -> None:
    diverged = _sweep(lambda name, width: None if "gentle" in name else 3.0)
    found = {f.role: f for f in _quietly(diverged, tmp_path) if f.setting["seeds"] != "0"}
    assert found["best"].verdict == NOT_TESTED


def test_speeds_of_shared_devices_are_not_compared(tmp_path: Path) -> None:
    records = _scaling(lambda *_: 3.0)
    tables = {}
    for device in ("a GPU", "a GPU (3 runs at a time)"):
        loss, *_, speed = report_scaling([replace(r, device=device) for r in records], tmp_path).exhibits
        tables[device] = ("tokens/s, largest" in loss.table[0], "do not compare" in speed.text)
    assert tables == {"a GPU": (True, False), "a GPU (3 runs at a time)": (False, True)}


def _locality(losses: dict[str, float | None], early: dict[str, float], seeds: int = 3) -> list[Record]:
    """The sweep "chinchilla" at so many seeds, with losses by mechanism; seeds differ a little."""
    configs = [config | {"seed": seed} for seed in range(seeds) for config in LOCALITY_STUDY.configs("chinchilla")]
    configs = list({run_key("locality", config): config for config in configs}.values())
    records = _records("locality", configs, lambda n, _: losses.get(n, 2.5), lambda n, _: early.get(n, 3.5))
    for record in records:
        record.result["loss"] = record.result["loss"] and record.result["loss"] + 0.001 * record.seed
    return records


def test_locality_needs_both_the_beginning_and_the_end(tmp_path: Path) -> None:
    even, wide = LOCALITY_EVEN[1].name, LOCALITY[1].name
    final = {wide: 2.0, even: 2.0, "swa": 2.2, "mha": 2.1}
    section = report_locality(_locality(final, {wide: 3.0, even: 3.2, "swa": 3.1, "mha": 3.5}), tmp_path)
    found = {(finding.claim, finding.subject): finding for finding in section.findings}
    assert found["locality", wide].verdict == REPRODUCED
    assert "below swa at step 100 +0.100 [+0.100" in found["locality", wide].measured
    assert found["locality-asked", even].verdict == REFUTED
    assert found["locality", wide].setting["seeds"] == "3"
    assert any(tmp_path.glob("locality.*"))
    short = _locality(final, {}, seeds=1)
    for record in short:
        record.result["curve"] = [{"step": 3, "tokens": 1, "loss": 2.0}]
    verdicts = {f.verdict for f in report_locality(short, tmp_path).findings if f.claim.startswith("locality")}
    assert verdicts == {NOT_TESTED}


def test_a_choice_pays_if_the_form_beats_its_control(tmp_path: Path) -> None:
    form = LOCALITY[1].name
    control = without_choice(form)
    assert control == "dma, no choice, gentle, windows 32/608"
    for loss, seeds, verdict in (
        (2.0, 3, REPRODUCED),
        (2.17, 2, NOT_TESTED),  # 0.03 nats, two seeds
        (2.17, 3, REPRODUCED),
        (2.199, 3, NO_DIFFERENCE),
        (2.3, 3, REFUTED),
        (None, 3, NOT_TESTED),
    ):
        with pictures(drawn=False):
            section = report_locality(_locality({form: loss, control: 2.2}, {}, seeds), tmp_path)
        (found,) = (each for each in section.findings if each.claim == "choice" and each.subject == form)
        assert found.verdict == verdict, (loss, seeds)
        assert len(found.keys) == 2 * 2 * seeds  # two corpora


def test_pictures_are_the_same_twice(tmp_path: Path) -> None:
    records = _scaling(lambda name, width: 3.0 + len(name) / 100)
    for folder in ("one", "two"):
        report_scaling(records, tmp_path / folder)
    one, two = ((tmp_path / folder / "scaling.svg").read_bytes() for folder in ("one", "two"))
    assert one == two
