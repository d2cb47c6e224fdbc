"""Architectures of transformers that are converted, and why others are not."""

from __future__ import annotations

from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """Names of an architecture's classes in transformers."""

    config: str
    model: str


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM"),
    "mistral": Architecture("MistralConfig", "MistralForCausalLM"),
    "qwen2": Architecture("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3Config", "Qwen3ForCausalLM"),
    "smollm3": Architecture("SmolLM3Config", "SmolLM3ForCausalLM"),
    "gemma2": Architecture("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3_text": Architecture("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "phi3": Architecture("Phi3Config", "Phi3ForCausalLM"),
    "granite": Architecture("GraniteConfig", "GraniteForCausalLM"),
    "olmo2": Architecture("Olmo2Config", "Olmo2ForCausalLM"),
    "gpt_neox": Architecture("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "doge": Architecture("DogeConfig", "DogeForCausalLM"),
}
"""transformers' model_type -> its classes. The converted model_type is "dynamask_" + model_type."""

PREFIX = "dynamask_"
"""The converted model_type is this and transformers' own."""

_REASONS = {
    "gpt_oss": "its attention has a learned sink in every head's softmax, which interval attention lacks",
    "gemma3": "it reads images; convert its text model (Gemma3ForCausalLM)",
    "mixtral": "mixture-of-experts models are not tried yet",
    "qwen2_moe": "mixture-of-experts models are not tried yet",
    "qwen3_moe": "mixture-of-experts models are not tried yet",
    "deepseek_v3": "it keeps latent vectors instead of keys and values",
    "llama4_text": "it attends in chunks, whose keys return",
    "doge": "it has a dynamic mask already: use dynamask.convert.from_doge",
}
"""Why well-known architectures are not converted."""


def reason_not_convertible(config: Any) -> str | None:
    """Return why a dense model of this configuration cannot be converted by `upcycle`, or None if it can."""
    kind = str(getattr(config, "model_type", None))
    if kind.startswith(PREFIX):
        return "it is converted already"
    known = ", ".join(sorted(name for name in ARCHITECTURES if name != "doge"))
    if kind not in ARCHITECTURES or kind in _REASONS:
        reason = f": {_REASONS[kind]}" if kind in _REASONS else ""
        return f"architecture {kind!r} is not supported{reason}. Supported: {known}"
    if getattr(config, "attn_logit_softcapping", None):
        return (
            f"its attention caps the logits (attn_logit_softcapping={config.attn_logit_softcapping}), which interval "
            "attention does not compute. A model that was trained without it can be converted with "
            "config.attn_logit_softcapping = None"
        )
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention is bidirectional (use_bidirectional_attention)"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}, which are not attention over all keys or the newest"
    return None


def converted_model_types() -> list[str]:
    """Return the model_types of all converted architectures."""
    return [PREFIX + name for name in ARCHITECTURES]


__all__ = ["ARCHITECTURES", "PREFIX", "Architecture", "converted_model_types", "reason_not_convertible"]
