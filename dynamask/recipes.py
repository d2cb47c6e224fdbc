"""Named configurations: which attention, and how its keys are spread over the layers, for a model of any size.

A recipe is a function of the model's shape and its context. `default` and `recall` share their windows: a 64th of the
context in most layers, 11 of its 32 parts in one layer of six. They differ in what fills the wide windows. The newest
keys gave the lowest loss on text of all forms that are bounded and need no change of the logits, learned ranks found
more beyond the widest window. The lab's studies scratch and needle measured these very fields (`docs/quality.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dynamask.errors import UsageError, did_you_mean
from dynamask.models.presets import PRESETS, preset
from dynamask.models.windows import default_sinks, uneven_windows

if TYPE_CHECKING:
    from dynamask.models import DynamaskConfig

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


def _budget(context: int) -> int:
    return max(min(_LEAST_BUDGET, context), context // 16)


def _one_wide(layers: int, context: int) -> tuple[list[int], int]:
    """A 64th of the context in most layers, in one of six the rest of what is 9/128 on average; and that 64th."""
    mean = max(min(_LEAST_BUDGET, context), context * 9 // 128)
    narrow = max(1, context // 64)
    return uneven_windows(layers, mean, narrow=narrow), narrow


def _newest(layers: int, context: int) -> dict[str, Any]:
    return {"attention": "swa", "windows": _one_wide(layers, context)[0]}


def _recall(layers: int, context: int) -> dict[str, Any]:
    windows, narrow = _one_wide(layers, context)
    # The narrow layers hold sinks and the newest keys alone; the wide ones keep as many of the newest.
    local = narrow - default_sinks(narrow)
    return {"attention": "dma", "ranking": "learned", "windows": windows, "local": local}


def _even(layers: int, context: int) -> dict[str, Any]:
    return {"attention": "dma", "ranking": "learned", "windows": _budget(context)}


def _paper(layers: int, context: int) -> dict[str, Any]:
    return {"attention": "dma", "ranking": "paper", "windows": _budget(context)}


def _dense(layers: int, context: int) -> dict[str, Any]:
    return {"attention": "mha"}


RECIPES: dict[str, Recipe] = {
    "default": Recipe("the newest keys and sinks; one layer of six wide, the others narrow", _newest),
    "recall": Recipe("learned ranks in the same windows: finds more beyond them", _recall),
    "even": Recipe("learned ranks; the same window in all layers", _even),
    "paper": Recipe("the paper's ranks (arXiv 2508.02124); the same window in all layers", _paper),
    "sliding": Recipe("the same as default, by its mechanism's name", _newest),
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
    from dynamask.models import DynamaskConfig

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
    if "windows" in overrides:
        fields.pop("local", None)  # it belongs to the recipe's windows
    chosen = {**fields, **overrides}
    if isinstance(shape, str):
        return preset(shape, **chosen)
    return DynamaskConfig(**{**given, **chosen})
