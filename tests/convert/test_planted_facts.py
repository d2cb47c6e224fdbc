"""Tests of calibration texts with planted facts."""

from __future__ import annotations

import pytest
import torch

from dynamask.convert.calibration import CalibrationBlocks
from dynamask.convert.planted_facts import PlantedFacts, plant_facts
from dynamask.errors import InvalidInputError


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1000 + ord(letter) for letter in text]}


def test_facts_come_back_with_their_answer() -> None:
    batch = torch.arange(800).repeat(2, 1)
    made = plant_facts(batch, Letters(), step=1, facts=2)
    for row in made:
        text = "".join(chr(token - 1000) if token >= 1000 else "." for token in row.tolist())
        sentences = [part.rstrip(".") for part in text.split("\n") if part.strip(".")]
        assert len(sentences) == 4
        values = [sentence.split()[-1] for sentence in sentences]
        assert sorted(values.count(value) for value in set(values)) == [2, 2]
    assert torch.equal(batch, torch.arange(800).repeat(2, 1))
    assert torch.equal(made, plant_facts(batch, Letters(), step=1, facts=2))
    assert not torch.equal(made, plant_facts(batch, Letters(), step=2, facts=2))


def test_a_run_may_start_at_any_step() -> None:
    blocks = CalibrationBlocks(torch.arange(900) % 50, 256, batch=1, repeat_share=0.0)
    planted = PlantedFacts(blocks, Letters(), facts=2)
    steps = planted.from_step(0)
    first = [next(steps) for _ in range(4)]
    assert torch.equal(next(planted.from_step(3)), first[3])
    assert len(list(planted)) == len(planted) == 3
    assert all(bool((block >= 1000).any()) for block in planted)


@pytest.mark.parametrize("facts", [0, 3])
def test_blocks_must_hold_the_facts(facts: int) -> None:
    with pytest.raises(InvalidInputError, match=f"{facts} facts and their questions need blocks of at least"):
        PlantedFacts(CalibrationBlocks(torch.zeros(600, dtype=torch.long), 256), Letters(), facts=facts)
