"""MQAR's sequences: solvable from their own context, and distributed as zoology's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamask.errors import InvalidInputError
from dynamask_lab.studies.mqar.data import IGNORED, MqarExamples, mqar_examples


def zoology(
    vocab_size: int, num_examples: int, input_seq_len: int, seed: int, power_a: float, num_kv_pairs: int, fill: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`multiquery_ar` of HazyResearch/zoology (commit d88d6f5, Apache-2.0), one pass, row by row: inputs and labels."""
    random = np.random.RandomState(seed)
    context_size = 2 * num_kv_pairs
    key_vocab_size = vocab_size // 2
    space = (input_seq_len - context_size) // 2
    p = power_a * np.arange(1, space + 1) ** (power_a - 1)
    p = p / p.sum()
    inputs = np.zeros((num_examples, input_seq_len), dtype=np.int64)
    labels = np.full((num_examples, input_seq_len), -100)
    for row in range(num_examples):
        keys = random.choice(np.arange(1, key_vocab_size), num_kv_pairs, replace=False)
        values = random.choice(np.arange(key_vocab_size, vocab_size), num_kv_pairs, replace=False)
        gaps = random.choice(space, num_kv_pairs, replace=False, p=p)
        inputs[row, 0:context_size:2], inputs[row, 1:context_size:2] = keys, values
        inputs[row, context_size + 2 * gaps] = keys
        labels[row, context_size + 2 * gaps] = values
    if fill:
        inputs = np.where(inputs == 0, random.randint(vocab_size, size=inputs.shape), inputs)
    return inputs, labels


def solve(inputs: np.ndarray, position: int, pairs: int) -> int:
    """The token behind the first place in the pairs where the query's token stands."""
    context = inputs[: 2 * pairs]
    return int(context[int(np.flatnonzero(context[::2] == inputs[position])[0]) * 2 + 1])


SHAPES = [(64, 4), (64, 16), (128, 32), (16, 1), (20, 5)]


@pytest.mark.parametrize(("length", "pairs"), SHAPES)
@pytest.mark.parametrize("random_fillers", [True, False])
def test_brute_force_answers_every_query(length: int, pairs: int, random_fillers: bool) -> None:
    data = mqar_examples(20, length, pairs, vocab_size=256, random_fillers=random_fillers, seed=3)
    inputs, labels = data.inputs.numpy(), data.labels().numpy()
    assert inputs.shape == labels.shape == (20, length)
    assert ((labels != IGNORED).sum(-1) == pairs).all()
    for row, row_labels in zip(inputs, labels, strict=True):
        asked = np.flatnonzero(row_labels != IGNORED)
        assert (asked >= 2 * pairs).all(), "nothing is asked inside the pairs"
        assert [solve(row, position, pairs) for position in asked] == row_labels[asked].tolist()


def test_every_pair_is_asked_once_and_keys_and_values_are_apart() -> None:
    data = mqar_examples(200, 64, 8, vocab_size=130, seed=1)
    keys, values = data.inputs[:, 0:16:2], data.inputs[:, 1:16:2]
    assert keys.min() >= 1
    assert keys.max() < 65
    assert values.min() >= 65
    assert values.max() < 130
    for numbers in (keys, values, data.queries):
        assert all(len(set(row)) == 8 for row in numbers.tolist())
    assert torch.equal(data.inputs.gather(1, data.queries), keys)
    assert torch.equal(data.answers, values.long())
    assert torch.equal(data.queries % 2, torch.zeros_like(data.queries))


def test_the_same_seed_gives_the_same_sequences_and_another_gives_others() -> None:
    def draw(seed: int | list[int]) -> MqarExamples:
        return mqar_examples(10, 32, 4, vocab_size=128, seed=seed)

    assert all(torch.equal(getattr(draw([0, 1]), name), getattr(draw([0, 1]), name)) for name in vars(draw(0)))
    assert not torch.equal(draw([0, 1]).inputs, draw([0, 2]).inputs)
    assert not torch.equal(draw(0).inputs, draw(1).inputs)


