"""Formats that models of dynamask cannot be exported to, and why."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticLayer

from dynamask.cache import BoundedLayer
from dynamask.errors import InvalidInputError

REASONS = {
    "onnx": (
        "ONNX has no operator for attention whose keys expire, and a graph of it cannot hold a cache that chooses what "
        "it keeps: an exported model would attend to every key or to wrong ones"
    ),
    "gguf": (
        "GGUF files are read by llama.cpp, whose architectures have neither rank predictors nor a cache that drops "
        "keys by rank: it would refuse the model, or run it as a dense one, with other answers and a cache of all keys"
    ),
}
"""Format -> why a model of dynamask cannot be exported to it."""

_INSTEAD = "Serve it with transformers or with vLLM (dynamask.serving.vllm), or export the dense model it was made from"


def cannot_export(form: str) -> InvalidInputError:
    """Make the error that refuses an export.

    Args:
        form: "onnx" or "gguf".
    """
    return InvalidInputError(f"a dynamask model cannot be exported to {form.upper()}: {REASONS[form]}. {_INSTEAD}")


class SavedAsSafetensors:
    """Mixed in before a model: `save_pretrained` refuses formats of other programs."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_format: str | None = None, **kwargs: Any
    ) -> Any:
        """Save the model, see transformers.

        Args:
            save_directory: the folder.
            args, kwargs: as transformers' method.
            save_format: None or "safetensors". transformers' method ignores the argument.

        Raises:
            InvalidInputError: another format. Nothing is written.
        """
        form = None if save_format is None else str(save_format).lower()
        if form in REASONS:
            raise cannot_export(form)
        if form not in (None, "safetensors"):
            raise InvalidInputError(f"save_format must be None or 'safetensors'; got {save_format!r}")
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def cache_of_export(cache: Cache | None, use_cache: bool | None) -> bool | None:
    """Settle which cache a forward pass inside of `torch.export` has: none, or one of all keys that is given.

    Args:
        cache: given to the forward.
        use_cache: given to the forward.

    Returns:
        `use_cache`, False where it was left open inside of `torch.export`.

    Raises:
        InvalidInputError: inside of `torch.export`, a bounded cache or the wish for one, or a static cache.
    """
    if not torch.compiler.is_exporting():
        return use_cache
    if cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers):
        raise InvalidInputError(
            "torch.export cannot hold a static cache of a dynamask model: which of its slots are filled is known at "
            "run time only. Export with use_cache=False, or with past_key_values=DynamicCache()"
        )
    bounded = cache is not None and any(isinstance(layer, BoundedLayer) for layer in cache.layers)
    if bounded or (cache is None and use_cache):
        raise InvalidInputError(
            "torch.export cannot hold a bounded cache, whose size and contents depend on the ranks of the keys: export "
            "with use_cache=False, or with past_key_values=DynamicCache(), which keeps all keys"
        )
    return use_cache if cache is not None else False


def refuse_onnx_export() -> None:
    """Refuse a forward pass inside of `torch.onnx.export`.

    Raises:
        InvalidInputError: torch records this forward for ONNX.
    """
    # The first question is cheap; the second imports the exporter.
    if (torch.jit.is_tracing() or torch.compiler.is_compiling()) and torch.onnx.is_in_onnx_export():
        raise cannot_export("onnx")
