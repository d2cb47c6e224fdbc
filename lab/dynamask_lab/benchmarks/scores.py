"""Scores of a trained model's layers on real text, saved for benchmarks: the masks that training makes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamask.data.tokenizer import encode_text
from dynamask.errors import UsageError
from dynamask.inspect.key_ranks import ranked_layers
from dynamask.mixers import DynamicMaskGate
from dynamask_lab.legacy import OldGate


def layer_scores(model: Any, input_ids: Tensor) -> Tensor:
    """What the gates of every layer say of every key.

    Args:
        model: a causal LM with dynamic mask attention (a dynamask or a converted model).
        input_ids: (1, N) tokens.

    Returns:
        (layers, G, N) float32.

    Raises:
        UsageError: the model has no dynamic mask gates.
    """
    found = [layer.ranks for layer in ranked_layers(model, input_ids)]
    if not found:
        raise UsageError("the model has no dynamic mask attention, so its keys have no scores")
    return torch.cat(found).float().cpu()


def save_scores(scores: Tensor, path: Path, about: dict[str, Any]) -> None:
    """Write scores compressed.

    Args:
        scores: (layers, G, N) float32.
        path: `.npz` file.
        about: where they come from; saved with them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Byte planes: neighbouring scores share sign, exponent and, rounded by the gate, their last bits.
    planes = np.ascontiguousarray(scores.numpy().view(np.uint8).reshape(*scores.shape, 4).transpose(3, 0, 1, 2))
    np.savez_compressed(path, planes=planes, about=np.array(json.dumps(about)))


def read_scores(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """The scores (layers, G, N) float32 that `save_scores` wrote, and where they come from.

    Raises:
        UsageError: no such file, or not one of these.
    """
    try:
        with np.load(path) as file:
            planes, about = file["planes"], json.loads(str(file["about"]))
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(
            f"{path} holds no scores: write them with `dynamask benchmark scores RUN` ({error})"
        ) from error
    scores = np.ascontiguousarray(planes.transpose(1, 2, 3, 0)).view(np.float32)[..., 0]
    return torch.from_numpy(scores), about


def load_scores(path: Path, groups: int, length: int) -> Tensor:
    """Scores for a problem of `groups` heads: heads of all layers, evenly spaced over the depth.

    Returns:
        (1, groups, length) float32.

    Raises:
        UsageError: the file has fewer heads or positions than asked for.
    """
    scores, _ = read_scores(path)
    heads = scores.flatten(0, 1)
    if heads.shape[0] < groups or heads.shape[1] < length:
        raise UsageError(
            f"{path} has {heads.shape[0]} heads of {heads.shape[1]} positions; {groups} of {length} are needed"
        )
    picked = torch.linspace(0, heads.shape[0] - 1, groups).round().long()
    return heads[picked, :length].unsqueeze(0).contiguous()


def extract_scores(run: str, text: str, length: int, path: Path) -> dict[str, Any]:
    """Read a text with a trained model and save what its gates say.

    Args:
        run: folder of a finished run or of a saved causal LM.
        text: what to read; its first `length` tokens count.
        length: N.
        path: `.npz` file to write.

    Returns:
        What was saved beside the scores: model, window, local part, recency, learned gates, text.

    Raises:
        UsageError: no such run, one without gates, or a text shorter than `length` tokens.
    """
    from dynamask.training import open_run

    model, tokenizer = open_run(run)
    ids = torch.tensor([encode_text(tokenizer, text)[:length]], dtype=torch.long)
    if ids.shape[1] < length:
        raise UsageError(f"the text has {ids.shape[1]} tokens and {length} are asked for: give more text")
    scores = layer_scores(model.eval(), ids)
    config = model.config
    gates = [module.gate.tolist() for module in model.modules() if isinstance(module, (DynamicMaskGate, OldGate))]
    options = getattr(config, "mixer_options", None) or {}
    about = {
        "layers": scores.shape[0],
        "heads": scores.shape[1],
        "length": length,
        "window": options.get("window") or round(config.budget or length),
        "local": options.get("local", config.local),
        "recency": options.get("recency"),
        "score_form": options.get("score_form"),
        "gates": [[round(value, 4) for value in layer] for layer in gates],
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    save_scores(scores, path, about)
    return about
