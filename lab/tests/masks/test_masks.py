"""Figures about masks: against definitions, and against what is known of masks nobody trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from dynamask.data import train_tokenizer
from dynamask.errors import InvalidInputError, UsageError
from dynamask.models import DynamaskForCausalLM
from dynamask.ops import key_expiry
from dynamask_lab.legacy import OldGate
from dynamask_lab.masks.masks import mask_texts, measure_masks
from dynamask_lab.masks.token_kinds import KINDS, token_kinds
from dynamask_lab.report.masks import lifts
from dynamask_lab.report.results import render_results
from dynamask_lab.sweeps.verdicts import LOSS_INTEREST, Interval, judge
from lab.tests.old_models import tiny_model

LENGTH, WINDOW = 40, 6
TOKENIZER = train_tokenizer(["the of and\n 12 (x) def"] * 4, 300)


def _texts(count: int = 3) -> list[list[int]]:
    return torch.randint(50, (count, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()


def _untrained(**fields: object) -> DynamaskForCausalLM:
    model = tiny_model(**fields)
    for module in model.modules():
        if isinstance(module, OldGate):
            torch.nn.init.zeros_(module.gate)
    return model


@torch.no_grad()
def layer_expiry(model: DynamaskForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The mask of every layer and head on a text, (layers, G, N)."""
    scores: list[torch.Tensor] = []
    gates = [module for module in model.modules() if isinstance(module, OldGate)]
    hooks = [gate.register_forward_hook(lambda _m, _i, output: scores.append(output)) for gate in gates]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.cat([key_expiry(score, WINDOW) for score in scores])


def test_kinds_of_token() -> None:
    text = "def| foo|_|bar|(|x|)|:|\n    |return| 12|3| |\ufffd|if|<eos>|a"
    pieces = text.split("|")
    found = [KINDS[kind] for kind in token_kinds(pieces, [piece == "<eos>" for piece in pieces])]
    words = ["keyword", "word, beginning", "word, continued", "word, continued", "punctuation", "word, beginning"]
    rest = ["punctuation", "punctuation", "line break", "keyword", "number", "number", "space"]
    assert found == words + rest + ["special or partial", "keyword", "special or partial", "word, beginning"]


def test_an_untrained_mask_is_a_sliding_window_in_every_figure() -> None:
    figures = measure_masks(_untrained(local=2, recency=0.1), TOKENIZER, _texts())
    for control in ("sliding", "no_bias", "gates_off"):
        assert figures["loss"][control]["difference"] == pytest.approx(0, abs=1e-6)
    shares = torch.tensor(figures["lifetimes"]["share"])
    place = max(i for i, edge in enumerate(figures["lifetimes"]["edges"]) if edge <= WINDOW)
    assert (shares[..., place] == 1).all()
    assert torch.tensor(figures["kept_beyond_window"]).count_nonzero() == 0
    assert figures["distance"]["own"] == figures["distance"]["sliding"]
    assert torch.tensor(figures["distance"]["own"]).max() < WINDOW
    assert torch.tensor(figures["kinds"]["long_lived"]).count_nonzero() == 0
    assert torch.allclose(torch.tensor(figures["gate"]["recency"]), torch.tensor(0.1))


