"""lm-evaluation-harness: the registered model, a task over local data, and the messages of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynamask.data import train_tokenizer
from dynamask.errors import UsageError
from tests.conftest import tiny_model

pytest.importorskip("lm_eval", reason="the optional group dynamask-attention[eval] is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "multiple_choice"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, as `dynamask train` leaves it."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(["The plural of mouse is mice. The plural of child is children. " * 9], 300)
    model = tiny_model("dma", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def _likelihood(model, tokenizer, context: str, choice: str) -> float:
    before, whole = (tokenizer(text)["input_ids"] for text in (context, context + choice))
    with torch.no_grad():
        logits = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


def test_accuracy_is_the_models_own(run) -> None:
    """The harness's figure against one computed here, question by question."""
    import json

    from dynamask.evaluation.harness import evaluate_tasks
    from dynamask.training import open_run

    found = evaluate_tasks(str(run), ["plurals"], include_path=EXAMPLE, batch_size=3)["results"]["plurals"]["acc,none"]
    model, tokenizer = open_run(run)
    right, questions = 0, [json.loads(line) for line in (EXAMPLE / "plurals.jsonl").read_text().splitlines()]
    for question in questions:
        context = f"The plural of {question['singular']} is"
        scores = [_likelihood(model, tokenizer, context, f" {choice}") for choice in question["choices"]]
        right += scores.index(max(scores)) == question["answer"]
    assert found == pytest.approx(right / len(questions))
    assert {question["answer"] for question in questions} == {0, 1}


def test_scoring_builds_no_cache(run, monkeypatch) -> None:
    from lm_eval.api.registry import get_model

    from dynamask.evaluation.harness import DynamaskLM

    assert get_model("dynamask") is DynamaskLM
    lm = DynamaskLM(str(run), device="cpu")
    seen = []
    forward = type(lm.model).forward
    monkeypatch.setattr(
        type(lm.model), "forward", lambda self, *a, **k: seen.append(forward(self, *a, **k)) or seen[-1]
    )
    logits = lm._model_call(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, lm.model.config.vocab_size)
    assert seen[0].past_key_values is None
    assert lm.model.config.use_cache is True  # generation still has its cache


def test_mistakes_are_named(run) -> None:
    from dynamask.evaluation.harness import evaluate_tasks

    with pytest.raises(UsageError, match="did you mean 'plurals'"):
        evaluate_tasks(str(run), ["plurls"], include_path=EXAMPLE)
    with pytest.raises(UsageError, match="no folder"):
        evaluate_tasks(str(run), ["plurals"], include_path=EXAMPLE / "gone")
    with pytest.raises(UsageError, match="could not be loaded"):
        evaluate_tasks(str(run / "gone"), ["plurals"], include_path=EXAMPLE)
