"""The training mixture: every document, the share of tokens asked for, and examples that hold their answers."""

from __future__ import annotations

import pytest

from dynamask import InvalidInputError
from dynamask.data import Document
from dynamask.evaluation.retrieval import make_example, mixture
from tests.evaluation.retrieval.conftest import TEXTS
from tests.evaluation.retrieval.solver import solve

LENGTHS = (700, 900)
PLAIN = [Document(f"{n}", text) for n, text in enumerate(TEXTS * 6)]


def _tokens(tokenizer, documents) -> int:
    return sum(len(tokenizer(d.text, add_special_tokens=False)["input_ids"]) for d in documents)


def test_share_of_tokens_and_order(byte_tokenizer) -> None:
    mixed = list(mixture(PLAIN, byte_tokenizer, 0.4, 0, lengths=(700, 900)))
    examples = [d for d in mixed if d.name.startswith("retrieval/")]
    assert [d for d in mixed if d not in examples] == PLAIN
    share = _tokens(byte_tokenizer, examples) / _tokens(byte_tokenizer, mixed)
    assert share == pytest.approx(0.4, abs=0.02)
    assert len({d.name for d in examples}) == len(examples)
    sizes = [_tokens(byte_tokenizer, [d]) for d in examples]
    assert 690 <= min(sizes) < 740
    assert 840 < max(sizes) <= 910
    gaps = [mixed.index(d) for d in examples]
    assert gaps[0] < 5  # between the documents from the beginning, not after them
    assert {d.name.split("/")[1] for d in examples} == {
        "single_needle", "multi_key", "multi_value", "multi_query", "passkey", "variable_tracking"
    }  # fmt: skip


def test_examples_end_with_their_answer_in_noise_and_in_documents(byte_tokenizer) -> None:
    kinds = set()
    for document in mixture(PLAIN, byte_tokenizer, 0.5, 1, lengths=(400, 600), tasks=["single_needle", "passkey"]):
        if document.name.startswith("retrieval/"):
            question, _, answer = document.text.rpartition(" is ")
            assert " " + answer == solve(question + " is")
            kinds.add("The grass is green" in document.text)
    assert kinds == {True, False}


def test_reproducible_and_apart_from_evaluation(byte_tokenizer) -> None:
    once, again, other = (list(mixture(PLAIN[:9], byte_tokenizer, 0.5, seed, lengths=LENGTHS)) for seed in (3, 3, 4))
    assert once == again != other
    assert list(mixture(PLAIN, byte_tokenizer, 0, 0, lengths=LENGTHS)) == PLAIN
    assert len(once) > 9
    asked = make_example("passkey", byte_tokenizer, 300, 0.5, "3 0").values[0]
    assert not any(asked in document.text for document in once)


def test_mistakes_are_named_at_once(byte_tokenizer) -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(InvalidInputError, match="from 0 to below 1"):
            mixture(PLAIN, byte_tokenizer, share, 0)
    with pytest.raises(InvalidInputError, match="least and the greatest"):
        mixture(PLAIN, byte_tokenizer, 0.1, 0, lengths=(9, 3))
    with pytest.raises(InvalidInputError, match="did you mean 'multi_key'"):
        mixture(PLAIN, byte_tokenizer, 0.1, 0, lengths=LENGTHS, tasks=["multikey"])
    with pytest.raises(InvalidInputError, match="at least one task"):
        mixture(PLAIN, byte_tokenizer, 0.1, 0, tasks=[])
    with pytest.raises(
        InvalidInputError, match=r"examples of multi_query need 6\d\d tokens .* got lengths \(300, 900\)"
    ):
        mixture(PLAIN, byte_tokenizer, 0.1, 0, lengths=(300, 900), tasks=["passkey", "multi_query"])
