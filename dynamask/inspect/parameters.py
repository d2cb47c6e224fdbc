"""How many parameters each mixer gives a preset: a comparison is fair only between equals."""

from __future__ import annotations

import torch

from dynamask.mixers import MIXERS
from dynamask.models import DynamaskForCausalLM, preset


def parameter_counts(preset_name: str) -> dict[str, int]:
    """Parameters of the preset's model with each registered mixer; built on the meta device, no memory taken."""
    counts = {}
    for name in MIXERS:
        with torch.device("meta"):
            model = DynamaskForCausalLM(preset(preset_name, attention=name))
        counts[name] = sum(p.numel() for p in model.parameters())
    return counts
