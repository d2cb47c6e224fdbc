"""Turn existing models into models whose attention runs on dynamask, with the same logits.

`from_doge` takes a released Dynamic Mask Attention model; `upcycle` gives a dense model zero-initialised gates, in all
layers or most, so that it stays exactly the dense model while the context fits the window, and trains sparse beyond.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import DogeForCausalLM, PreTrainedModel

from dynamask.convert.models import CONVERTED
from dynamask.errors import InvalidInputError
from dynamask.models.configuration import RANKINGS
from dynamask.models.windows import uneven_windows
from dynamask.ops.checks import check_window

_OWN_FIELDS = ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "sliding_window")


def from_doge(doge_for_causal_lm: PreTrainedModel) -> PreTrainedModel:
    """A Doge model (dense or mixture-of-experts) with its attention on dynamask: same logits, O(N·w) work.

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
    if not isinstance(doge_for_causal_lm, DogeForCausalLM):
        raise InvalidInputError(f"from_doge takes a DogeForCausalLM; got {type(doge_for_causal_lm).__name__}")
    config = doge_for_causal_lm.config
    if config.sliding_window is not None:
        raise InvalidInputError(
            f"this Doge model has sliding_window={config.sliding_window} besides keep_window_size="
            f"{config.keep_window_size}: a key dropped inside a sliding window can return, which an interval mask "
            "cannot express. Set config.sliding_window = None if the model was trained without it."
        )
    _warn_of_dropout(config)
    state = {
        name.replace("self_attn.A", "self_attn.gate.gate").replace("self_attn.dt_proj.", "self_attn.gate.delta."): t
        for name, t in doge_for_causal_lm.state_dict().items()
    }
    layers = config.num_hidden_layers
    window = config.keep_window_size
    fields = {"window": window, "local": 0, "layer_windows": [window] * layers, "layer_locals": [0] * layers}
    return _build(doge_for_causal_lm, state, fields, strict=True)


def upcycle(
    dense_hf_model: PreTrainedModel,
    window: int,
    *,
    local: int | None = None,
    dense_layers: Sequence[int] = (),
    layer_windows: Sequence[int] | str | None = None,
    ranking: str = "learned",
) -> PreTrainedModel:
    """A dense model with a zero-initialised DMA gate on every attention layer, or on most.

    Args:
        dense_hf_model: a causal LM of Llama, Mistral, Qwen2, Qwen3 or SmolLM shape. Its weights are copied.
        window: keys each query keeps, at least 1.
        local: how many of them are the newest positions; default half the window, so that training the gates
            cannot throw the neighbours away.
        dense_layers: indices of layers left as they are, counted from the end if negative. Their cache grows with the
            text; a few among many help quality (`docs/results`, locality).
        layer_windows: windows that differ, one per layer, or "uneven": `window` on average, one layer in six wide (see
            `uneven_windows`) and the others a quarter of it, no less, since they have learnt to look everywhere.
            `local` is then that of a layer whose window is `window`; the others' go with their own.
        ranking: what decides which keys are kept, see `DynamaskConfig`.

    Returns:
        A causal LM of model_type "dynamask_<original>", same device and dtype. While the context is at most
        `window` tokens (the narrowest layer's) it computes exactly what the dense model does; beyond, untrained gates
        make it a sliding window, and training makes it choose. A layer that already slides keeps the shorter of the
        two windows.

    Raises:
        InvalidInputError: an architecture that is not supported, window, local or a layer out of range, another number
            of windows than of layers, or an unknown ranking.
    """
    if type(dense_hf_model) not in CONVERTED or isinstance(dense_hf_model, DogeForCausalLM):
        known = ", ".join(cls.__name__ for cls in CONVERTED if cls is not DogeForCausalLM)
        raise InvalidInputError(f"upcycle takes one of {known}; got {type(dense_hf_model).__name__}")
    if local is None:
        local = window // 2 if isinstance(window, int) else 0
    check_window(window, local)
    if ranking not in RANKINGS:
        raise InvalidInputError(f"ranking must be one of {', '.join(RANKINGS)}; got {ranking!r}")
    config: Any = dense_hf_model.config
    layers = range(config.num_hidden_layers)
    for index in dense_layers:
        if not -len(layers) <= index < len(layers):
            raise InvalidInputError(f"dense_layers are indices of the {len(layers)} layers; got {index}")
    dense = {layers[index] for index in dense_layers}
    narrow = max(1, window // 4)
    if layer_windows == "uneven":
        layer_windows = uneven_windows(len(layers), window, narrow=narrow)
    wanted: Any = layer_windows or [window] * len(layers)
    if len(wanted) != len(layers):
        raise InvalidInputError(
            f"layer_windows gives the window of each of the {len(layers)} layers; got {len(wanted)} windows"
        )
    _warn_of_dropout(config)
    kinds = getattr(config, "layer_types", None) or []
    sliding: Any = getattr(config, "sliding_window", None)
    windows: list[int | None] = []
    locals_: list[int] = []
    for index in layers:
        slides = sliding is not None and (kinds[index] == "sliding_attention" if kinds else True)
        own = min(wanted[index], sliding) if slides else wanted[index]
        share = local * wanted[index] // window
        windows.append(own if index not in dense else sliding if slides else None)
        locals_.append(min(share, own) if index not in dense else sliding if slides else 0)
    fields = {"window": window, "local": local, "layer_windows": windows, "layer_locals": locals_}
    fields |= {"ranking": ranking}
    return _build(dense_hf_model, dense_hf_model.state_dict(), fields, strict=False)


def _build(original: PreTrainedModel, state: dict[str, Any], own: dict[str, Any], *, strict: bool) -> PreTrainedModel:
    """The converted twin; own: fields of its configuration that the original's lacks."""
    config_class, model_class = CONVERTED[type(original)]
    fields = {name: value for name, value in original.config.to_dict().items() if name not in _OWN_FIELDS}
    if fields.get("layer_types"):
        fields["layer_types"] = ["full_attention"] * len(fields["layer_types"])  # the windows do the sliding now
    if "use_sliding_window" in fields:
        fields["use_sliding_window"] = False
    if hasattr(config_class, "sliding_window"):
        fields["sliding_window"] = None
    fields |= own
    first = next(original.parameters())
    model = model_class(config_class(**fields)).to(device=first.device, dtype=first.dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    left = unexpected + [name for name in missing if strict or not (".gate." in name or ".rank_predictor." in name)]
    if left:
        raise InvalidInputError(f"weights that do not fit {model_class.__name__}: {', '.join(left[:5])}")
    model.tie_weights()
    if getattr(original, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(original.generation_config)
    return model.train(original.training)


def _warn_of_dropout(config: Any) -> None:
    if getattr(config, "attention_dropout", 0.0):
        warnings.warn(
            f"attention_dropout={config.attention_dropout} has no effect in the converted model: dynamask never "
            "materialises the attention weights it would drop",
            stacklevel=3,
        )
