"""The needle experiment: its sweep end to end, resuming, upcycling, and what its figures say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask.evaluation.retrieval import RetrievalScore
from dynamask.mixers import MIXERS
from dynamask.models import DynamaskConfig, DynamaskForCausalLM
from dynamask_lab.language import engine as language
from dynamask_lab.language.data import CORPORA_FOLDER, token_streams
from dynamask_lab.language.engine import STATE_FOLDER, run_language
from dynamask_lab.report.pictures import LARGEST, pictures
from dynamask_lab.studies import NEEDLE, Record, run_key, run_sweep
from dynamask_lab.studies.judged import NEEDLE as FORMS
from dynamask_lab.studies.needle import report
from dynamask_lab.studies.needle.data import mixture_tokenizer, prepare_mixture
from dynamask_lab.studies.needle.forced import _likeliest
from dynamask_lab.studies.needle.levers import LEVERS, lever_mixers
from dynamask_lab.studies.needle.report import report_needle, without_choice
from dynamask_lab.studies.needle.study import NeedleConfig, needle_name, run_needle
from dynamask_lab.sweeps.section import Finding
from dynamask_lab.sweeps.verdicts import NO_DIFFERENCE, NOT_TESTED, REFUTED, REPRODUCED

PLAIN, BEST = FORMS[0].name, FORMS[2].name


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture(autouse=True)
def _folders(corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORPORA_FOLDER, str(corpora))
    monkeypatch.setenv(STATE_FOLDER, str(tmp_path / "state"))


def _smoke(name: str) -> dict[str, Any]:
    return next(config for config in NEEDLE.configs("smoke") if needle_name(config) == name)


def _quiet(share: float, note: str) -> None:
    pass


def test_the_smoke_sweep_tests_every_model_at_every_cell(tmp_path: Path) -> None:
    configs = NEEDLE.configs("smoke")
    report = run_sweep("needle", configs, tmp_path / "needle.jsonl")
    assert not report.failed
    settings = NeedleConfig.of(configs[0])
    cells = len(settings.tasks) * len(settings.lengths) * len(settings.depths)
    scores = [score for record in report.records for score in record.result["scores"]]
    models = {score["model"] for score in scores}
    ranked = {"dma, ranked by attention", "dma, gentle, ranked by attention", "dma, upcycled, ranked by attention^4"}
    from_dense = {f"dma, from dense{ranks}" for ranks in ("", ", ranked by attention", ", ranked by attention^4")}
    mixed = {f"{name}, one layer in four dense" for name in ("dma", "swa")}
    mixed.add("dma, one layer in four dense, gentle, ranked by attention")
    mixed |= {"swa, windows 32", "dma, windows 32, from dense, ranked by attention^4"}
    far = {"mha, no RoPE in 1 of 2 layers", "swa, windows 8/56, no RoPE in 1 of 2 layers"}
    far.add("dma, windows 8/56, no RoPE in 1 of 2 layers, from dense, ranked by attention^4")
    assert models == {"mha", "dma, upcycled", "dma", "dma, gentle", "dma, paper", *ranked, *from_dense, *mixed, *far}
    assert len(scores) == cells * len(models)
    assert not list((tmp_path / "state").glob("*")), "trained models are deleted after the test"
    section = report_needle(report.records, tmp_path / "pictures")
    assert (tmp_path / "pictures" / "needle.png").stat().st_size <= LARGEST
    assert len(section.exhibits[0].table) == len(models)
    assert {finding.verdict for finding in section.findings} == {NOT_TESTED}  # two steps teach nobody to retrieve


def test_a_run_stopped_while_it_is_tested_does_not_train_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _smoke("dma")
    shares: list[float] = []

    def stop(share: float, note: str) -> None:
        shares.append(share)
        if "passkey" in note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_needle(config, stop)
    assert 0.8 < shares[-1] < 1
    monkeypatch.setattr(language, "run_language", lambda *_: pytest.fail("trained again"))
    result = run_needle(config, _quiet)
    assert result["loss"]["dma"] > 0
    assert result["seconds"] > 0


def test_the_mixture_is_made_once_and_holds_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = NeedleConfig.of(_smoke("mha")).mixture
    name = prepare_mixture(settings)
    text = mixture_tokenizer(name).decode(token_streams(name).train)
    assert text.count("What is the pass key? The pass key is") > 5
    monkeypatch.setattr("dynamask_lab.studies.needle.data.prepare", lambda *_, **__: pytest.fail("prepared again"))
    assert prepare_mixture(settings) == name
    assert dataclasses.replace(settings, seed=1).name != name


def test_the_folder_of_a_mixture_does_not_choose_what_is_held_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = dataclasses.replace(NeedleConfig.of(_smoke("mha")).mixture, tokens=5000)
    found = []
    for folder in ("one", "another"):
        monkeypatch.setenv(CORPORA_FOLDER, str(tmp_path / folder))
        found.append(token_streams(prepare_mixture(settings)))
    assert found[0].content == found[1].content
    np.testing.assert_array_equal(found[0].validation, found[1].validation)


def test_an_upcycled_model_starts_as_the_dense_one() -> None:
    settings = NeedleConfig.of({**_smoke("mha"), "upcycle_window": 440})
    corpus = prepare_mixture(settings.mixture)
    dense = dataclasses.asdict(settings.language(corpus))
    expected = run_language(dense, _quiet)["loss"]
    still = dataclasses.replace(settings.upcycled(corpus, "score"), learning_rate=1e-12, steps=1)
    folder = language.state_folder(dense) / "model"
    assert run_language(dataclasses.asdict(still), _quiet, folder)["loss"] == pytest.approx(expected, abs=1e-5)
    other = dataclasses.replace(still, width=64)
    with pytest.raises((InvalidInputError, RuntimeError), match=r"shape|size mismatch"):
        run_language(dataclasses.asdict(other), _quiet, folder)


def _record(model: str, exact: dict[int, float]) -> Record:
    config = _smoke(model)
    common = {"model": model, "task": "passkey", "recall": 0.0, "samples": 20}
    scores = [common | {"length": n, "depth": d, "exact": value} for n, value in exact.items() for d in (0.0, 0.5)]
    scores += [common | {"length": n, "depth": 1.0, "exact": 1.0} for n in exact]
    result = {"scores": scores, "loss": {model: 1.0}}
    return Record("needle", run_key("needle", config), config, 0, result, 1.0, "a GPU", {}, None)


def _named(model: str, exact: dict[int, float], **config: Any) -> Record:
    record = _record("mha" if model == "mha" else "dma", exact)
    scores = [score | {"model": model} for score in record.result["scores"]]
    own = record.config | config
    return dataclasses.replace(record, key=model, config=own, result={"scores": scores, "loss": {model: 1.0}})


def test_verdicts_follow_the_scores(tmp_path: Path) -> None:
    """Trained at 440 tokens: level inside, ahead beyond. What is next to the question, anybody finds."""

    def verdicts(*records: Record) -> dict[str, Finding]:
        with pictures(drawn=False):
            return {f.subject: f for f in report_needle(list(records), tmp_path).findings}

    mha, dma = _named("mha", {256: 0.9, 512: 0.2}), _named(PLAIN, {256: 0.2, 512: 0.6})
    found = verdicts(mha, dma)
    assert found[f"{PLAIN}, to 440 tokens"].verdict == REFUTED
    assert found[f"{PLAIN}, beyond the trained length"].verdict == REPRODUCED
    assert "60.0% of the answers exact, mha 20.0%: +40.0 [+2" in found[f"{PLAIN}, beyond the trained length"].measured
    one_seed = found[f"{PLAIN}, beyond the trained length"]
    assert one_seed.difference.endswith("points over answers")
    assert one_seed.setting["task"] == "440 tokens"
    close = verdicts(_named("mha", {512: 0.25}), _named(PLAIN, {512: 0.3}))
    assert close[f"{PLAIN}, beyond the trained length"].verdict == NOT_TESTED  # five points, twenty samples a cell
    level = verdicts(_named("mha", {256: 1.0}), _named(PLAIN, {256: 1.0}))
    assert level[f"{PLAIN}, to 440 tokens"].verdict == NO_DIFFERENCE
    assert {f.verdict for f in verdicts(dma).values()} == {NOT_TESTED}
    poor = verdicts(_named("mha", {256: 0.0}), _named(PLAIN, {256: 0.05}))
    assert {f.verdict for f in poor.values()} == {NOT_TESTED}


def test_mistakes_are_named() -> None:
    with pytest.raises(InvalidInputError, match="did you mean 'samples'"):
        NeedleConfig.of({"attention": "mha", "sample": 3})
    with pytest.raises(InvalidInputError, match="upcycling starts from attention='mha'"):
        NeedleConfig("dma", window=8, upcycle_steps=3, upcycle_window=8)
    with pytest.raises(InvalidInputError, match="half of the context"):
        NeedleConfig("mha", context=512)
    with pytest.raises(InvalidInputError, match="unknown retrieval task"):
        NeedleConfig("mha", tasks=["needles"])


def test_a_choice_of_keys_is_held_against_what_keeps_as_many_without(tmp_path: Path) -> None:
    """Against sliding windows just as wide, inside the widest window and beyond it."""
    windows = {"window": 96, "layer_windows": [32, 160], "layers": 2}
    control = without_choice(BEST)
    assert control == "swa, windows 32/320"
    found = {160: 0.9, 320: 0.8}  # the needle of 320 tokens lies beyond 160 at depth 0 and within them at depth 0.5
    records = [_named(BEST, found, **windows), _named(control, {160: 0.9, 320: 0.1}, **windows), _named("mha", found)]
    with pictures(drawn=False):
        section = report_needle(records, tmp_path)
    verdicts = {f.subject: f for f in section.findings if f.claim == "retrieval"}
    assert verdicts[f"{BEST}, beyond the window"].verdict == REPRODUCED
    assert "over 1 cells" in verdicts[f"{BEST}, beyond the window"].measured
    assert "over 3 cells" in verdicts[f"{BEST}, inside the window"].measured
    assert verdicts[f"{BEST}, inside the window"].setting["w/N"].startswith("0.22 (widest layer 160 of 440 keys")
    (table,) = (exhibit.table for exhibit in section.exhibits if exhibit.name == "window")
    rows = {row["model"]: row for row in table}
    assert rows[control]["beyond the window"] == "10%"
    assert rows[control]["mha beyond the window"] == "80%"


def test_forced_scores_take_the_answer_that_decoding_gives() -> None:
    config = DynamaskConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attention="mha",
        windows=64,
    )
    torch.manual_seed(0)
    model = DynamaskForCausalLM(config).eval()
    prompts = [torch.randint(64, (length,)).tolist() for length in (9, 12)]
    examples = [
        SimpleNamespace(
            prompt=prompt,
            answer=model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[
                0, len(prompt) :
            ].tolist(),
        )
        for prompt, count in zip(prompts, (3, 2), strict=True)
    ]
    assert _likeliest(model, examples) == [example.answer for example in examples]
    examples[0].answer[0] = (examples[0].answer[0] + 1) % 64
    assert _likeliest(model, examples)[0] != examples[0].answer


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_stays_causal_and_leaves_the_mixers_as_they_were(lever: str) -> None:
    before = dict(MIXERS)
    for attention in ("mha", "dma"):
        with lever_mixers(lever):
            config = DynamaskConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                attention=attention,
                windows=6,
                local=2,
                sinks=1,
                slopes=[[0.01]] * 2 if attention == "dma" else None,
                max_position_embeddings=16,
            )
            torch.manual_seed(0)
            model = DynamaskForCausalLM(config).eval()
        tokens = torch.randint(64, (1, 24))
        changed = tokens.clone()
        changed[:, 20:] = 0
        with torch.no_grad():
            first, second = (
                model.model(input_ids=each, use_cache=False).last_hidden_state for each in (tokens, changed)
            )
        torch.testing.assert_close(first[:, :20], second[:, :20])
        assert not torch.equal(first[:, 20:], second[:, 20:])
    assert before == MIXERS
    with pytest.raises(InvalidInputError, match="forced"):
        NeedleConfig("mha", lever=lever)


def test_levers_come_one_at_a_time_on_three_seeds() -> None:
    configs = NEEDLE.configs("levers")
    names = {needle_name(config) for config in configs}
    level = "dma, learned, windows 16/352"
    assert names == {
        *(level, "mha", f"{level}, from wide"),
        *(f"{form}, {lever}" for form in (level, "mha") for lever in (*LEVERS, "longer examples")),
    }
    for name in names:
        assert [config["seed"] for config in configs if needle_name(config) == name] == [0, 1, 2]
    assert {needle_name(config) for config in NEEDLE.configs("levers-smoke")} == names
    assert {str(config) for config in configs} <= {str(config) for config in NEEDLE.configs("far")}


def test_models_are_paired_on_one_mixture_before_others() -> None:
    def run(model: str, seed: int, content: str, exact: float) -> Record:
        scores = [{"task": "single_needle", "length": 512, "depth": 0.0, "model": model, "exact": exact}]
        result = {"scores": scores, "corpus": "needle", "corpus_content": content}
        return Record("needle", f"{model}{seed}{content}", {}, seed, result, 1.0, "gpu", {}, None)

    cell = RetrievalScore("chosen", "single_needle", 512, 0.0, 0.0, 0.0, 1)
    cells = [cell, dataclasses.replace(cell, model="plain"), dataclasses.replace(cell, model="longer")]
    runs = [run("plain", seed, "old", 0.1) for seed in (0, 1, 2)] + [run("plain", seed, "new", 0.5) for seed in (0, 1)]
    seeds = report._by_seed([*runs, *(run("chosen", seed, "new", 0.6 + 0.1 * seed) for seed in (0, 1, 2))])
    ours, theirs, gain = report._over_seeds("chosen", "plain", cells, seeds)  # type: ignore[misc]
    assert (ours, theirs, gain.mean) == (pytest.approx(0.65), pytest.approx(0.5), pytest.approx(0.15))
    seeds = report._by_seed([*runs, *(run("longer", seed, "longer", 0.7) for seed in (0, 1, 2))])
    _, theirs, gain = report._over_seeds("longer", "plain", cells, seeds)  # type: ignore[misc]
    assert theirs == pytest.approx((0.3 + 0.3 + 0.1) / 3)
    assert gain.low < gain.mean == pytest.approx(0.7 - 0.7 / 3)
    assert report._over_seeds("chosen", "longer", cells, seeds) is None


def _lever_run(model: str, seed: int, within: float, beyond: float, loss: float, content: str = "one") -> Record:
    config = {**_smoke("mha"), "context": 1024, "batch_tokens": 1024}
    if model.startswith("dma"):
        config |= {"attention": "dma", "layers": 2, "layer_windows": [16, 352], "window": 184, "upcycle_steps": 0}
    cells = [("single_needle", 1024, within), ("single_needle", 2048, beyond)]
    common = {"model": model, "depth": 0.0, "recall": 0.0, "samples": 50}
    scores = [common | {"task": task, "length": length, "exact": exact} for task, length, exact in cells]
    result = {"scores": scores, "loss": {model: loss}, "parameters": 10**7, "corpus": "n", "corpus_content": content}
    return Record("needle", f"{model} {seed}", config, seed, result, 1.0, "gpu", {}, None)


def test_levers_are_held_against_dense_attention_within_the_trained_length_and_beyond(tmp_path: Path) -> None:
    """No fewer and more: both must hold. The loss stands beside it, and controls that did not run are named."""
    level = "dma, learned, windows 16/352"
    means = {
        "mha": (0.5, 0.1, 1.0),
        level: (0.4, 0.1, 1.1),
        f"{level}, drope": (0.6, 0.9, 1.4),
        f"{level}, ssmax": (0.3, 0.9, 1.1),
        f"{level}, forget": (0.5, 0.1, 1.1),
        "mha, ssmax": (0.55, 0.2, 1.0),
        "mha, drope": (0.0, 0.0, 2.0),
    }
    runs = [
        _lever_run(model, seed, within + 0.01 * seed, beyond + 0.01 * seed, loss + 0.1 * seed)
        for model, (within, beyond, loss) in means.items()
        for seed in (0, 1, 2)
    ]
    with pictures(drawn=False):
        section = report_needle(runs, tmp_path)
    found = {finding.subject: finding for finding in section.findings if finding.claim == "lever-dense"}
    assert [finding.verdict for finding in found.values()] == [
        REPRODUCED,
        REFUTED,
        NO_DIFFERENCE,
        NOT_TESTED,
        NOT_TESTED,
    ]
    drope = found[f"{level}, drope"]
    assert "mha 51.0% (mha, ssmax: 56.0%): +10.0 [" in drope.measured
    assert "loss above mha's: +0.400 [+0.400, +0.400] nats, above that of dma, learned" in drope.measured
    assert drope.difference.startswith("+10.0 [+10.0, +10.0] points to 1024 tokens; beyond: +80.0 [")
    assert {finding.measured for subject, finding in found.items() if finding.role == "control"} == {"not run"}
    (costs,) = (exhibit.table for exhibit in section.exhibits if exhibit.name == "lever-losses")
    rows = {row["model"]: row for row in costs}
    assert rows[f"{level}, drope"]["each seed above the same form"] == "+0.300, +0.300, +0.300"
    assert rows["mha, drope"]["above the same form"] == "+1.000 [+1.000, +1.000]"
    other = [dataclasses.replace(run, result=run.result | {"corpus_content": "two"}) for run in runs[6:9]]
    with pictures(drawn=False):
        section = report_needle([*runs[:6], *other], tmp_path)
    (drope,) = (f for f in section.findings if f.claim == "lever-dense" and f.role == "best")
    assert drope.difference.endswith("loss not compared: other texts")
