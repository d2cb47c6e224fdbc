"""Doge, the model of the Dynamic Mask Attention paper (arXiv 2508.02124), with the paper's ranking."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from dynamask.convert.models import converted_classes
from dynamask.convert.upcycle import warn_of_dropout
from dynamask.errors import InvalidInputError

_NOT_TAKEN = ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "sliding_window")


def from_doge(doge_for_causal_lm: PreTrainedModel) -> PreTrainedModel:
    """Put the attention of a Doge model (dense or mixture-of-experts) on dynamask: same logits, O(N·w) work.

    Args:
        doge_for_causal_lm: a `transformers.DogeForCausalLM`. Its weights are copied, the model left alone.

    Returns:
        A causal LM of model_type "dynamask_doge", on the same device, of the same dtype. Its logits are those
        of Doge in eager mode. Where Doge's top-k meets equal scores its choice is unspecified; here the later
        position wins.

    Raises:
        InvalidInputError: not a Doge model, or one with a sliding window (top-w inside a sliding window lets a
            dropped key return, so its mask is not an interval).
    """
    from transformers import DogeForCausalLM

    if not isinstance(doge_for_causal_lm, DogeForCausalLM):
        raise InvalidInputError(f"from_doge takes a DogeForCausalLM; got {type(doge_for_causal_lm).__name__}")
    original: Any = doge_for_causal_lm
    config = original.config
    if config.sliding_window is not None:
        raise InvalidInputError(
            f"this Doge model has sliding_window={config.sliding_window} besides keep_window_size="
            f"{config.keep_window_size}: a key dropped inside a sliding window can return, which an interval mask "
            "cannot express. Set config.sliding_window = None if the model was trained without it."
        )
    warn_of_dropout(config)
    config_class, model_class = converted_classes("doge")
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_TAKEN}
    if fields.get("layer_types"):
        fields["layer_types"] = ["full_attention"] * len(fields["layer_types"])
    fields |= {"sliding_window": None, "windows": config.keep_window_size, "local": 0, "sinks": 0, "ranking": "paper"}
    first = next(original.parameters())
    model = model_class(config_class(**fields)).to(device=first.device, dtype=first.dtype)
    model.load_state_dict(
        {
            name.replace("self_attn.A", "self_attn.gate.gate").replace("self_attn.dt_proj.", "self_attn.gate.delta."): t
            for name, t in original.state_dict().items()
        }
    )
    model.tie_weights()
    if getattr(original, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(original.generation_config)
    return model.train(original.training)  # type: ignore[no-any-return]
