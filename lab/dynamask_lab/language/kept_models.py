"""Trained models of a sweep, kept for what its results do not say: benchmark tasks, masks, generation.

`dynamask experiment scaling --keep-models FOLDER` leaves one folder per run in FOLDER, which `dynamask evaluate`,
`dynamask report masks` and transformers' `from_pretrained` read: weights, configuration, the corpus's tokenizer where
it has one, and `run.json` with what was trained and its loss.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dynamask.errors import UsageError
from dynamask_lab.language.data import tokenizer_folder
from dynamask_lab.sweeps.registry import Config
from dynamask_lab.sweeps.results import run_key

KEPT_FOLDER = "DYNAMASK_KEEP_MODELS"
"""Environment variable, which workers inherit: where models go. Not set: they are not kept."""

RUN_FILE = "run.json"


def keep(model: Any, config: Config, loss: float) -> None:
    """Save a trained model where `KEPT_FOLDER` says; without it, do nothing.

    A kill leaves no half a model: the folder gets its name when everything is in it.

    Args:
        model: a transformers model.
        config: fields of `LanguageConfig`, whose key names the folder.
        loss: on the validation split, nats per token.
    """
    if not os.environ.get(KEPT_FOLDER):
        return
    place = Path(os.environ[KEPT_FOLDER]) / run_key("language", config)
    if place.exists():
        return
    partial = place.with_suffix(".partial")
    model.save_pretrained(partial)
    tokenizer = tokenizer_folder(config["corpus"])
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            (partial / file.name).write_bytes(file.read_bytes())
    (partial / RUN_FILE).write_text(json.dumps({"config": config, "loss": loss}, indent=1))
    partial.rename(place)


def kept(folder: str | Path) -> tuple[Config, float]:
    """What a kept model was trained as, and its validation loss in nats per token.

    Raises:
        UsageError: a folder that no sweep left.
    """
    file = Path(folder) / RUN_FILE
    if not file.is_file():
        raise UsageError(
            f"{folder} has no {RUN_FILE}, so no sweep left it: keep models with `dynamask experiment scaling "
            "--keep-models FOLDER`, and name one of the folders in it"
        )
    told = json.loads(file.read_text())
    return told["config"], told["loss"]
