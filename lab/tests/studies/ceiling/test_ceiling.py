"""The ceiling study: its rules against their definitions, and the study on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynamask.data import train_tokenizer
from dynamask.errors import InvalidInputError, UsageError
from dynamask.mixers.rank_predictor import RankPredictor
from dynamask_lab.studies.ceiling import study
from dynamask_lab.studies.ceiling.rules import Choice, Chooser, best_keys_of_each_query

ESSAYS = " ".join(f"The {a} {b} went home. It was {b} again?" for a in ("old", "red", "tall") for b in ("fox", "dogs"))


def _tiny(vocabulary: int = 64) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        initializer_range=0.3,  # attention that differs from key to key
    )
    return LlamaForCausalLM(config).eval()


def test_best_keys_of_each_query_by_definition() -> None:
    torch.manual_seed(1)
    query, key, value = torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8), torch.randn(2, 2, 24, 8)
    windows, scale = [3, 7], 0.4
    found = best_keys_of_each_query(query, key, value, windows, scale, chunk=5)
    for row in range(2):
        for group, window in enumerate(windows):
            for i in range(24):
                heads = query[row, 2 * group : 2 * group + 2, i]
                weights = (heads @ key[row, group, : i + 1].T * scale).softmax(-1)
                kept = weights.sum(0).topk(min(window, i + 1)).indices
                expected = weights[:, kept] / weights[:, kept].sum(-1, keepdim=True) @ value[row, group, kept]
                torch.testing.assert_close(found[row, 2 * group : 2 * group + 2, i], expected)


@torch.no_grad()
def test_rules_agree_with_dense_attention_where_windows_hold_all() -> None:
    model = _tiny()
    tokens = torch.randint(0, 64, (1, 40))
    expected = model(tokens).logits
    chooser = Chooser(model)
    predictors = {layer: RankPredictor(32, 2) for layer in range(2)}
    for rule in ("dense", "newest", "learned", "static", "query"):
        chooser.choice = Choice(rule, [] if rule == "dense" else chooser.even(40), 4, 2, predictors)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_better_rules_leave_less_of_dense_attention_out() -> None:
    model = _tiny()
    tokens = torch.randint(0, 64, (1, 128))
    dense = model(tokens).logits.log_softmax(-1)
    chooser = Chooser(model)
    distances = {}
    for rule in ("newest", "static", "query"):
        chooser.choice = Choice(rule, chooser.even(24), 4, 2)
        distances[rule] = float((model(tokens).logits.log_softmax(-1) - dense).square().mean())
    assert distances["query"] < distances["static"] < distances["newest"]


def test_allocation_has_the_budget_for_its_mean_and_favours_heads_that_look_back() -> None:
    model = _tiny()
    with torch.no_grad():  # the second layer's first key/value head attends evenly: many keys matter a little
        model.model.layers[1].self_attn.q_proj.weight[:16] = 0
    chooser = Chooser(model)
    blocks = [torch.randint(0, 64, (1, 256)) for _ in range(2)]
    made = chooser.allocate(blocks, [32, 64])
    for budget, windows in made.items():
        assert np.mean(windows) == budget
        assert min(min(layer) for layer in windows) >= min(128, budget // 2) + 4
    assert made[64][1][0] != made[64][1][1]
    assert chooser.choice.rule == "dense"


def test_what_a_choice_refuses() -> None:
    with pytest.raises(InvalidInputError, match="one of dense"):
        Choice("best")
    with pytest.raises(InvalidInputError, match="at least local"):
        Choice("newest", [[8, 4]], 4, 2)


def test_the_study_runs_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "BUDGETS", (512,))
    tokenizer = train_tokenizer([ESSAYS * 4, "0 1 2 3 4 5 6 7 8 9 magic number mentioned in the provided text"], 300)
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}<a>"
    model = _tiny(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    random = np.random.default_rng(0)
    for name, rows in (("validation", 2), ("test-text", 2), ("test-code", 2)):
        np.save(tmp_path / f"{name}.npy", random.integers(0, len(tokenizer), (rows, 1024)).astype(np.uint16))
    (tmp_path / "essays.txt").write_text(ESSAYS * 20)
    (tmp_path / "data.json").write_text(json.dumps({"arrays": {}}))
    predictors = {f"model.layers.{i}.self_attn.rank_predictor": RankPredictor(32, 2) for i in range(2)}
    ranks = {f"{name}.{inner}": p.data for name, each in predictors.items() for inner, p in each.named_parameters()}
    torch.save(ranks, tmp_path / "ranks.pt")
    out = tmp_path / "ceiling.jsonl"
    arguments = ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--out", str(out), "--blocks", "1"]
    arguments += [
        "--block",
        "1024",
        "--calibration",
        "1",
        "--examples",
        "1",
        "--length",
        "1500",
        "--ranks",
        str(tmp_path / "ranks.pt"),
    ]
    assert study.main([*arguments, "--rules", "dense", "static"]) == 0
    rows = study.read_rows([out])
    assert len(rows) == 4 + 4 * 2
    losses = {
        (r["rule"], r["budget"], r["windows"]): np.nanmean(r["result"]["losses"]) for r in rows if r["of"] == "text"
    }
    assert losses["static", 512, "even"] == pytest.approx(losses["dense", None, ""], rel=0.05)
    assert all(set(r["result"]["found"]) <= {0, 1} for r in rows if r["measure"] == "needle")
    capsys.readouterr()
    assert study.main([*arguments, "--rules", "dense", "static", "--list"]) == 0  # nothing is left
    assert capsys.readouterr().out == ""
    torch.save({"model.norm.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match="not a rank predictor's"):
        study.load_predictors(tmp_path / "other.pt", 32, "cpu")
