"""key_expiry against its definition, and the definition against what it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask import InvalidInputError, key_expiry
from dynamask.expiry import key_expiry_by_definition, key_rank

SPECIAL = [float("nan"), float("inf"), float("-inf"), -0.0, 0.0]


@st.composite
def problems(draw: st.DrawFn) -> dict:
    batch, heads, length = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 18))
    number = st.one_of(st.sampled_from(SPECIAL), st.integers(-2, 2).map(float), st.floats(-1, 1, width=32))
    flat = draw(st.lists(number, min_size=batch * heads * length, max_size=batch * heads * length))
    window = draw(st.integers(1, length + 2))
    segments = draw(st.one_of(st.none(), st.lists(st.integers(0, 1), min_size=length, max_size=length)))
    mask = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=length, max_size=length)))
    return {
        "scores": torch.tensor(flat).view(batch, heads, length),
        "window": window,
        "local": draw(st.integers(0, window)),
        "segment_ids": None if segments is None else torch.tensor([segments] * batch).cumsum(-1),
        "key_mask": None if mask is None else torch.tensor([mask] * batch),
    }


@settings(max_examples=300, deadline=None)
@given(problems())
def test_fast_path_is_the_definition(problem: dict) -> None:
    problem = dict(problem)
    scores, window = problem.pop("scores"), problem.pop("window")
    fast = key_expiry(scores, window, **problem)
    assert fast.dtype == torch.int32
    torch.testing.assert_close(fast, key_expiry_by_definition(scores, window, **problem))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype(dtype: torch.dtype) -> None:
    scores = torch.randn(2, 2, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(key_expiry(scores, 7), key_expiry_by_definition(scores, 7))


def test_equal_scores_are_a_sliding_window() -> None:
    expected = (torch.arange(20) + 6).clamp(max=20).int()
    for local in (0, 3, 6):
        torch.testing.assert_close(key_expiry(torch.zeros(1, 1, 20), 6, local=local)[0, 0], expected)


def test_window_of_the_whole_length_is_dense() -> None:
    assert (key_expiry(torch.randn(2, 3, 33), 33) == 33).all()
    assert (key_expiry(torch.randn(2, 3, 33), 10_000) == 33).all()


def test_work_is_at_most_window_keys_per_query() -> None:
    for local in (0, 16, 32):
        expiry = key_expiry(torch.randn(2, 2, 500), 32, local=local)
        position = torch.arange(500)
        alive = (position <= position[:, None]) & (position[:, None] < expiry[:, :, None, :])
        assert (alive.sum(-1) == (position + 1).clamp(max=32)).all()


def test_padding_key_expires_where_it_stands() -> None:
    mask = torch.tensor([[False, False, True, True, False, True]])
    expiry = key_expiry(torch.randn(1, 2, 6), 6, key_mask=mask)
    assert (expiry[:, :, ~mask[0]] == torch.arange(6)[~mask[0]]).all()
    assert (expiry[:, :, mask[0]] == 6).all()


def test_rank_is_a_permutation_with_nan_lowest_and_ties_to_the_later() -> None:
    scores = torch.tensor([[[1.0, float("nan"), 1.0, float("-inf"), -0.0, 0.0]]])
    assert key_rank(scores).tolist() == [[[4, 0, 5, 1, 2, 3]]]


def test_empty_sequence() -> None:
    assert key_expiry(torch.zeros(2, 3, 0), 4).shape == (2, 3, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"window": 2.5}, "window must be an integer"),
        ({"local": 5}, "local must be an integer from 0 to window = 4"),
        ({"segment_ids": torch.tensor([[0, 1, 0, 1, 1, 2]])}, "must not decrease"),
        ({"segment_ids": torch.zeros(1, 5, dtype=torch.long)}, "segment_ids must be integers of shape"),
        ({"key_mask": torch.ones(1, 6)}, "key_mask must be a bool tensor"),
        ({"scores": torch.zeros(1, 6)}, "scores must be a float tensor"),
        ({"scores": torch.zeros(1, 1, 6, dtype=torch.long)}, "scores must be a float tensor"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    call = {"scores": torch.zeros(1, 1, 6), "window": 4, **arguments}
    with pytest.raises(InvalidInputError, match=message):
        key_expiry(call.pop("scores"), call.pop("window"), **call)
