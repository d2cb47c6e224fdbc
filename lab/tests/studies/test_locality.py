"""The locality and scaling experiments: fair sweeps, names that tell runs apart, rates that follow from results."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask_lab.language.engine import (
    STATE_FOLDER,
    LanguageConfig,
    build_model,
    parameter_counts,
    training_flops,
)
from dynamask_lab.legacy import set_window
from dynamask_lab.studies import LOCALITY, SCALING, Experiment, Record, run_key, run_sweep
from dynamask_lab.studies.locality.study import locality_summary, variant_name
from dynamask_lab.studies.scaling.study import PLANS, SHAPES, scaling_summary


def record(
    config: dict[str, Any], loss: float | None, experiment: Experiment = LOCALITY, flops: float = 1e15
) -> Record:
    curve = [{"step": 25, "tokens": 100, "loss": 5.0}, {"step": 40, "tokens": 160, "loss": loss}]
    positions = [{"from": 0, "to": 64, "loss": loss}]
    result = {"loss": loss, "curve": curve, "positions": positions, "flops": flops, "tokens_per_second": 10.0}
    key = run_key(experiment.name, config)
    return Record(experiment.name, key, config, config["seed"], result, 1.0, "device", {}, None)


@pytest.mark.parametrize("experiment", [LOCALITY, SCALING], ids=lambda e: e.name)
def test_every_size_holds_runs_that_differ_and_names_that_tell_mechanisms_apart(experiment: Experiment) -> None:
    for size in experiment.sizes:
        configs = experiment.configs(size)
        assert len({run_key(experiment.name, config) for config in configs}) == len(configs)
        # Seeds, rates and corpora do not show in a mechanism's name, anything else must.
        apart = ("seed", "learning_rate", "corpus")
        mechanisms = {str([(k, v) for k, v in config.items() if k not in apart]) for config in configs}
        assert len({variant_name(config) for config in configs}) == len(mechanisms)
        assert all(experiment.cost(config) > 0 for config in configs)


@pytest.mark.parametrize("size", ["quick", "chinchilla", "small", "paper"])
def test_locality_is_fair(size: str) -> None:
    configs = [LanguageConfig.of(config) for config in LOCALITY.configs(size)]
    assert all(sum(config.layer_windows) == config.window * config.layers for config in configs if config.layer_windows)
    # A form that sees everything is the ceiling for the others, and no rival.
    assert {config.length // config.window for config in configs if config.window} - {1} == {16}
    shared = ("total_steps", "batch_tokens", "length", "parameters", "validation_tokens", "warmup", "weight_decay")
    assert all(len({getattr(config, name) for config in configs}) == 1 for name in shared)
    # As many rates and seeds for a rival as for any form of dma.
    tried = Counter(variant_name(config) for config in LOCALITY.configs(size))
    assert len(set(tried.values())) == 1
    penalised = {config.mixers[0] for config in configs if config.distance_penalty}
    assert penalised == {"swa", "mha"}
    assert all(config.distance_penalty in (0.0, 1 / config.length * 16) for config in configs)


@pytest.mark.parametrize(
    ("size", "shape"), [*(("paper", shape) for shape in SHAPES), *(("quick", shape) for shape in PLANS["quick"].shapes)]
)
def test_scaling_is_parameter_matched(size: str, shape: str) -> None:
    counts = {}
    for mechanism in PLANS[size].mechanisms:
        config = PLANS[size].config(mechanism, shape, 0, 1e-3)
        with torch.device("meta"):  # weights without numbers: only their shapes are asked for
            model = build_model(LanguageConfig.of(config), 64)
        counts[variant_name(config)] = parameter_counts(model)["non_embedding"]
    assert all(abs(count / counts["mha"] - 1) < 0.02 for count in counts.values()), counts
    assert counts["mha"] == pytest.approx(float(shape.removesuffix("M")) * 1e6, rel=0.11)


@pytest.mark.parametrize("size", ["quick", "paper"])
def test_scaling_trains_every_size_on_twenty_tokens_a_parameter(size: str) -> None:
    plan = PLANS[size]
    for shape in plan.shapes:
        runs = [LanguageConfig.of(plan.config(mechanism, shape, 0, 1e-3)) for mechanism in plan.mechanisms]
        (tokens,) = {run.total_steps * run.batch_tokens for run in runs}
        assert tokens / runs[0].parameters == pytest.approx(20, rel=0.01)
        assert {run.length // run.window for run in runs if run.window} == {8}
        assert runs[0].heads == 2 * runs[0].groups


def test_scaling_follows_the_best_rate_of_each_mixer() -> None:
    plan = PLANS["paper"]
    tuning = SCALING.configs("paper")
    assert len(tuning) == len(plan.mechanisms) * len(plan.rates)
    mha = [config for config in tuning if config["attention"] == "mha"]
    some = [record(config, 3.0 - 0.1 * i, SCALING) for i, config in enumerate(mha[:-1])]
    assert SCALING.configs("paper", some) == tuning  # a rate is missing
    complete = [*some, record(mha[-1], None, SCALING)]  # the highest diverged
    more = SCALING.configs("paper", complete)[len(tuning) :]
    assert {config["attention"] for config in more} == {"mha"}
    assert [(config["width"], config["seed"]) for config in more] == [(256, 1), (384, 0), (384, 1), (512, 0), (640, 0)]
    best = mha[2]["learning_rate"]
    assert more[0]["learning_rate"] == best
    assert more[-1]["learning_rate"] == pytest.approx(best * (256 / 640) ** 0.5)


def test_scaling_shows_the_loss_of_every_size() -> None:
    records = []
    for place, shape in enumerate(SHAPES):
        compute = 1e15 * 10**place
        for seed in (0, 1):
            config = PLANS["paper"].config({"attention": "mha"}, shape, seed, 1e-3)
            records.append(record(config, 20 * compute**-0.05, SCALING, flops=compute))
    (row,) = scaling_summary(records)
    assert row["4.4M"] == f"{20 * 1e15**-0.05:.4f}"


def test_summary_takes_the_best_rate_and_says_which_diverged() -> None:
    configs = [
        config
        for config in LOCALITY.configs("paper")
        if config["corpus"] == "code" and variant_name(config) in ("swa", "dma, paper")
    ]
    losses = {("swa", 1.5e-3): 3.0, ("swa", 3e-3): 2.5, ("dma", 1.5e-3): 4.0, ("dma", 3e-3): None}
    rows = locality_summary([record(c, losses[c["attention"], c["learning_rate"]]) for c in configs])
    assert [(row["mechanism"], row["final"], row["rate"], row["runs"]) for row in rows] == [
        ("swa", "2.5000", "3.0e-03 of 2", "2"),
        ("dma, paper", "4.0000", "1.5e-03 of 2", "2"),
    ]


def test_the_smoke_sweep_runs_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_FOLDER, str(tmp_path))
    configs = LOCALITY.configs("smoke")
    report = run_sweep(LOCALITY, configs, tmp_path / "results.jsonl")
    assert not report.failed
    assert len(report.records) == len(configs)
    assert all(3 < each.result["loss"] < 7 for each in report.records)
    rows = LOCALITY.summary(report.records)
    assert len(rows) == len(configs)
    by_name = {variant_name(each.config): each.result["loss"] for each in report.records}
    # An option that did not reach the model would leave a run equal to another; after three steps a few still are.
    assert len(set(by_name.values())) > 0.8 * len(by_name)
    assert by_name["dma, spread 8, gate_init delta"] != by_name["dma, spread 8"]
    assert by_name["mha, penalty"] != by_name["mha"]


def test_uneven_windows_count_and_scale_with_a_schedule() -> None:
    (config,) = (c for c in LOCALITY.configs("smoke") if c.get("layer_windows") and c["attention"] == "dma")
    uneven = LanguageConfig.of(config)
    with torch.device("meta"):
        model = build_model(uneven, 64)
    set_window(model, 2 * uneven.window)
    assert [layer.mixer.max_window for layer in model.model.layers] == [2 * window for window in uneven.layer_windows]
    even = dataclasses.replace(uneven, layer_windows=[uneven.window] * uneven.layers)
    plain = dataclasses.replace(uneven, layer_windows=None)
    assert training_flops(even, model) == training_flops(plain, model)
    single = dataclasses.replace(uneven, layer_windows=[1, uneven.length])
    pairs = sum(uneven.length if w == 1 else uneven.length * (uneven.length + 1) / 2 for w in single.layer_windows)
    gap = training_flops(single, model) - training_flops(plain, model)
    w = uneven.window
    kept = uneven.layers * (w * (w + 1) / 2 + (uneven.length - w) * w)
    tokens = uneven.total_steps * uneven.batch_tokens
    assert gap == pytest.approx(12.0 * uneven.width * (pairs - kept) / uneven.length * tokens)


@pytest.mark.parametrize(
    "fields", [{"layer_windows": [4]}, {"window": None, "layer_windows": [4, 4], "attention": "mha"}]
)
def test_uneven_windows_that_do_not_fit_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="layer_windows gives the window of each of the 2 layers"):
        LanguageConfig(**{"attention": "dma", "window": 4, "layers": 2, **fields})
