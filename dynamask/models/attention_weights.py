"""The refusal of `output_attentions`."""

from __future__ import annotations

from typing import Any

from dynamask.errors import InvalidInputError


def refuse_attention_weights(output_attentions: bool | None, config: Any) -> None:
    """Refuse a forward call that asks for attention weights.

    Args:
        output_attentions: the argument of the call; None: as the configuration says.
        config: the model's configuration.

    Raises:
        InvalidInputError: the call or the configuration asks for them.
    """
    if output_attentions or (output_attentions is None and config.output_attentions):
        raise InvalidInputError(
            "output_attentions: attention weights are never materialised; use dynamask.inspect for the keys that "
            "queries see, or dynamask.future_attention for the largest weight of each key"
        )


__all__ = ["refuse_attention_weights"]
