"""Calibration blocks: what they hold, in which order, and what is refused."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask.convert.calibration import CalibrationBlocks, calibration_blocks
from dynamask.errors import InvalidInputError


class CharacterTokenizer:
    """One token per character."""

    eos_token_id = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def test_one_pass_without_repeats_gives_every_block_once() -> None:
    blocks = CalibrationBlocks(np.arange(64, dtype=np.uint16), 8, batch=3, repeat_share=0.0)
    seen = list(blocks)
    assert [len(batch) for batch in seen] == [3, 3, 2]
    assert len(seen) == len(blocks)
    rows = torch.cat(seen)
    assert rows.dtype == torch.int64
    assert sorted(rows.flatten().tolist()) == list(range(64))
    assert bool((rows.diff(dim=1) == 1).all()), "a block is a piece of the stream"


@settings(max_examples=20, deadline=None)
@given(block=st.integers(2, 33), share=st.sampled_from([0.0, 0.25, 0.5, 1.0]), seed=st.integers(0, 9))
def test_the_share_of_blocks_that_repeat_their_first_half(block: int, share: float, seed: int) -> None:
    blocks = CalibrationBlocks(np.arange(block * 8), block, batch=8, repeat_share=share, seed=seed)
    rows = next(blocks.from_step())
    half = block // 2
    repeated = (rows[:, :half] == rows[:, half : 2 * half]).all(dim=1)
    assert int(repeated.sum()) == int(8 * share)


def test_a_run_that_continues_sees_the_batches_it_would_have_seen() -> None:
    def batches(step: int, count: int) -> list[torch.Tensor]:
        return list(islice(CalibrationBlocks(np.arange(103), 10, batch=4, seed=3).from_step(step), count))

    whole = batches(0, 12)
    for late, expected in zip(batches(7, 5), whole[7:], strict=True):
        assert torch.equal(late, expected)
    assert not torch.equal(whole[0], next(CalibrationBlocks(np.arange(103), 10, batch=4, seed=4).from_step()))


def test_texts_are_joined_by_the_end_of_text_token() -> None:
    blocks = calibration_blocks(["abc", "de"], CharacterTokenizer(), block=7, repeat_share=0.0)
    assert next(iter(blocks)).tolist() == [[97, 98, 99, 0, 100, 101, 0]]
    assert next(iter(calibration_blocks([1, 2, 3, 4], block=4, repeat_share=1.0))).tolist() == [[1, 2, 1, 2]]


class OpeningTokenizer(CharacterTokenizer):
    """One that begins a text with a token of its own."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(character) for character in text]}


def test_texts_begin_as_the_tokenizer_begins_them() -> None:
    blocks = calibration_blocks(["abc", "de"], OpeningTokenizer(), block=9, repeat_share=0.0)
    assert next(iter(blocks)).tolist() == [[1, 97, 98, 99, 0, 1, 100, 101, 0]]


def test_every_block_begins_as_the_tokenizer_begins_a_text() -> None:
    blocks = calibration_blocks(["abcdefgh"], OpeningTokenizer(), block=5, repeat_share=0.5)
    assert [block.tolist() for block in islice(blocks.from_step(), 20) if block[0, 0] != 1] == []
    assert CalibrationBlocks(np.arange(9), 4, opening=[7, 8]).opened(torch.zeros(1, 4).long()).tolist() == [
        [7, 8, 0, 0]
    ]


def test_what_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="4 tokens, fewer than one block of 8"):
        calibration_blocks(["abc"], CharacterTokenizer(), block=8)
    with pytest.raises(InvalidInputError, match="need a tokenizer"):
        calibration_blocks(["abc"], block=8)
    with pytest.raises(InvalidInputError, match="repeat_share"):
        calibration_blocks([1, 2, 3], block=2, repeat_share=1.5)
    with pytest.raises(InvalidInputError, match="vector of integers"):
        calibration_blocks(np.zeros((2, 4)), block=2)
    with pytest.raises(InvalidInputError, match=r"none below 0; got \[-3\]"):
        CalibrationBlocks([1, 2, 3], 2, opening=[-3])
    with pytest.raises(InvalidInputError, match="vector of integers"):
        CalibrationBlocks([1, 2, 3], 2, opening="a")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="must be a string; got int"):
        calibration_blocks(iter([3]), CharacterTokenizer(), block=2)
