"""Where a causal LM keeps its decoder, and a decoder layer its attention: the names differ between architectures."""

from __future__ import annotations

from typing import Any

from torch import nn

_ATTENTION = ("mixer", "self_attn", "attention")
_OUTPUT = ("o_proj", "dense")


def decoder_of(model: Any) -> Any:
    """Return the decoder of a causal LM: what maps tokens to hidden states, with `layers`."""
    return model.base_model


def attention_of(layer: nn.Module) -> Any:
    """Return the attention module of a decoder layer.

    Raises:
        AttributeError: a layer without one.
    """
    return _first(layer, _ATTENTION)


def output_projection_of(attention: nn.Module) -> Any:
    """Return the module that maps what the heads give to the hidden size.

    Raises:
        AttributeError: attention without one.
    """
    return _first(attention, _OUTPUT)


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    for name in names:
        found = getattr(module, name, None)
        if found is not None:
            return found
    raise AttributeError(f"{type(module).__name__} has none of {', '.join(names)}")


__all__ = ["attention_of", "decoder_of", "output_projection_of"]
