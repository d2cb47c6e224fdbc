"""Near-duplicate removal: what it must catch, what it must leave, and that signatures estimate similarity."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask.data import Document
from dynamask.errors import InvalidInputError
from dynamask_lab.language.deduplicate import Deduplicator, deduplicated


def text(seed: int, words: int = 400) -> str:
    chooser = random.Random(seed)
    return " ".join(f"w{chooser.randrange(5000)}" for _ in range(words))


def jaccard(one: str, other: str, shingle: int) -> float:
    def shingles(of: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", of)
        return {tuple(words[i : i + shingle]) for i in range(len(words) - shingle + 1)}

    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def test_exact_and_near_duplicates_go_and_others_stay() -> None:
    original = text(0)
    spaced = original.replace(" ", "\n\n  ")
    edited = original.replace(original.split()[200], "changed", 1)
    seen = Deduplicator()
    kept = deduplicated([Document(str(i), t) for i, t in enumerate([original, spaced, edited, text(1)])], seen)
    assert [document.name for document in kept] == ["0", "3"]
    assert (seen.exact, seen.near) == (1, 1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), shared=st.floats(0.0, 1.0))
def test_signatures_agree_as_often_as_the_shingles_are_shared(seed: int, shared: float) -> None:
    one, other = text(2 * seed, 800).split(), text(2 * seed + 1, 800).split()
    cut = int(800 * shared)
    pair = [" ".join(one), " ".join(one[:cut] + other[cut:])]
    deduplicator = Deduplicator(bands=128, rows=4)
    signatures = [deduplicator.signature(re.findall(r"\w+", each)) for each in pair]
    # 512 values: five standard deviations of the estimate.
    assert abs((signatures[0] == signatures[1]).mean() - jaccard(*pair, deduplicator.shingle)) < 0.12


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_texts_that_share_less_than_the_threshold_stay(share: float) -> None:
    seen = Deduplicator(threshold=0.7)
    for seed in range(20):
        one, other = text(2 * seed).split(), text(2 * seed + 1).split()
        cut = int(len(one) * share)
        assert seen.is_new(" ".join(one))
        assert seen.is_new(" ".join(one[:cut] + other[cut:]))


def test_short_and_empty_texts_are_compared_too() -> None:
    seen = Deduplicator()
    assert [seen.is_new(each) for each in ("", "!?", "one", "one", "two words", "two words.")] == [
        *(True, False, True, False),
        *(True, False),
    ]


@pytest.mark.parametrize("field", [{"threshold": 0.0}, {"threshold": 1.5}, {"shingle": 0}, {"bands": 0}])
def test_settings_without_meaning_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(field))):
        Deduplicator(**field)  # type: ignore[arg-type]
