"""Who reads the prompt scores 1, who does not scores 0, and who reads half of it scores there."""

from __future__ import annotations

import json

import pytest

from dynamask import BoundedCache, InvalidInputError
from dynamask.errors import UsageError
from dynamask.evaluation.retrieval import TASKS, evaluate_retrieval, make_example, read_scores, write_scores
from tests.conftest import tiny_model
from tests.evaluation.retrieval.conftest import TEXTS
from tests.evaluation.retrieval.solver import Solver


def test_a_reader_scores_one(tokenizer) -> None:
    scores = evaluate_retrieval(Solver(tokenizer), tokenizer, [900], [0.0, 1.0], 2, documents=TEXTS)
    assert [(s.task, s.depth) for s in scores] == [(task, depth) for task in TASKS for depth in (0.0, 1.0)]
    assert all(s.exact == s.recall == 1 and s.samples == 2 and s.length == 900 for s in scores)


def test_who_does_not_read_scores_zero(byte_tokenizer) -> None:
    blind = Solver(byte_tokenizer, right=lambda text: False)
    scores = evaluate_retrieval(blind, byte_tokenizer, [900], [0.5], 3, extra_tokens=20)
    assert all(s.exact == s.recall == 0 for s in scores)


def test_scores_go_to_the_cell_they_belong_to(byte_tokenizer) -> None:
    """A model that sees the last 60 % alone: right below that depth, wrong above, whatever the batches hold."""
    near = Solver(byte_tokenizer, right=lambda text: text.index("The pass key is") > 0.4 * len(text))
    scores = evaluate_retrieval(
        near, byte_tokenizer, [600, 1200], [0.9, 0.1], 3, tasks=["passkey"], batch_size=4, name="near"
    )
    assert [(s.length, s.depth, s.exact) for s in scores] == [
        (600, 0.9, 1), (600, 0.1, 0), (1200, 0.9, 1), (1200, 0.1, 0)
    ]  # fmt: skip
    assert len(near.lengths) == 12
    assert {s.model for s in scores} == {"near"}


def test_recall_counts_the_values_found_in_any_order(byte_tokenizer) -> None:
    half = Solver(byte_tokenizer)
    example = make_example("multi_value", byte_tokenizer, 900, 0.5, "0 0")
    said = byte_tokenizer(f" {example.values[3]} {example.values[0]}")["input_ids"]

    def generate(input_ids, max_new_tokens, pad_token_id, **options):
        row = said + [pad_token_id] * (max_new_tokens - len(said))
        return input_ids.new_tensor([input_ids[0].tolist() + row])

    half.generate = generate
    (score,) = evaluate_retrieval(half, byte_tokenizer, [900], [0.5], 1, tasks=["multi_value"])
    assert (score.exact, score.recall) == (0, 0.5)


def test_a_real_model_is_asked_through_its_bounded_cache(byte_tokenizer, monkeypatch) -> None:
    model = tiny_model("dma", vocab_size=len(byte_tokenizer)).train()
    made = []
    fresh = type(model)._new_cache
    monkeypatch.setattr(type(model), "_new_cache", lambda self: made.append(fresh(self)) or made[-1])
    (score,) = evaluate_retrieval(model, byte_tokenizer, [300], [0.5], 2, tasks=["passkey"], batch_size=1)
    assert score.exact == 0  # untrained
    assert len(made) == 2
    assert all(isinstance(cache, BoundedCache) for cache in made)
    assert bool((made[0].layers[0].keys_held == model.config.windows).all())
    assert model.training


def test_json_lines_come_back(byte_tokenizer, tmp_path) -> None:
    scores = evaluate_retrieval(Solver(byte_tokenizer), byte_tokenizer, [700], [0.5], 1, tasks=["multi_key"])
    file = write_scores(scores, tmp_path / "s.jsonl")
    assert json.loads(file.read_text())["task"] == "multi_key"
    assert read_scores(file) == scores
    file.write_text(file.read_text() + '{"task": 1}\n')
    with pytest.raises(UsageError, match="line 2 is no retrieval score"):
        read_scores(file)
    file.write_text("\n")
    with pytest.raises(UsageError, match="holds no retrieval scores"):
        read_scores(file)
    with pytest.raises(UsageError, match="cannot read the scores"):
        read_scores(tmp_path / "gone")


def test_mistakes_are_named(byte_tokenizer) -> None:
    solver = Solver(byte_tokenizer)
    with pytest.raises(InvalidInputError, match="samples and batch_size must be at least 1"):
        evaluate_retrieval(solver, byte_tokenizer, [300], [0.5], 0)
    with pytest.raises(InvalidInputError, match="at least one length"):
        evaluate_retrieval(solver, byte_tokenizer, [], [0.5], 1)
    with pytest.raises(InvalidInputError, match="unknown retrieval task"):
        evaluate_retrieval(solver, byte_tokenizer, [300], [0.5], 1, tasks=["niah"])
