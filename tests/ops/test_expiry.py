"""key_expiry against its definition, and the definition against what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask import InvalidInputError, key_expiry
from dynamask.ops.expiry import _key_expiry_op, key_expiry_by_definition, key_rank

SPECIAL = [float("nan"), float("inf"), float("-inf"), -0.0, 0.0]


@st.composite
def problems(draw: st.DrawFn) -> dict:
    batch, heads, length = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 18))
    number = st.one_of(st.sampled_from(SPECIAL), st.integers(-2, 2).map(float), st.floats(-1, 1, width=32))
    flat = draw(st.lists(number, min_size=batch * heads * length, max_size=batch * heads * length))
    local, sinks = draw(st.one_of(st.just(0), st.integers(0, length))), draw(st.sampled_from([0, 0, 1, 2, 5]))
    windows = st.integers(max(1, local + sinks), max(length, local + sinks) + 2)
    return {
        "scores": torch.tensor(flat).view(batch, heads, length),
        "window": draw(st.one_of(windows, st.lists(windows, min_size=heads, max_size=heads))),
        "local": local,
        "sinks": sinks,
        "segment_ids": draw(st.one_of(st.none(), rows(batch, length, st.integers(0, 1)).map(lambda t: t.cumsum(-1)))),
        "key_mask": draw(st.one_of(st.none(), masks(batch, length))),
    }


def rows(batch: int, length: int, values: st.SearchStrategy) -> st.SearchStrategy:
    """Tensors (B, N), each row drawn by itself."""
    row = st.lists(values, min_size=length, max_size=length)
    return st.lists(row, min_size=batch, max_size=batch).map(torch.tensor)


def masks(batch: int, length: int) -> st.SearchStrategy:
    """Padding at the left, at the right, or holes anywhere."""
    cuts = st.lists(st.integers(0, length), min_size=batch, max_size=batch).map(torch.tensor)
    left = cuts.map(lambda cut: torch.arange(length) >= cut[:, None])
    return st.one_of(left, left.map(lambda mask: mask.flip(-1)), rows(batch, length, st.booleans()))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_fast_path_is_the_definition(problem: dict) -> None:
    fast = key_expiry(**problem)
    assert fast.dtype == torch.int32
    torch.testing.assert_close(fast, key_expiry_by_definition(**problem))


def seen(expiry: torch.Tensor) -> torch.Tensor:
    """(B, G, N, N) bool: query i sees key j."""
    position = torch.arange(expiry.shape[-1])
    return (position <= position[:, None]) & (position[:, None] < expiry[:, :, None, :])


@settings(max_examples=60, deadline=None)
@given(problems())
def test_what_every_real_query_sees(problem: dict) -> None:
    """Sinks and the newest keys, as many keys as the window holds, and no better key left out than the worst other."""
    batch, heads, length = problem["scores"].shape
    local, sinks, window = problem["local"], problem["sinks"], problem["window"]
    windows = [window] * heads if isinstance(window, int) else window
    segments, mask = problem["segment_ids"], problem["key_mask"]
    sees = seen(key_expiry(**problem))
    for b in range(batch):
        for i in range(length):
            real = mask is None or bool(mask[b, i])
            prefix = [
                j
                for j in range(i + 1)
                if (mask is None or mask[b, j]) and (segments is None or segments[b, j] == segments[b, i])
            ]
            for g in range(heads):
                keys = sees[b, g, i].nonzero().flatten().tolist()
                assert set(keys) <= set(prefix)
                if real:
                    assert len(keys) == min(windows[g], len(prefix))
                    assert set(prefix[:sinks]) | set(prefix[len(prefix) - local :]) <= set(keys) or local > len(prefix)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 18))
def test_a_prefix_has_the_expiry_of_the_whole_cut_off(problem: dict, cut: int) -> None:
    whole = key_expiry(**problem)
    names = ("scores", "segment_ids", "key_mask")
    prefix = problem | {name: problem[name][..., :cut] for name in names if problem[name] is not None}
    expected = whole[..., :cut].clamp(max=min(cut, whole.shape[-1]))
    torch.testing.assert_close(key_expiry(**prefix), expected)


@settings(max_examples=60, deadline=None)
@given(problems(), st.data())
def test_padding_wherever_it_stands_changes_nothing(problem: dict, data: st.DataObject) -> None:
    """The real tokens of a padded row see each other as in the row without its padding."""
    problem = problem | {"key_mask": None}
    batch, heads, length = problem["scores"].shape
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length + 9)))
    mask[: max(0, length - int(mask.sum()))] = True
    place = mask.nonzero().flatten()[:length]
    if len(place) < length:
        place = torch.arange(length)
    mask = torch.zeros(len(mask), dtype=torch.bool).index_fill(0, place, True)
    scores = torch.full((batch, heads, len(mask)), float("inf"))
    scores[..., place] = problem["scores"]
    segments = None
    if problem["segment_ids"] is not None:
        segments = torch.zeros(batch, len(mask), dtype=torch.long)
        segments[:, place] = problem["segment_ids"]
        segments = segments.cummax(-1).values
    padded = problem | {"scores": scores, "segment_ids": segments, "key_mask": mask.expand(batch, -1)}
    sees = seen(key_expiry(**padded))
    torch.testing.assert_close(sees[:, :, place][..., place], seen(key_expiry(**problem)))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_packed_documents_are_separate(problem: dict) -> None:
    problem = problem | {"key_mask": None}
    length = problem["scores"].shape[-1]
    if problem["segment_ids"] is None:
        problem["segment_ids"] = (torch.arange(length) // 4).expand(problem["scores"].shape[0], length)
    packed = key_expiry(**problem)
    for row, segments in enumerate(problem["segment_ids"]):
        for segment in segments.unique():
            at = (segments == segment).nonzero().flatten()
            alone = problem | {"scores": problem["scores"][row : row + 1, :, at], "segment_ids": None}
            torch.testing.assert_close(packed[row : row + 1, :, at], key_expiry(**alone) + at[0].int())


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
    for local, sinks in ((0, 0), (16, 0), (32, 0), (0, 32), (16, 4)):
        expiry = key_expiry(torch.randn(2, 2, 500), [32, 50], local=local, sinks=sinks)
        expected = (torch.arange(500) + 1)[None, :].minimum(torch.tensor([[32], [50]]))
        assert (seen(expiry).sum(-1) == expected).all()


def test_sinks_never_expire_inside_their_segment() -> None:
    scores = torch.full((1, 1, 12), float("inf"))
    scores[..., :2] = float("-inf")
    segments = torch.tensor([[0] * 7 + [1] * 5])
    mask = torch.tensor([[False, True, False] + [True] * 9])
    assert key_expiry(scores, 3, sinks=2, segment_ids=segments, key_mask=mask)[0, 0].tolist() == [
        0, 7, 2, 7, 5, 6, 7, 12, 12, 10, 11, 12,
    ]  # fmt: skip


def test_local_counts_real_tokens() -> None:
    mask = torch.tensor([[True, True, False, False, True, False, True, True]])
    expiry = key_expiry(torch.arange(8.0).flip(0).view(1, 1, 8), 2, local=2, key_mask=mask)
    assert expiry[0, 0].tolist() == [4, 6, 2, 3, 7, 5, 8, 8]


@pytest.mark.parametrize("window", [np.int64(4), np.int32(4), torch.tensor(4), [4, 4], (4, np.int64(4))])
def test_a_window_is_any_integer_or_one_for_every_head(window: object) -> None:
    scores = torch.randn(1, 2, 30)
    assert torch.equal(
        key_expiry(scores, window, local=np.int64(1), sinks=np.int64(1)), key_expiry(scores, 4, local=1, sinks=1)
    )


@pytest.mark.parametrize("window", [[3, 40], np.array([3, 40]), torch.tensor([3, 40]), (3, 40)])
def test_a_window_of_each_head(window: object) -> None:
    scores = torch.randn(2, 2, 30)
    heads = [key_expiry(scores[:, g : g + 1], each, sinks=2) for g, each in enumerate((3, 40))]
    assert torch.equal(key_expiry(scores, window, sinks=2), torch.cat(heads, 1))


def test_operator_is_registered_soundly() -> None:
    scores, mask = torch.randn(1, 2, 12), torch.rand(1, 12) < 0.7
    torch.library.opcheck(_key_expiry_op, (scores, [3, 7], 1, 1, None, mask))
    torch.library.opcheck(_key_expiry_op, (scores, [4, 4], 0, 0, torch.zeros(1, 12, dtype=torch.long), None))


def test_compiles_without_graph_breaks() -> None:
    scores = torch.randn(1, 2, 40)
    for window in (7, [5, 20], np.int64(7)):
        compiled = torch.compile(
            lambda s, w=window: key_expiry(s, w, local=2, sinks=1), fullgraph=True, backend="eager"
        )
        assert torch.equal(compiled(scores), key_expiry(scores, window, local=2, sinks=1))


def test_padding_key_expires_where_it_stands() -> None:
    mask = torch.tensor([[False, False, True, True, False, True]])
    expiry = key_expiry(torch.randn(1, 2, 6), 6, key_mask=mask)
    assert (expiry[:, :, ~mask[0]] == torch.arange(6)[~mask[0]]).all()
    assert (expiry[:, :, mask[0]] == 6).all()


def test_rank_is_a_permutation_with_nan_lowest_and_ties_to_the_later() -> None:
    scores = torch.tensor([[[1.0, float("nan"), 1.0, float("-inf"), -0.0, 0.0]]])
    assert key_rank(scores).tolist() == [[[4, 0, 5, 1, 2, 3]]]


def test_empty_sequence() -> None:
    for shape in ((2, 3, 0), (0, 3, 5), (0, 3, 0)):
        for window in (4, [4, 5, 6]):
            mask = torch.ones(shape[0], shape[2], dtype=torch.bool)
            for function in (key_expiry, key_expiry_by_definition):
                empty = function(torch.zeros(shape), window, sinks=1, segment_ids=mask.long(), key_mask=mask)
                assert empty.shape == shape
                assert empty.dtype == torch.int32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"window": 2.5}, "window must be an integer"),
        ({"window": True}, "window must be an integer"),
        ({"window": "512"}, "window must be an integer"),
        ({"window": None}, "window must be an integer"),
        ({"window": [4, 0]}, r"window\[1\] must be an integer of at least 1"),
        ({"window": [4, 2.0]}, r"window\[1\] must be an integer"),
        ({"window": [4]}, r"one per key/value head \(2\); got 1 windows"),
        ({"window": np.array([[4, 4], [4, 4]])}, r"window\[0\] must be an integer"),
        ({"window": torch.tensor([4.0, 4.0])}, r"window\[0\] must be an integer"),
        ({"local": -1}, "local must be an integer of at least 0"),
        ({"local": 5}, r"local \+ sinks must be at most window = 4"),
        ({"sinks": -1}, "sinks must be an integer of at least 0"),
        ({"sinks": 1.0}, "sinks must be an integer of at least 0"),
        ({"window": [9, 4], "local": 2, "sinks": 3}, "at most the smallest window = 4"),
        ({"segment_ids": torch.tensor([[0, 1, 0, 1, 1, 2]])}, "must not decrease"),
        ({"segment_ids": torch.zeros(1, 5, dtype=torch.long)}, "segment_ids must be integers of shape"),
        ({"key_mask": torch.ones(1, 6)}, "key_mask must be a bool tensor"),
        ({"key_mask": [[True] * 6]}, "key_mask must be a torch.Tensor"),
        ({"segment_ids": [[0] * 6]}, "segment_ids must be a torch.Tensor"),
        ({"scores": None}, "scores must be a torch.Tensor"),
        ({"scores": [[[0.0] * 6]]}, "scores must be a torch.Tensor"),
        ({"scores": torch.zeros(1, 6)}, "scores must be a float tensor"),
        ({"scores": torch.zeros(1, 1, 6, dtype=torch.long)}, "scores must be a float tensor"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    call = {"scores": torch.zeros(1, 2, 6), "window": 4, **arguments}
    with pytest.raises(InvalidInputError, match=message):
        key_expiry(call.pop("scores"), call.pop("window"), **call)
