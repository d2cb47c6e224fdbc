"""The prompts: of the very length asked for, the needle at the very depth, and one right answer to be read off them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynamask import InvalidInputError
from dynamask.evaluation.retrieval import TASKS, Haystack, make_example
from tests.evaluation.retrieval.conftest import TEXTS
from tests.evaluation.retrieval.solver import solve


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [900, 1013])
@pytest.mark.parametrize("documents", [None, TEXTS])
def test_length_is_exact_and_the_answer_can_be_read_off(tokenizer, task, length, documents) -> None:
    haystack = Haystack(tokenizer, documents)
    for seed in range(4):
        example = make_example(task, tokenizer, length, 0.3, seed, haystack=haystack)
        assert len(example.prompt) + len(example.answer) == length
        text = tokenizer.decode(example.prompt, skip_special_tokens=True)
        answer = tokenizer.decode(example.prompt + example.answer, skip_special_tokens=True)[len(text) :]
        assert answer == solve(text)
        assert all(value in answer for value in example.values)
        assert (example.prompt[0] == tokenizer.bos_token_id) == (tokenizer.bos_token is not None)


@pytest.mark.parametrize("task", ["single_needle", "multi_key"])
def test_the_answer_stands_once_at_the_depth(tokenizer, task) -> None:
    haystack = Haystack(tokenizer, TEXTS)
    for depth in (0, 0.25, 0.5, 1):
        example = make_example(task, tokenizer, 1200, depth, 7, haystack=haystack)
        assert tokenizer.decode(example.prompt).count(example.values[0]) == 1
        assert example.depth == pytest.approx(depth, abs=0.02)
        # The same, measured on the prompt itself: the first needle needed begins there, and not a token later.
        before = tokenizer.decode(example.prompt[: example.position])
        needle = tokenizer.decode(example.prompt[example.position :])
        assert example.values[0] not in before
        assert needle.strip().startswith("One of the special magic numbers for")
        assert example.values[0] in needle[:90]


def test_depth_is_measured_in_the_prompt(byte_tokenizer) -> None:
    example = make_example("passkey", byte_tokenizer, 1500, 0.75, 0)
    text = byte_tokenizer.decode(example.prompt)
    head, tail = text.index("there.\n") + 7, text.index("\nWhat is the pass key?")
    needle = text.index("\nThe pass key is ")
    size = len("\nThe pass key is 12345. Remember it. 12345 is the pass key.\n")
    assert (needle - head) / (tail - head - size) == pytest.approx(0.75, abs=0.02)
    assert text.count(example.values[0]) == 2  # the source says it twice, in one line


@pytest.mark.parametrize("task", ["multi_value", "multi_query", "variable_tracking"])
def test_later_needles_stand_after_the_first_and_in_order(byte_tokenizer, task) -> None:
    haystack = Haystack(byte_tokenizer, TEXTS)
    for seed in range(5):
        example = make_example(task, byte_tokenizer, 1000, 0.4, seed, haystack=haystack)
        text = byte_tokenizer.decode(example.prompt[example.position :])
        places = [text.index(value) for value in example.values]
        assert places == sorted(places)
        assert len(set(example.values)) == (5 if task == "variable_tracking" else 4)
        before = byte_tokenizer.decode(example.prompt[: example.position])
        assert not any(value in before for value in example.values)


def test_multi_key_has_distractors_and_seeds_differ(byte_tokenizer) -> None:
    prompts = []
    for seed in range(3):
        example = make_example("multi_key", byte_tokenizer, 700, 0.5, seed)
        assert byte_tokenizer.decode(example.prompt).count("One of the special magic numbers for") == 4
        assert make_example("multi_key", byte_tokenizer, 700, 0.5, seed) == example
        prompts.append(tuple(example.prompt))
    assert len(set(prompts)) == 3


def test_needles_stand_between_words(byte_tokenizer) -> None:
    haystack = Haystack(byte_tokenizer, TEXTS)
    words = set(" ".join(TEXTS).split())
    for seed in range(20):
        example = make_example("single_needle", byte_tokenizer, 600, 0.37, seed, haystack=haystack)
        before = byte_tokenizer.decode(example.prompt[: example.position])
        assert before.split()[-1] in words


def test_a_haystack_shorter_than_the_prompt_is_repeated(byte_tokenizer) -> None:
    haystack = Haystack(byte_tokenizer, ["one two three"])
    example = make_example("passkey", byte_tokenizer, 900, 0.5, 0, haystack=haystack)
    assert len(example.prompt) + len(example.answer) == 900
    assert byte_tokenizer.decode(example.prompt).count("one two three\n") > 20


def test_mistakes_are_named(byte_tokenizer) -> None:
    with pytest.raises(InvalidInputError, match="did you mean 'passkey'"):
        make_example("pass_key", byte_tokenizer, 900, 0.5, 0)
    with pytest.raises(InvalidInputError, match=r"from 0 to 1; got 1\.5"):
        make_example("passkey", byte_tokenizer, 900, 1.5, 0)
    with pytest.raises(InvalidInputError, match=r"too short for passkey: .* take 2\d\d tokens"):
        make_example("passkey", byte_tokenizer, 20, 0.5, 0)
    with pytest.raises(InvalidInputError, match="haystack is empty"):
        Haystack(byte_tokenizer, [])


def test_a_haystack_that_holds_the_answer_is_refused(byte_tokenizer, monkeypatch) -> None:
    puzzle = TASKS["passkey"]
    monkeypatch.setitem(TASKS, "passkey", lambda rng: replace(puzzle(rng), secrets=["ledgers"]))
    assert make_example("passkey", byte_tokenizer, 900, 0.5, 0).depth == pytest.approx(0.5, abs=0.02)  # noise has none
    with pytest.raises(InvalidInputError, match=r"one of ledgers\): give other documents"):
        make_example("passkey", byte_tokenizer, 900, 0.5, 0, haystack=Haystack(byte_tokenizer, TEXTS))
