"""The ablation: that each variant changes the one thing it says, the sweep end to end, and its verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask.mixers import MIXERS, get_mixer
from dynamask.models import DynamaskForCausalLM
from dynamask_lab.language.engine import STATE_FOLDER
from dynamask_lab.studies import ABLATION, Record, run_key, run_sweep
from dynamask_lab.studies.ablation.mixers import ABLATIONS, ablation_mixers
from dynamask_lab.studies.ablation.report import report_ablation
from dynamask_lab.studies.ablation.study import LEAKY, ablation_name, run_ablation
from dynamask_lab.sweeps.verdicts import NO_DIFFERENCE, NOT_TESTED, REFUTED, REPRODUCED
from lab.tests.old_models import tiny_config, tiny_model

LENGTH = 40


def _model(name: str, **fields: object) -> DynamaskForCausalLM:
    """The ablated mixer with the weights of `tiny_model`'s dma, as far as they fit."""
    fields = {"local": 0, "recency": 0.0, **fields}
    with ablation_mixers():
        model = DynamaskForCausalLM(tiny_config(name, **fields)).double().eval()
    model.config.use_cache = False
    source = tiny_model("dma", **fields).state_dict()
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in source.items() if own[k].shape == v.shape}, strict=False)
    return model


def _ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(50, (1, LENGTH), generator=torch.Generator().manual_seed(seed))


def _gate_gradients(model: DynamaskForCausalLM) -> list[float]:
    model(input_ids=_ids(), labels=_ids()).loss.backward()
    gates = [p for name, p in model.named_parameters() if ".gate." in name and "log_recency" not in name]
    assert gates
    return [0.0 if p.grad is None else float(p.grad.abs().sum()) for p in gates]


def test_gradients_reach_the_gates_in_one_variant_and_not_in_the_others() -> None:
    dma, trained = tiny_model("dma", local=0, recency=0.0), _model("dma-random-start")
    torch.testing.assert_close(trained(input_ids=_ids()).logits, dma(input_ids=_ids(), use_cache=False).logits)
    assert min(_gate_gradients(trained)) > 0
    detached = _model("dma-detached-scores")
    torch.testing.assert_close(detached(input_ids=_ids()).logits, trained(input_ids=_ids()).logits)
    assert max(_gate_gradients(detached)) == 0
    unbiased = _model("dma-unbiased-logits")
    assert not torch.allclose(unbiased(input_ids=_ids()).logits, trained(input_ids=_ids()).logits)
    assert max(_gate_gradients(unbiased)) == 0


def test_a_random_start_chooses_and_the_recency_term_still_learns() -> None:
    with ablation_mixers():
        model = DynamaskForCausalLM(tiny_config("dma-unbiased-logits", recency=0.1))
    gates = [layer.mixer.gate for layer in model.model.layers]
    assert all(gate.gate.abs().min() > 0 for gate in gates)
    model(input_ids=_ids(), labels=_ids(), use_cache=False).loss.backward()
    assert all(gate.log_recency.grad.abs().min() > 0 for gate in gates)


