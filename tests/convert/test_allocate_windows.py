"""Windows per head meet the budget exactly and follow the ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamask import InvalidInputError, convert
from dynamask.convert.allocate_windows import counts_above_threshold, exact_sum
from tests.conftest import random_ranks


def trained(llama: Any, **options: Any) -> Any:
    return random_ranks(convert.upcycle(llama, 24, **{"local": 4, "sinks": 2, **options}))


@pytest.mark.parametrize("method", ["threshold", "loss"])
@pytest.mark.parametrize("window", [6, 7, 24, 63, 64, 100])
def test_the_mean_is_the_budget(llama: Any, window: int, method: str) -> None:
    model = trained(llama)
    windows = convert.allocate_windows(model, [torch.randint(3, 300, (2, 64))] * 2, window, method=method)
    heads = [head for layer in windows for head in layer]  # type: ignore[union-attr]
    assert sum(heads) == 4 * window
    assert min(heads) >= 6
    assert max(heads) <= max(64, window)
    assert model.config.windows == windows
    assert len(set(heads)) > 1 or window in (6, 64, 100)


def test_layers_left_dense_stay_dense(llama: Any) -> None:
    model = trained(llama, dense_layers=[0])
    windows = convert.allocate_windows(model, [torch.randint(3, 300, (2, 64))], 20)
    assert windows[0] is None
    assert sum(windows[1]) == 40  # type: ignore[arg-type]


def test_bad_input(llama: Any) -> None:
    model = trained(llama)
    with pytest.raises(InvalidInputError, match=r"local . sinks must be at most"):
        convert.allocate_windows(model, [torch.randint(3, 300, (2, 64))], 5)
    with pytest.raises(InvalidInputError, match="method must be one of"):
        convert.allocate_windows(model, [torch.randint(3, 300, (2, 64))], 24, method="best")
    with pytest.raises(InvalidInputError, match="no blocks"):
        convert.allocate_windows(model, [], 24)


def test_logits_that_are_no_numbers_are_refused(llama: Any) -> None:
    model = trained(llama)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InvalidInputError, match="NaN or infinity"):
        convert.allocate_windows(model, [torch.randint(0, 64, (1, 64))], 24, method="loss")


def test_one_threshold_over_all_heads() -> None:
    ranks = torch.stack([torch.linspace(0, 1, 100), torch.linspace(-1, 0.5, 100)])[:, None]
    few, many = sorted(counts_above_threshold([ranks], 30))
    assert few + many == 60
    edges = [
        torch.sort(head, descending=True).values[count] for head, count in zip(ranks[:, 0], (many, few), strict=True)
    ]
    assert abs(edges[0] - edges[1]) < 0.03


def test_ties_are_shared() -> None:
    assert counts_above_threshold([torch.zeros(3, 2, 50)], 20) == [20, 20, 20]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 30), min_size=1, max_size=8), st.integers(0, 20))
def test_exact_sum(wanted: list[float], mean: int) -> None:
    total = mean * len(wanted)
    rounded = exact_sum(torch.tensor(wanted), total, 20)
    assert sum(rounded) == total
    assert all(0 <= each <= 20 for each in rounded)
