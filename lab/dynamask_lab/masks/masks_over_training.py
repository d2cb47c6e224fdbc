"""Masks of a run's checkpoints: when, in training, a model begins to choose, and whether it comes to need that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dynamask.errors import UsageError
from dynamask_lab.masks.masks import measure_masks

_KEPT = ("loss", "kept_beyond_window", "lifetimes", "kinds", "gate")
"""Of `measure_masks`' figures, those that a course over steps is drawn of."""


def measure_masks_over_training(
    run: str | Path,
    tokenizer: Any,
    texts: Sequence[Sequence[int]],
    *,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
) -> dict[str, Any]:
    """`measure_masks` of every checkpoint of a run, the same texts each time.

    Args:
        run: folder of the run, with checkpoints (train with `keep` as large as there are to be).
        tokenizer: the run's.
        texts: see `measure_masks`.
        progress: wraps the checkpoints, given a description.

    Returns:
        Plain JSON: "model", "length" and "texts" as `measure_masks` gives them, and "steps", oldest first: a dictionary
        each with "step" and, of that checkpoint, "loss", "kept_beyond_window", "lifetimes", "kinds" and "gate".

    Raises:
        UsageError: a folder without checkpoints.
        InvalidInputError: see `measure_masks`.
    """
    from transformers import AutoModelForCausalLM

    from dynamask.training import checkpoints

    found = checkpoints(Path(run))
    if not found:
        raise UsageError(
            f"{run} holds no checkpoints: train with save_every=STEPS and keep=MANY, so that some are there to compare"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common: dict[str, Any] = {}
    steps: list[dict[str, Any]] = []
    for folder in progress(found, "measuring checkpoints") if progress else found:
        figures = measure_masks(AutoModelForCausalLM.from_pretrained(str(folder)).to(device), tokenizer, texts)
        common = {name: figures[name] for name in ("model", "length", "texts")}
        steps.append({"step": int(folder.name.rpartition("-")[2]), **{name: figures[name] for name in _KEPT}})
    return {**common, "steps": steps}