def test_a_choosing_mask_agrees_with_its_expiry() -> None:
    model, texts = tiny_model(local=0, recency=0.0), _texts()
    figures = measure_masks(model, TOKENIZER, texts)
    position = torch.arange(LENGTH)
    expiries = [layer_expiry(model, torch.tensor([text])) for text in texts]
    lifetimes = torch.stack([expiry - position for expiry in expiries])
    beyond = (lifetimes - WINDOW).clamp(min=0).sum((0, -1)) / lifetimes.sum((0, -1))
    torch.testing.assert_close(torch.tensor(figures["kept_beyond_window"]), beyond, atol=1e-5, rtol=1e-4)
    assert beyond.max() > 0.1
    dead = (lifetimes[..., : LENGTH // 2] == 0).double().mean((0, -1))
    torch.testing.assert_close(torch.tensor(figures["lifetimes"]["share"])[..., 0].double(), dead, atol=1e-5, rtol=1e-4)
    assert figures["lifetimes"]["edges"] == [0, 1, 2, 4, 8, 16, 20]
    old_enough = LENGTH - 2 * WINDOW
    disjoint = torch.tensor(figures["kinds"]["long_lived"])[..., : len(KINDS)].sum(-1)
    assert torch.equal(disjoint, (lifetimes[..., :old_enough] >= 2 * WINDOW).sum((0, -1)))
    assert sum(figures["kinds"]["total"][: len(KINDS)]) == old_enough * len(texts)
    assert figures["kinds"]["total"][-2] == 4 * len(texts)
    least = torch.tensor([[head[:] for head in layer] for layer in figures["threshold"]["threshold"]])
    assert (least.diff(dim=-1) >= -1e-5).all()  # a threshold only rises
    for number, (layer, head) in enumerate(figures["sample"]["heads"]):
        assert figures["sample"]["expiry"][number] == expiries[0][layer, head].tolist()


def test_attention_distances_are_those_of_the_weights() -> None:
    """A head that cannot tell keys apart spreads its attention evenly over the kept ones."""
    model = tiny_model(local=0, recency=0.0, score_form="linear")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mixer.q_norm.weight)
        with torch.no_grad():  # ranks stay, and scores that small leave the logits alone
            layer.mixer.gate.gate.mul_(1e-9)
    text = _texts(1)
    figures = measure_masks(model, TOKENIZER, text)
    expiry = layer_expiry(model, torch.tensor(text))
    row, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (key <= row) & (row < expiry[:, :, None])
    far = (seen & (row - key >= WINDOW))[:, :, LENGTH // 2 :].sum((-1, -2)) / seen[:, :, LENGTH // 2 :].sum((-1, -2))
    found = torch.tensor(figures["distance"]["beyond_window"])
    torch.testing.assert_close(found, far.repeat_interleave(2, 1), atol=1e-5, rtol=1e-4)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_model().train()
    ids = torch.tensor(_texts(1))
    before = copy.deepcopy(model.state_dict())
    expected = model(input_ids=ids).logits
    measure_masks(model, TOKENIZER, _texts(1))
    assert model.training
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no dynamic mask attention"):
        measure_masks(tiny_model("mha"), TOKENIZER, _texts())
    with pytest.raises(InvalidInputError, match="at least four windows"):
        measure_masks(tiny_model(), TOKENIZER, [[1] * 10])
    with pytest.raises(InvalidInputError, match="one length"):
        measure_masks(tiny_model(), TOKENIZER, [[1] * 40, [1] * 41])
    (tmp_path / "short.txt").write_text("x = 1")
    with pytest.raises(UsageError, match="no document of the data has 40 tokens"):
        mask_texts(tmp_path, TOKENIZER, [str(tmp_path / "short.txt")], 40, 3)


def test_the_line_becomes_a_page_with_a_verdict(tmp_path: Path) -> None:
    figures = {"report": "masks", "name": "mine", "environment": {"device": "a CPU"}}
    figures |= measure_masks(tiny_model(local=0, recency=0.0), TOKENIZER, _texts())
    names, rows, totals, alive = lifts(figures)
    assert "line break" not in names or totals[names.index("line break")] > 0
    assert rows[0][-1] == pytest.approx((alive[-1] / sum(alive[:-2])) / (totals[-1] / sum(totals[:-2])), rel=1e-9)
    file = tmp_path / "raw" / "masks" / "mine.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(figures) + "\n")
    render_results(tmp_path / "raw", tmp_path / "report")
    verdicts = (tmp_path / "report" / "verdicts.md").read_text()
    page = (tmp_path / "report" / "masks.md").read_text()
    for picture in ("maps", "lifetimes", "kinds", "distance", "threshold"):
        assert f"masks-mine/{picture}.svg" in page
        assert (tmp_path / "report" / "masks-mine" / f"{picture}.svg").exists()
    row = next(line for line in verdicts.split("\n") if "taking the choice away" in line)
    found = figures["loss"]["sliding"]
    gain, margin = found["difference"], 2 * found["standard_error"]
    verdict = judge(Interval(gain, gain - margin, gain + margin), LOSS_INTEREST, seeds=1)
    assert row.split("|")[3].strip() == f"**{verdict}**"
