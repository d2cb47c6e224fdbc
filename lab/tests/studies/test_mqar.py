"""The MQAR experiment: the sweeps it names, the model it builds, and that its training can learn."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask_lab.studies import MQAR, Record, run_key
from dynamask_lab.studies.mqar.data import mqar_examples
from dynamask_lab.studies.mqar.study import (
    LEARNING_RATES,
    MqarConfig,
    answer_logits,
    build_model,
    mixer_name,
    mqar_cost,
    mqar_summary,
    run_mqar,
)
from dynamask_lab.studies.mqar.whole_texts import attend_whole, whole_texts
from dynamask_lab.sweeps.verdicts import mean_interval

MIXERS: list[dict[str, Any]] = [
    {"attention": "mha"},
    {"attention": "mla"},
    {"attention": "swa", "window": 8},
    {"attention": "nsa", "window": 8},
    {"attention": "dma", "window": 8},
    {"attention": "dma", "window": 8, "local": 0, "recency": 0.0},
]


def easy(**settings: Any) -> dict[str, Any]:
    """One pair: what is asked for is the second token."""
    shape = {"width": 32, "heads": 1, "vocab_size": 32, "train": [[8, 1, 1024]], "test": [[8, 1, 128]]}
    return asdict(MqarConfig(**{**shape, "batch_size": 32, "epochs": 8, "learning_rate": 1e-2, **settings}))


@pytest.mark.parametrize("mixer", MIXERS, ids=mixer_name)
def test_every_mixer_learns_to_recall_one_pair(mixer: dict[str, Any]) -> None:
    told: list[float] = []
    result = run_mqar(easy(**mixer), lambda share, note: told.append(share))
    assert result["accuracy"] > 0.9
    assert result["slices"] == [{"length": 8, "pairs": 1, "accuracy": result["accuracy"]}]
    assert len(result["history"]) == result["epochs"]
    assert result["history"][0]["loss"] > result["loss"] or result["epochs"] == 1
    assert told == sorted(told)
    assert told[-1] <= 1
    json.dumps(result, allow_nan=False)


def test_training_stops_where_it_is_told_to_and_a_run_repeats() -> None:
    once = run_mqar(easy(attention="mha", stop_at=0.9), lambda share, note: None)
    assert once["epochs"] < 8
    assert once["accuracy"] > 0.9 >= max((epoch["accuracy"] for epoch in once["history"][:-1]), default=0.0)
    torch.rand(3)  # the state of torch's generator is not the run's
    before = torch.get_rng_state()
    assert run_mqar(easy(attention="mha", stop_at=0.9), lambda share, note: None) == once
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_at_the_queries_are_the_models_own() -> None:
    settings = MqarConfig("dma", window=8, width=32, heads=1, vocab_size=64)
    torch.manual_seed(0)
    model = build_model(settings).eval()
    data = mqar_examples(3, 32, 4, vocab_size=64)
    asked = answer_logits(model, data.inputs, data.queries)
    every = model(input_ids=data.inputs.long()).logits
    assert asked.shape == (3, 4, 64)
    for row in range(3):
        torch.testing.assert_close(asked[row], every[row, data.queries[row]])


def test_the_model_is_two_layers_of_the_mixer_and_nothing_else() -> None:
    model = build_model(MqarConfig("mha", width=128, heads=2))
    names = {name.split(".")[3] for name, p in model.named_parameters() if ".layers." in name and p.numel()}
    assert names == {"mixer", "mixer_norm", "mlp_norm"}
    assert len(model.model.layers) == 2
    assert model.config.head_dim == 64
    paper = build_model(MqarConfig("dma", window=16, local=0, recency=0.0))
    assert (paper.config.mixer_options["local"], paper.config.mixer_options["recency"]) == (0, 0.0)
    assert not hasattr(paper.model.layers[0].mixer.gate, "log_recency")
    ours = build_model(MqarConfig("dma", window=16))
    assert (ours.config.mixer_options["local"], ours.config.mixer_options["recency"]) == (8, 1 / 16)


def test_accuracy_of_a_model_that_knows_nothing_is_chance() -> None:
    result = run_mqar(
        easy(attention="mha", learning_rate=1e-12, epochs=1, test=[[8, 1, 2000]]), lambda share, note: None
    )
    assert result["accuracy"] < 0.15


def test_the_named_sweeps_are_the_published_ones() -> None:
    assert pytest.approx(LEARNING_RATES) == [1e-4, 10 ** (-4 + 2 / 3), 10 ** (-4 + 4 / 3), 1e-2]
    for size in MQAR.sizes:
        configs = MQAR.configs(size)
        sharp = "from dense, ranked by attention^4"
        forms = {"dma", "dma, paper", "dma, ranked by attention", f"dma, {sharp}", f"dma, uneven windows, {sharp}"}
        forms.add("swa, uneven windows")
        if size not in ("probe", "published", "decide", "widths", "patient-dense", "patient"):
            assert {mixer_name(config) for config in configs} == {"mha", "mla", "swa", "nsa", *forms}
        assert len({json.dumps(config) for config in configs}) == len(configs)
        for config in configs:
            assert MqarConfig.of(json.loads(json.dumps(config))).plain() == config, (
                "plain JSON, nothing left to defaults"
            )
            assert (config["window"] is None) == (config["attention"] in ("mha", "mla"))
            assert config["width"] // config["heads"] <= 64
            assert mqar_cost(config) > 0
    published = MQAR.configs("published")
    assert {pairs for _, pairs, _ in published[0]["test"]} == {512}
    assert {config["window"] for config in published} == {None, 512}
    assert {config["width"] for config in published} == {32, 64, 128, 256}
    keys = {run_key("mqar", config) for config in published}
    assert all(run_key("mqar", config) in keys for config in MQAR.configs("widths"))
    assert {config["epochs"] for config in MQAR.configs("patient")} == {16}
    paper = MQAR.configs("paper")
    assert {config["width"] for config in paper} == {64, 128, 256, 512}
    assert [4096, 256, 20_000] in paper[0]["train"]
    assert max(length for length, _, _ in paper[0]["test"]) == 4096
    assert {config["vocab_size"] for config in paper} == {8192}
    assert {config["power"] for config in paper} == {0.1}


def test_what_decides_goes_on_from_the_published_sweep() -> None:
    configs = MQAR.configs("decide")
    published = {json.dumps(config) for config in MQAR.configs("published")}
    started = [config for config in configs if mixer_name(config).endswith(", from dense")]
    assert {json.dumps(config) for config in configs} <= published
    assert {config["seed"] for config in started if config["width"] == 128} == {0, 1, 2}
    for config in started:
        assert config["window"] * config["window_schedule"][0][1] == max(length for length, *_ in config["train"])
        assert config["window_schedule"][-1] == [0.5, 1.0]
    names = {mixer_name(config) for config in started}
    assert names == {
        "dma, learned, head windows, from dense",
        "dma, learned, slopes, head windows, from dense",
        "swa, sinks, from dense",
    }


def test_a_start_from_every_key_narrows_and_calibrates() -> None:
    form = {"attention": "dma", "ranking": "learned", "window": 4, "local": 2, "sinks": 1, "calibrate_at": 0.5}
    schedule = [[0.0, 4.0], [0.375, 2.0], [0.5, 1.0]]
    config = easy(**form, window_schedule=schedule, train=[[16, 2, 64]], test=[[16, 2, 8]], epochs=4, stop_at=2.0)
    assert mixer_name(config) == "dma, learned, head windows, from dense"
    result = run_mqar(config, lambda share, note: None)
    assert np.mean(result["head_windows"]) == 4


def test_windows_shrink_while_it_trains_and_tests_are_at_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []

    def watched(model: Any, *batch: Any) -> torch.Tensor:
        seen.append((model.training, model.model.layers[0].mixer.max_window))
        return answer_logits(model, *batch)

    monkeypatch.setattr("dynamask_lab.studies.mqar.study.answer_logits", watched)
    schedule = [[0.0, 4.0], [0.5, 2.0], [0.75, 1.0]]
    run_mqar(easy(attention="dma", window=3, window_schedule=schedule, epochs=4, stop_at=2.0), lambda share, note: None)
    trained = [window for training, window in seen if training]
    quarter = len(trained) // 4
    assert trained == [12] * (2 * quarter) + [6] * quarter + [3] * quarter
    assert {window for training, window in seen if not training} == {3}


def test_a_schedule_that_does_not_rise_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="rising order"):
        MqarConfig("swa", window=4, window_schedule=[[0.5, 2.0], [0.0, 4.0]])


def test_the_probes_forms_have_names_of_their_own() -> None:
    names = [mixer_name(config) for config in MQAR.configs("probe")]
    shrinking = ["dma, from dense", "dma, from dense, ranked by attention", "dma, from dense, ranked by attention^4"]
    assert names == ["mha", "swa", "dma", "dma, ranked by attention", *shrinking]


def test_batches_hold_the_published_number_of_tokens() -> None:
    settings = MqarConfig("mha")
    assert [settings.batch(length) for length in (64, 256, 512, 1024, 4096)] == [256, 256, 128, 64, 16]
    assert settings.steps([[64, 4, 257], [4096, 256, 16]]) == 3


def test_cost_grows_with_the_work() -> None:
    base = easy(attention="swa", window=4)
    for more in ({"window": 8}, {"width": 64}, {"epochs": 9}, {"train": [[8, 1, 4096]]}, {"test": [[16, 1, 4096]]}):
        assert mqar_cost({**base, **more}) > mqar_cost(base)
    assert MQAR.kind({**base, "learning_rate": 1.0, "seed": 4}) == MQAR.kind(base) != MQAR.kind({**base, "window": 8})


def test_the_summary_takes_the_best_learning_rate_after_averaging_seeds() -> None:
    def record(rate: float, seed: int, accuracy: float) -> Record:
        config = {"width": 64, "window": None, "attention": "mha", "learning_rate": rate, "seed": seed}
        part = {"length": 64, "pairs": 4, "accuracy": accuracy / 2}
        return Record("mqar", f"{rate}{seed}", config, seed, {"accuracy": accuracy, "slices": [part]}, 1, "", {}, None)

    [row] = mqar_summary([record(1e-3, 0, 0.5), record(1e-3, 1, 0.7), record(1e-2, 0, 0.9), record(1e-2, 1, 0.1)])
    assert row == {
        **{"width": "64", "window": "all", "mixer": "mha"},
        **{"rate": "1.0e-03 of 2", "accuracy": "0.600", "4/64": "0.300"},
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flash"}, "attention must be one of"),
        ({"attention": "swa"}, "give it a window"),
        ({"attention": "mha", "width": 30, "heads": 4}, "multiple of twice the heads"),
        ({"attention": "mha", "epochs": 0}, "epochs must be at least 1"),
        ({"attention": "mha", "train": [[64, 4]]}, "a segment is"),
        ({"attention": "mha", "test": []}, "at least one segment"),
        ({"attention": "mha", "windw": 4}, "did you mean 'window'"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        MqarConfig.of(settings)


@pytest.mark.parametrize("slopes", [None, [0.01]])
def test_learned_ranks_run_under_autocast(slopes: list[float] | None) -> None:
    form = {"attention": "dma", "ranking": "learned", "window": 8, "local": 2, "sinks": 1, "calibrate_at": 0.5}
    config = easy(**form, slopes=slopes, precision="bfloat16", train=[[16, 1, 64]], epochs=1)
    result = run_mqar(config, lambda share, note: None)
    assert np.mean(result["head_windows"]) == 8
    model = build_model(MqarConfig.of(config))
    assert all(bool(layer) == bool(slopes) for layer in model.config.head_slopes)


@pytest.mark.parametrize("form", [{"attention": "swa"}, {"attention": "dma", "ranking": "learned", "local": 2}])
@pytest.mark.parametrize("window", [8, 16])
def test_texts_that_windows_hold_whole_have_the_same_answers(form: dict[str, Any], window: int) -> None:
    torch.manual_seed(0)
    model = build_model(MqarConfig.of(easy(**form, window=window, sinks=1)))
    data = mqar_examples(3, 16, 2, vocab_size=32)

    def answers() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        logits = answer_logits(model, data.inputs, data.queries)
        logits.square().sum().backward()
        return logits, model.model.layers[0].mixer.q_proj.weight.grad.clone()

    plain = answers()
    with whole_texts():
        torch.testing.assert_close(answers(), plain)
    assert model.model.layers[0].mixer.forward.__globals__["attend"] is not attend_whole


def test_a_segment_that_cannot_hold_its_questions_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="need 2048 tokens"):
        MqarConfig("mha", train=[[1024, 512, 1]])


def test_repeated_cells_agree_with_their_seeds() -> None:
    results = Path(__file__).parents[2] / "results"
    quick = [json.loads(line) for line in (results / "mqar-quick.jsonl").read_text().splitlines()]
    for again in map(json.loads, (results / "again" / "cells.jsonl").read_text().splitlines()):
        alike = [run["result"]["accuracy"] for run in quick if run["config"] | {"seed": 0} == again["config"]]
        assert len(alike) == 3
        interval = mean_interval(alike)
        low, high = min(interval.low, *alike), max(interval.high, *alike)
        assert low <= again["result"]["accuracy"] <= high
