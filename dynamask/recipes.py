"""Named configurations: which attention, and how its keys are spread over the layers, for a model of any size.

A recipe is a function of the model's shape and its context. All bounded recipes keep a sixteenth of the context on
average, except `recall`, which keeps an eighth. The forms were compared in the lab's studies locality, scaling, needle
and mqar (`docs/results`); those runs ranked keys as dynamask 0.1 did. Models that learn ranks from the hidden state
from scratch have not been measured yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamask.errors import UsageError, did_you_mean
from dynamask.models import PRESETS, DynamaskConfig, preset, uneven_windows

_LEAST_BUDGET = 4


@dataclass(frozen=True)
class Recipe:
    """A named configuration.

    Attributes:
        description: one sentence for lists and tables.
        fields: (layers, context) -> attention fields of `DynamaskConfig`.
        training: settings of `dynamask.training.TrainConfig` that belong to it.
    """

    description: str
    fields: Callable[[int, int], dict[str, Any]]
    training: Mapping[str, Any] = field(default_factory=dict)


def _budget(context: int, share: int = 16) -> int:
    return max(min(_LEAST_BUDGET, context), context // share)


def _default(layers: int, context: int) -> dict[str, Any]:
    return {"attention": "dma", "ranking": "learned", "windows": uneven_windows(layers, _budget(context))}


def _recall(layers: int, context: int) -> dict[str, Any]:
    return {"attention": "dma", "ranking": "learned", "windows": uneven_windows(layers, _budget(context, 8))}


def _even(layers: int, context: int) -> dict[str, Any]:
    return {"attention": "dma", "ranking": "learned", "windows": _budget(context)}


def _paper(layers: int, context: int) -> dict[str, Any]:
    return {"attention": "dma", "ranking": "paper", "windows": _budget(context)}


def _sliding(layers: int, context: int) -> dict[str, Any]:
    return {"attention": "swa", "windows": uneven_windows(layers, _budget(context))}


def _dense(layers: int, context: int) -> dict[str, Any]:
    return {"attention": "mha"}


RECIPES: dict[str, Recipe] = {
    "default": Recipe("learned ranks; one layer of six wide, the others narrow", _default),
    "recall": Recipe(
        "the same with twice the keys, and windows four times as wide at the start of the training",
        _recall,
        {"window_schedule": [[0.0, 4.0], [0.5, 2.0], [0.7, 1.0]]},
    ),
    "even": Recipe("learned ranks; the same window in all layers", _even),
    "paper": Recipe("the paper's ranks (arXiv 2508.02124); the same window in all layers", _paper),
    "sliding": Recipe("the newest keys and sinks; one layer of six wide, the others narrow", _sliding),
    "dense": Recipe("every key", _dense),
}
"""Recipes by name."""


def get(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        UsageError: an unknown one; the message names the nearest.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}{did_you_mean(name, RECIPES)}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def apply(name: str, shape: str | DynamaskConfig, context: int | None = None, **overrides: Any) -> DynamaskConfig:
    """Configure a model of a given shape by a recipe.

    Args:
        name: one of `RECIPES`.
        shape: name of a preset, or a configuration whose sizes are taken over.
        context: length of the texts it is for, in tokens; None: the shape's `max_position_embeddings`.
        **overrides: fields of `DynamaskConfig`, which win over the recipe's.

    Returns:
        A new configuration.

    Raises:
        UsageError: an unknown recipe, preset or field, or a context below 1.
    """
    recipe = get(name)
    if isinstance(shape, str):
        base: Mapping[str, Any] = preset(shape).to_dict() if shape not in PRESETS else PRESETS[shape]
    else:
        base = shape.to_dict()
    given = {key: value for key, value in base.items() if key in DynamaskConfig.__dataclass_fields__}
    for key in ("local", "sinks", "mla", "nsa", "attention", "windows", "ranking", "transformers_version"):
        given.pop(key, None)  # the recipe's, or derived anew
    sizes = {**given, **overrides}
    if context is None:
        context = sizes["max_position_embeddings"]
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise UsageError(f"context must be an integer of at least 1; got {context!r}")
    fields = recipe.fields(sizes.get("num_hidden_layers", DynamaskConfig.num_hidden_layers), context)
    if context > sizes.get("max_position_embeddings", context):
        fields["max_position_embeddings"] = context
    chosen = {**fields, **overrides}
    if isinstance(shape, str):
        return preset(shape, **chosen)
    return DynamaskConfig(**{**given, **chosen})
