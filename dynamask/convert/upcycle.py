"""Turn a dense model into one that chooses its keys, with the same logits while the context fits its windows."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from dynamask.convert.architectures import reason_not_convertible
from dynamask.convert.attention import IMPLEMENTATION
from dynamask.convert.models import converted_classes
from dynamask.errors import InvalidInputError
from dynamask.integers import check_integer, check_window, plain_numbers
from dynamask.mixers.rank_predictor import RankPredictor
from dynamask.models.decoder import decoder_of

_NOT_TAKEN = ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype")


def upcycle(
    dense_hf_model: PreTrainedModel,
    window: int,
    *,
    local: int = 128,
    sinks: int = 4,
    dense_layers: Sequence[int] = (),
    rank_predictor_width: int | None = None,
    copy_weights: bool = False,
) -> PreTrainedModel:
    """Give a dense model windows and untrained rank predictors.

    While the context is at most `window` tokens the result computes exactly what the dense model does. Beyond, each
    query sees the first `sinks` positions, the newest `local` and the best-ranked others, `window` in all. Untrained
    ranks are equal, so the newest are the best: train them with `learn_ranks`, then set a window for each head with
    `allocate_windows`. Layers that slide already keep their window and the newest keys, without ranks.

    Args:
        dense_hf_model: a causal LM of Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 2 or 3 (text, without capped
            attention logits), Phi-3, Granite, OLMo 2 or GPT-NeoX.
        window: keys each query keeps, at least local + sinks.
        local: how many of them are the newest positions.
        sinks: how many of them are the first positions.
        dense_layers: indices of layers left as they are, counted from the end if negative. Their cache grows with the
            text.
        rank_predictor_width: hidden units of the rank predictors; None: a quarter of the hidden size; 0: linear.
        copy_weights: copy the weights. By default the result shares them with `dense_hf_model`, so that no second
            model is in memory: whoever trains the one then trains the other. The dense model itself is not changed.

    Returns:
        A causal LM of model_type "dynamask_<original>", on the same device, of the same dtype.

    Raises:
        InvalidInputError: an architecture that is not supported, with the reason; a window below local + sinks; a
            layer out of range.
    """
    if not isinstance(window, Sequence):
        (window,) = check_window(window, local, sinks)
    if isinstance(window, Sequence):
        raise InvalidInputError(f"window must be one integer; got {window!r}. allocate_windows sets one for each head")
    config: Any = getattr(dense_hf_model, "config", None)
    reason = reason_not_convertible(config)
    if reason is not None:
        raise InvalidInputError(f"cannot convert {type(dense_hf_model).__name__}: {reason}")
    config_class, model_class = converted_classes(config.model_type)
    original_class = model_class.__bases__[1]
    if type(dense_hf_model) is not original_class:
        raise InvalidInputError(
            f"upcycle takes causal language models ({original_class.__name__}); got {type(dense_hf_model).__name__}"
        )
    if rank_predictor_width is not None:
        check = ("rank_predictor_width", 0, "hidden units of a rank predictor")
        rank_predictor_width = check_integer(rank_predictor_width, *check)
    layers = range(config.num_hidden_layers)
    dense_layers = plain_numbers(dense_layers)
    inside = range(-len(layers), len(layers))
    if not isinstance(dense_layers, list) or not all(type(index) is int and index in inside for index in dense_layers):
        raise InvalidInputError(
            f"dense_layers must be a list of indices of the {len(layers)} layers; got {dense_layers!r}"
        )
    dense = {layers[index] for index in dense_layers}
    warn_of_dropout(config)
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_TAKEN}
    fields |= {
        "windows": [None if index in dense else window for index in layers] if dense else window,
        "local": operator.index(local),
        "sinks": operator.index(sinks),
        "rank_predictor_width": rank_predictor_width,
        "dtype": config.dtype,
    }
    return _converted(dense_hf_model, config_class(**fields), model_class, copy_weights=copy_weights)


def _converted(original: PreTrainedModel, config: Any, model_class: Any, *, copy_weights: bool) -> PreTrainedModel:
    """Copy the modules, and their tensors only if wanted; make the copy a model of the converted class."""
    tensors = [*original.parameters(), *original.buffers()]
    memo: dict[int, Any] = {} if copy_weights else {id(tensor): tensor for tensor in tensors}
    model: Any = copy.deepcopy(original, memo)
    copied = model.config
    config._attn_implementation = IMPLEMENTATION
    for module in model.modules():
        if getattr(module, "config", None) is copied:
            module.config = config
    model.__class__ = model_class
    first = next(original.parameters())
    dtype = first.dtype if first.is_floating_point() else config.dtype or torch.get_default_dtype()
    model._convert_layers()
    for layer, source in zip(decoder_of(model).layers, decoder_of(original).layers, strict=True):
        for module in layer.modules():
            if isinstance(module, RankPredictor):
                module.apply(model._init_weights)
                place = next(source.parameters()).device  # layers may be on several devices
                module.to(device=place if place.type != "meta" else "cpu", dtype=dtype)
                module.train(original.training)
    return model  # type: ignore[no-any-return]


def warn_of_dropout(config: Any) -> None:
    """Warn where a model has attention dropout, which converted models cannot apply."""
    if getattr(config, "attention_dropout", 0.0):
        warnings.warn(
            f"attention_dropout={config.attention_dropout} has no effect in the converted model: dynamask never "
            "materialises the attention weights it would drop",
            stacklevel=3,
        )