def test_fillers_are_zero_unless_asked_for() -> None:
    plain = mqar_examples(50, 64, 4, vocab_size=128, random_fillers=False)
    filled = mqar_examples(50, 64, 4, vocab_size=128, random_fillers=True)
    assert int((plain.inputs == 0).sum()) == 50 * (64 - 12)
    written = plain.inputs != 0
    assert torch.equal(plain.inputs[written], filled.inputs[written]), "only the fillers differ"
    assert int((filled.inputs == 0).sum()) < 50 * 52 * 0.05
    assert set(filled.inputs[~written].tolist()) == set(range(128))


@pytest.mark.parametrize("power", [0.01, 0.1, 1.0])
def test_statistics_are_those_of_zoology(power: float) -> None:
    count, vocab, length, pairs = 4000, 64, 48, 6
    inputs, labels = zoology(vocab, count, length, 0, power, pairs, fill=True)
    data = mqar_examples(count, length, pairs, vocab_size=vocab, power=power, seed=0)

    # Where queries stand, over all pairs: the share of sequences that ask there. Five standard errors of a difference.
    ours = (data.labels() != IGNORED).double().mean(0).numpy()
    theirs = (labels != -100).mean(0)
    error = np.sqrt((theirs * (1 - theirs) + ours * (1 - ours)) / count) + 1e-9
    assert (np.abs(ours - theirs) < 5 * error).all()
    assert ours[2 * pairs :: 2].min() > 0, "every place is asked at some time"

    # And pair by pair: the first pair's query is the likeliest to come soon.
    keys = inputs[:, 0 : 2 * pairs : 2]
    asked = np.where(labels != -100, inputs, -1)
    theirs_by_pair = (asked[:, None, :] == keys[:, :, None]).argmax(-1)
    means, spread = data.queries.numpy().mean(0), theirs_by_pair.std(0) * np.sqrt(2 / count)
    assert (np.abs(means - theirs_by_pair.mean(0)) < 5 * spread).all()

    # Tokens: how often each stands in the pairs and in between.
    for part in (slice(0, 2 * pairs), slice(2 * pairs, length)):
        ours = np.bincount(data.inputs[:, part].flatten().numpy(), minlength=vocab)
        theirs = np.bincount(inputs[:, part].flatten(), minlength=vocab)
        assert (np.abs(ours - theirs) < 5 * np.sqrt(ours + theirs + 1)).all()
        assert ((ours == 0) == (theirs == 0)).all()


def test_small_gaps_are_likelier_the_smaller_the_power() -> None:
    def mean_gap(power: float) -> float:
        data = mqar_examples(500, 256, 4, vocab_size=512, power=power)
        return float(data.queries.double().mean())

    assert mean_gap(0.01) < mean_gap(0.5) < mean_gap(1.0)
    assert abs(mean_gap(1.0) - (8 + 247) / 2) < 6, "1 is uniform"


def test_as_many_pairs_as_there_are_keys_and_places() -> None:
    data = mqar_examples(30, 28, 7, vocab_size=30, seed=2)
    assert all(len(set(row)) == 7 for row in data.inputs[:, 0:14:2].tolist())
    full = mqar_examples(30, 16, 4, vocab_size=18)
    assert sorted(full.queries[0].tolist()) == [8, 10, 12, 14]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 64, 4), "examples and pairs must be at least 1"),
        ((1, 64, 0), "examples and pairs must be at least 1"),
        ((1, 63, 4), "length must be even"),
        ((1, 64, 17), "at least 68 tokens"),
        ((1, 8192, 4), "vocab_size must exceed the length"),
    ],
)
def test_numbers_that_do_not_fit_are_named(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        mqar_examples(*arguments)


def test_a_power_that_is_not_positive_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="power must be positive"):
        mqar_examples(1, 64, 4, power=0.0)
