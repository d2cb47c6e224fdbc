"""Formats that models of dynamask cannot be exported to, and why."""

from __future__ import annotations

import torch

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


def refuse_onnx_export() -> None:
    """Refuse a forward pass inside of `torch.onnx.export`.

    Raises:
        InvalidInputError: torch records this forward for ONNX.
    """
    # The first question is cheap; the second imports the exporter.
    if (torch.jit.is_tracing() or torch.compiler.is_compiling()) and torch.onnx.is_in_onnx_export():
        raise cannot_export("onnx")