@pytest.mark.parametrize("local", [0, 2])
def test_the_leak_leaks_and_the_exact_selection_does_not(local: int) -> None:
    changed = _ids().clone()
    changed[0, LENGTH // 2 :] = _ids(2)[0, LENGTH // 2 :]
    moved = {}
    for name in (LEAKY, "dma-random-start"):
        model = _model(name, local=local)
        before, after = (model(input_ids=ids).logits[0, : LENGTH // 2].detach() for ids in (_ids(), changed))
        moved[name] = float((before - after).abs().max())
    assert moved["dma-random-start"] < 1e-12
    assert moved[LEAKY] > 1e-3


def test_the_leaky_mask_is_the_best_of_the_whole_sequence() -> None:
    mixer = _model(LEAKY, local=2).model.layers[0].mixer
    scores = torch.randn(1, 2, LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expiry = mixer.expiry(scores, None)
    for head in range(2):
        best = set(scores[0, head].topk(mixer.max_window).indices.tolist())
        for key in range(LENGTH):
            assert expiry[0, head, key] == (LENGTH if key in best else min(key + 2, LENGTH))
    row, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    assert ((key <= row) & (row < expiry[:, :, None])).sum(-1).max() <= mixer.most_live


def test_a_gate_per_query_head() -> None:
    model = _model("dma-query-head-gates")
    mixer = model.model.layers[0].mixer
    assert mixer.gate(torch.zeros(1, 2, 5, 8).double(), torch.arange(5)[None]).shape == (1, 4, 5)
    window = tiny_model("dma", local=0, recency=0.0)
    for layer in (*window.model.layers, *model.model.layers):  # closed gates: a sliding window, whoever owns them
        torch.nn.init.zeros_(layer.mixer.gate.gate)
    torch.testing.assert_close(model(input_ids=_ids()).logits, window(input_ids=_ids(), use_cache=False).logits)
    torch.nn.init.normal_(mixer.gate.gate, std=2.0)
    value = torch.randn(1, 2, LENGTH, 8, generator=torch.Generator().manual_seed(3)).double()
    expiry = mixer.expiry(mixer.gate(value, torch.arange(LENGTH)[None]), _sequence())
    assert not torch.equal(expiry[:, 0], expiry[:, 1])  # heads of one group


def _sequence() -> Any:
    from dynamask.mixers import SequenceInfo

    return SequenceInfo(torch.arange(LENGTH)[None])


def test_ablations_are_mixers_inside_the_context_alone() -> None:
    before = dict(MIXERS)
    with ablation_mixers():
        assert set(ABLATIONS) <= set(MIXERS)
        with ablation_mixers():
            pass
        assert get_mixer(LEAKY) is ABLATIONS[LEAKY]
    assert before == MIXERS
    with pytest.raises(InvalidInputError, match="attention must be one of"):
        get_mixer(LEAKY)
    with ablation_mixers(), pytest.raises(InvalidInputError, match="use_cache=False"):
        _model(LEAKY)(input_ids=_ids(), use_cache=True)


def test_the_smoke_sweep_runs_every_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_FOLDER, str(tmp_path / "state"))
    report = run_sweep("ablation", ABLATION.configs("smoke"), tmp_path / "ablation.jsonl")
    assert not report.failed
    names = {ablation_name(record.config) for record in report.records}
    assert len(names) == len({"dma", "sliding window", "upcycled", "linear", "paper", "linear paper", *ABLATIONS})
    both = [record for record in report.records if "exact_loss" in record.result]
    assert {record.config["attention"] for record in both} == {"dma", LEAKY}
    for record in both:  # the loss of training is the one under the selection trained with
        own = "leaky_loss" if record.config["attention"] == LEAKY else "exact_loss"
        assert record.result[own] == pytest.approx(record.result["loss"], abs=1e-5)
        assert record.result["exact_loss"] != pytest.approx(record.result["leaky_loss"], abs=1e-6)
    assert not list((tmp_path / "state").glob("*")), "models are deleted once both losses are known"
    section = report_ablation(report.records, tmp_path / "pictures")
    assert {exhibit.name for exhibit in section.exhibits} == {"variants", "leak", "windows"}
    assert {finding.claim for finding in section.findings} == {"gradients", "leak", "leak-cost"}


def _record(name: str, seed: int, loss: float | None) -> Record:
    return _run(next(c for c in ABLATION.configs("smoke") if c["attention"] == name), seed, loss)


def _run(config: dict[str, Any], seed: int, loss: float | None) -> Record:
    own = config | {"seed": seed}
    return Record("ablation", run_key("ablation", own), own, seed, {"loss": loss}, 1.0, "a GPU", {}, None)


def test_the_gradient_must_help_beyond_the_spread_of_seeds(tmp_path: Path) -> None:
    def verdicts(*losses: tuple[float, float | None]) -> list[str]:
        records = []
        for seed, (trained, cut) in enumerate(losses):
            records += [_record("dma-random-start", seed, trained), _record("dma-detached-scores", seed, cut)]
        return [finding.verdict for finding in report_ablation(records, tmp_path).findings]

    assert verdicts((3.0, 3.1), (3.0, 3.11), (3.0, 3.12)) == [REPRODUCED]
    assert verdicts((3.0, 3.1), (3.0, 2.9), (3.0, 3.0)) == [NOT_TESTED]
    assert verdicts((3.0, 3.001), (3.0, 2.999), (3.0, 3.0)) == [NO_DIFFERENCE]
    assert verdicts((3.0, 2.9), (3.0, 2.91), (3.0, 2.89)) == [REFUTED]
    assert verdicts((3.0, None)) == [NOT_TESTED]
    assert report_ablation([_record("dma-detached-scores", 0, 3.0)], tmp_path).findings == []


def test_the_leak_is_judged_against_a_model_trained_exactly_and_by_what_it_costs_its_own(tmp_path: Path) -> None:
    leaky, exact = (
        next(c for c in ABLATION.configs("leak") if c["attention"] == name and c["window"] == 128)
        for name in (LEAKY, "dma")
    )

    def records(*losses: float) -> list[Record]:
        made = []
        for seed, loss in enumerate(losses):
            for config, both in ((leaky, (loss, 3.0)), (exact, (2.9, 3.1))):
                run = _run(config, seed, 3.0)
                made.append(
                    replace(run, result=run.result | dict(zip(("exact_loss", "leaky_loss"), both, strict=True)))
                )
        return made

    gain, cost = report_ablation(records(3.3, 3.31, 3.29), tmp_path).findings
    assert (gain.claim, gain.verdict, gain.setting["w/N"]) == ("leak", REFUTED, "1/16")
    assert "-0.100 [-0.100, -0.100]; both read exactly -0.400" in gain.measured
    assert (cost.claim, cost.verdict) == ("leak-cost", REPRODUCED)
    assert {found.verdict for found in report_ablation(records(3.3), tmp_path).findings} == {NOT_TESTED}


def test_windows_are_compared_over_the_seeds_that_all_of_them_ran(tmp_path: Path) -> None:
    configs = [c for c in ABLATION.configs("smoke") if c["attention"] == "swa"]
    assert len(configs) > 1
    records = [*(_run(config, 0, 3.0) for config in configs), _run(configs[0], 1, 9.0)]
    (windows,) = (each for each in report_ablation(records, tmp_path).exhibits if each.name == "windows")
    assert [row["sliding window"] for row in windows.table] == ["3.0000"] * len(configs)
    assert len(windows.keys) == len(configs)


def test_mistakes_are_named() -> None:
    config = ABLATION.configs("smoke")[0]
    with pytest.raises(InvalidInputError, match="dense_share"):
        run_ablation({**config, "dense_share": 1.0}, lambda share, note: None)
    with pytest.raises(InvalidInputError, match="did you mean 'steps'"):
        run_ablation({**config, "step": 1}, lambda share, note: None)
