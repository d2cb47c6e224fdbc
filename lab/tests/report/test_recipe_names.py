"""Names of forms in the report: recipes where there is one."""

from __future__ import annotations

import pytest

from dynamask import recipes
from dynamask_lab.report.recipe_names import by_recipe


@pytest.mark.parametrize(
    ("study", "shown"),
    [
        ("sliding + sinks, half rate, one wide layer, w = N/16", "sliding, half rate, 12% of the pairs"),
        ("learned, half rate, slopes, one wide layer, w = N/16", "recall, half rate, slopes, 12% of the pairs"),
        ("learned, one wide layer, w = N/16", "recall, 12% of the pairs"),
        ("learned, slopes, even, w = N/16", "even, slopes, w = N/16"),
        ("learned, even, w = N/8", "even, w = N/8"),
        ("dma, learned, windows 16/352", "recall"),
        ("dma, learned, slopes, windows 16/352", "recall, slopes"),
        ("dma, learned, windows 16/352, forget", "recall, forget"),
        ("swa, sinks, windows 16/352", "sliding"),
        ("swa, sinks, from dense", "sliding, even windows, from dense"),
        ("dma, paper", "paper"),
        ("mha", "dense"),
    ],
)
def test_a_form_with_a_recipe_has_its_name(study: str, shown: str) -> None:
    assert by_recipe(study) == shown
    assert shown.partition(",")[0] in recipes.RECIPES
    assert by_recipe(f"test loss, nats below {study} +0.1") == f"test loss, nats below {shown} +0.1"


@pytest.mark.parametrize(
    ("study", "shown"),
    [
        ("scored, half rate, one wide layer, w = N/16", "scored, half rate, one wide layer, 12% of the pairs"),
        ("dma, gentle, ranked by attention, narrow windows 32", "scored, narrow windows 32"),
        ("dma, learned, slopes, head windows", "learned, slopes, head windows"),
        ("dma, no choice, gentle, windows 32/608", "scored, no choice, windows 32/608"),
        ("dma, windows 32/320, ranked by attention^4", "dma, windows 32/320, ranked by attention^4"),
    ],
)
def test_one_mechanism_has_one_name_in_all_studies(study: str, shown: str) -> None:
    assert by_recipe(study) == shown


@pytest.mark.parametrize("text", ["learned, head windows, w = N/16", "`attention=mha`", "sliding + sinks, wide start"])
def test_what_has_no_recipe_and_code_stay(text: str) -> None:
    assert by_recipe(text) == text
