"""Scaling and locality in the report: verdicts on figures whose outcome is known."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynamask_lab.studies import LOCALITY, SCALING, Record, run_key
from dynamask_lab.studies.locality.report import report_locality
from dynamask_lab.studies.locality.study import variant_name
from dynamask_lab.studies.scaling.report import report_scaling

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


def test_lower_perplexity_must_hold_against_every_rival_at_every_size(tmp_path: Path) -> None:
    def loss(name: str, width: int) -> float:
        penalty = {"dma": -0.1, "dma, paper": 0.1 if width == 32 else -0.1}.get(name, 0.0)
        return 10 * width**-0.3 + penalty

    section = report_scaling(_scaling(loss), tmp_path)
    verdicts = {finding.subject: finding for finding in section.findings}
    assert verdicts["dma"].held is True
    assert "lower in 8 of 8 comparisons; perplexity -9.5%" in verdicts["dma"].measured
    assert verdicts["dma, paper"].held is False
    assert "lower in 4 of 8" in verdicts["dma, paper"].measured
    assert (tmp_path / "scaling.svg").exists()
    law = next(row for row in section.exhibits[0].table if row["mechanism"] == "mha")
    assert law["b of C^-b"].startswith("0.1000")  # width**-0.3 is compute**-0.1


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


def test_a_sweep_without_a_rival_and_a_diverged_run_have_no_good_news(tmp_path: Path) -> None:
    records = [
        r for r in _scaling(lambda name, width: 3.0 - 0.01 * ("dma" in name)) if "nsa" not in r.config["attention"]
    ]
    found = {f.subject: f for f in report_scaling(records, tmp_path).findings}
    assert found["dma"].held is None
    assert "not compared with nsa" in found["dma"].measured
    diverged = _scaling(lambda name, width: None if name == "dma" else 3.0)
    assert {f.subject: f.held for f in report_scaling(diverged, tmp_path).findings}["dma"] is False


def test_forms_compare_over_common_seeds_with_no_more_rates_than_the_rival(tmp_path: Path) -> None:
    """A rival's other seed does not count, and a form that had more learning rates to choose from is not compared."""
    records = [r for r in _scaling(lambda name, _: 2.9 if name == "dma" else 3.0) if r.config["width"] == 16]
    lucky = [replace(r, seed=1, key=r.key + "1", result=r.result | {"loss": 1.0}) for r in records if is_mha(r)]
    found = {f.subject: f for f in report_scaling([*records, *lucky], tmp_path).findings}
    assert found["dma"].held is True
    more = [replace(r, config=r.config | {"learning_rate": 0.1}, key=r.key + "2") for r in records if is_mha(r)]
    assert {f.subject: f.held for f in report_scaling([*records, *more], tmp_path).findings}["dma"] is True
    ours = [replace(r, config=r.config | {"learning_rate": 0.1}, key=r.key + "2") for r in records if not is_mha(r)]
    found = {f.subject: f for f in report_scaling([*records, *ours], tmp_path).findings}
    assert "not compared with mha" in found["dma"].measured


def is_mha(record: Record) -> bool:
    return variant_name(record.config) == "mha"


def test_speeds_of_shared_devices_are_not_compared(tmp_path: Path) -> None:
    records = _scaling(lambda *_: 3.0)
    tables = {}
    for device in ("a GPU", "a GPU (3 runs at a time)"):
        loss, _, speed = report_scaling([replace(r, device=device) for r in records], tmp_path).exhibits
        tables[device] = ("tokens/s, largest" in loss.table[0], "do not compare" in speed.text)
    assert tables == {"a GPU": (True, False), "a GPU (3 runs at a time)": (False, True)}


def test_locality_needs_both_the_beginning_and_the_end(tmp_path: Path) -> None:
    final = {"dma": 2.0, "dma, paper": 2.0, "swa": 2.2, "mha": 2.1}
    early = {"dma": 3.0, "dma, paper": 3.2, "swa": 3.1, "mha": 3.5}
    section = report_locality(
        _records(
            "locality",
            LOCALITY.configs("smoke"),
            lambda name, _: final.get(name, 2.5),
            lambda name, _: early.get(name, 3.5),
        ),
        tmp_path,
    )
    found = {finding.subject: finding for finding in section.findings if finding.claim == "locality"}
    assert found["dma"].held is True
    assert "+0.100 nats below swa at step 100, +0.100 below mha at the end" in found["dma"].measured
    assert found["dma, paper"].held is False
    assert (tmp_path / "locality.svg").exists()
    short = _records("locality", LOCALITY.configs("smoke"), lambda name, _: 2.0)
    for record in short:
        record.result["curve"] = [{"step": 3, "tokens": 1, "loss": 2.0}]
    assert {each.held for each in report_locality(short, tmp_path).findings if each.claim == "locality"} == {None}


def test_a_choice_pays_if_the_form_beats_its_control(tmp_path: Path) -> None:
    for form, seeds, held in ((2.0, 2, True), (2.0, 1, None), (2.3, 1, False), (None, 2, None)):
        losses = {"dma, gate_init delta": form, "dma, no choice, gate_init delta": 2.2}
        configs = [config | {"seed": seed} for seed in range(seeds) for config in LOCALITY.configs("smoke")]
        records = _records("locality", configs, lambda name, _, own=losses: own.get(name, 2.5))
        section = report_locality(records, tmp_path)
        (found,) = (each for each in section.findings if each.claim == "choice")
        assert (found.subject, found.held) == ("dma, gate_init delta", held)
        assert len(found.keys) == 2 * seeds
        assert not any("no choice" in each.subject for each in section.findings)


def test_pictures_are_the_same_twice(tmp_path: Path) -> None:
    records = _scaling(lambda name, width: 3.0 + len(name) / 100)
    for folder in ("one", "two"):
        report_scaling(records, tmp_path / folder)
    one, two = ((tmp_path / folder / "scaling.svg").read_bytes() for folder in ("one", "two"))
    assert one == two
