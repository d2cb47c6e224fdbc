"""Names under which the plugin registers itself with vLLM."""

from __future__ import annotations

BACKEND = "DYNAMASK"
"""The attention backend of the state of live keys, among vLLM's backends for Mamba-like layers."""

STATE = "model.layers.0.dynamask_state"
"""The layer, in vLLM's table of layers, that holds the state of all attention layers. vLLM reads a number off names."""
