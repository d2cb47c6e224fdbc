"""Names under which the plugin registers itself with vLLM, and what it registers."""

from __future__ import annotations

BACKEND = "DYNAMASK"
"""The attention backend of the state of live keys, among vLLM's backends for Mamba-like layers."""

STATE = "model.layers.0.dynamask_state"
"""The layer, in vLLM's table of layers, that holds the state of all attention layers. vLLM reads a number off names."""

TESTED_VLLM = "0.32"
"""Release of vLLM that the plugin is tested with. Others are tried, with a warning."""

MODELS = "dynamask.serving.vllm.models"
"""Where the served classes are."""

SERVED = (
    "DynamaskForCausalLM",
    "DynamaskLlamaForCausalLM",
    "DynamaskMistralForCausalLM",
    "DynamaskQwen2ForCausalLM",
    "DynamaskQwen3ForCausalLM",
    "DynamaskGemma2ForCausalLM",
    "DynamaskGemma3ForCausalLM",
    "DynamaskPhi3ForCausalLM",
    "DynamaskGraniteForCausalLM",
)
"""Architectures that the plugin registers, as `config.json` names them."""

NOT_SERVED = {
    "DynamaskSmolLM3ForCausalLM": "vLLM has no model of its own for SmolLM3",
    "DynamaskOlmo2ForCausalLM": "vLLM has no model of its own for OLMo 2",
    "DynamaskGPTNeoXForCausalLM": "the plugin has no model for GPT-NeoX, whose modules vLLM names otherwise",
    "DynamaskDogeForCausalLM": "vLLM has no model of its own for Doge",
}
"""Converted architectures that are refused, and why."""
