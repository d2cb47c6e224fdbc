"""Save the rank predictors and windows of a converted model in one small file, and apply them to a dense model's copy.

The file is safetensors. Its tensors are the predictors' parameters and a sample of the model's embeddings; its
metadata holds the windows, slopes, `local`, `sinks` and the shapes that the predictors were trained for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dynamask.convert.models import check_converted
from dynamask.errors import InvalidInputError
from dynamask.mixers.rank_predictor import RankPredictor

FORMAT = "dynamask-ranks-1"
"""The metadata's `format`. Another one is refused."""

_SAMPLE = "model.embedding_sample"
_SAMPLE_ROWS, _SAMPLE_COLUMNS = 256, 8
_LEAST_CORRELATION = 0.9
"""Fine-tuned and quantised copies of a model stay well above, other models are near zero."""
_SHAPES = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
_SETTINGS = ("local", "sinks", "rank_predictor_width")


def save_ranks(model: Any, file: str | Path, *, notes: Mapping[str, str] | None = None) -> Path:
    """Save the rank predictors, windows, slopes, `local` and `sinks` of a converted model, without the model.

    Args:
        model: a model that `upcycle` made, with trained ranks.
        file: the file to write, whole or not at all; usually `.safetensors`.
        notes: further metadata, such as the model's name, the training steps or the context that the windows are for.

    Returns:
        The file.

    Raises:
        InvalidInputError: a model without learned ranks, untrained ranks, values that are not finite, or a note whose
            name the format uses itself.
    """
    check_converted(model, "save_ranks")
    config = model.config
    if not config.trained_ranks:
        raise InvalidInputError("save_ranks: the ranks of this model are untrained. Train them with learn_ranks first")
    tensors = {name: value.detach().cpu().contiguous() for name, value in _parameters(model)}
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise InvalidInputError(f"save_ranks: {name} holds NaN or infinity")
    tensors[_SAMPLE] = _sample(model)
    described = {name: getattr(config, name) for name in (*_SHAPES, *_SETTINGS)}
    metadata = {name: json.dumps(value) for name, value in described.items()}
    metadata |= {"format": FORMAT, "windows": json.dumps(config.windows)}
    if config.slopes is not None:
        metadata["slopes"] = json.dumps(config.slopes)
    taken = sorted(metadata.keys() & (notes or {}).keys())
    if taken:
        raise InvalidInputError(f"save_ranks: notes cannot be named {', '.join(taken)}: the format uses these names")
    metadata |= {name: str(value) for name, value in (notes or {}).items()}
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@torch.no_grad()
def load_ranks(model: Any, file: str | Path) -> dict[str, str]:
    """Apply saved rank predictors, windows, slopes, `local` and `sinks` to a converted model.

    Args:
        model: what `upcycle` returned for the dense model that the predictors were trained on, or for a fine-tuned or
            quantised copy of it; any window. Changed in place, or not at all where an error is raised.
        file: what `save_ranks` wrote.

    Returns:
        The file's metadata: `windows`, `local` and `sinks` as JSON, and the notes.

    Raises:
        InvalidInputError: no such file, a damaged file or one of another kind; a model of another architecture or
            other shapes; a model of the same shapes with other weights.
    """
    check_converted(model, "load_ranks")
    tensors, metadata = _read(Path(file))
    config = model.config
    try:
        described = {name: json.loads(metadata[name]) for name in (*_SHAPES, *_SETTINGS, "windows")}
        described["slopes"] = json.loads(metadata.get("slopes", "null"))
    except (KeyError, json.JSONDecodeError) as error:
        raise InvalidInputError(f"load_ranks: the metadata of {file} is incomplete ({error}): save it again") from error
    others = [name for name in _SHAPES if described[name] != getattr(config, name)]
    if others:
        shown = ", ".join(f"{name} {described[name]!r} (this model: {getattr(config, name)!r})" for name in others)
        raise InvalidInputError(f"load_ranks: the predictors of {file} are for another model: {shown}")
    own = dict(_parameters(model))
    wrong = sorted(own.keys() ^ (tensors.keys() - {_SAMPLE}))
    wrong = wrong or [name for name, value in own.items() if value.shape != tensors[name].shape]
    if wrong:
        width, mine = described["rank_predictor_width"], config.rank_predictor_width
        raise InvalidInputError(
            f"load_ranks: the predictors of {file} do not fit this model, first in {wrong[0]}. Convert it with the "
            f"same dense_layers and rank_predictor_width={width} (now {mine})"
        )
    _check_weights(model, tensors.get(_SAMPLE), file)
    _apply_windows(config, described, file)
    for name, value in own.items():
        value.copy_(tensors[name])
    config.trained_ranks = True
    return {name: value for name, value in metadata.items() if name != "format"}


def _apply_windows(config: Any, described: dict[str, Any], file: str | Path) -> None:
    """Set all of them together; a window may be too small for the old `local` or the new one."""
    names = ("windows", "local", "sinks", "slopes")
    before = {name: getattr(config, name) for name in names}
    ranked = config.ranked_layers
    try:
        for name in names:
            setattr(config, name, described[name])
        config.__dict__.pop("_head_windows", None)  # remembered for the windows alone
        if config.ranked_layers != ranked:
            raise InvalidInputError(f"its layers that choose keys are not this model's {ranked}")
        _ = config.head_slopes  # checked when they are resolved
    except Exception as error:
        for name in names:
            setattr(config, name, before[name])
        config.__dict__.pop("_head_windows", None)
        raise InvalidInputError(f"load_ranks: the windows of {file} do not fit this model: {error}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise InvalidInputError(f"load_ranks: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise InvalidInputError(
                    f"load_ranks: {path} was not written by save_ranks: its format is {metadata.get('format')!r}, "
                    f"not {FORMAT!r}"
                )
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(f"load_ranks: {path} is damaged or no safetensors file: {error}") from error


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, RankPredictor):
            for inner, parameter in module.named_parameters():
                yield f"{name}.{inner}", parameter


def _sample(model: Any) -> Tensor:
    """Return the same few embeddings of every copy of a model, (256, 8) or fewer, float32."""
    weight = model.get_input_embeddings().weight.detach()
    return weight[:_SAMPLE_ROWS, :_SAMPLE_COLUMNS].float().cpu().contiguous().clone()


def _check_weights(model: Any, sample: Tensor | None, file: str | Path) -> None:
    if sample is None:
        raise InvalidInputError(f"load_ranks: {file} lacks the sample of the model's embeddings: save it again")
    mine = _sample(model)
    alike = 0.0
    if mine.shape == sample.shape:
        alike = float(torch.corrcoef(torch.stack([mine.flatten(), sample.flatten()]))[0, 1])
    if not alike >= _LEAST_CORRELATION:  # NaN too
        raise InvalidInputError(
            f"load_ranks: the predictors of {file} were trained on a model with other weights: its embeddings "
            f"correlate with this model's by {alike:.2f}, expected at least {_LEAST_CORRELATION}. Train predictors "
            "for this model with learn_ranks"
        )


__all__ = ["load_ranks", "save_ranks"]
