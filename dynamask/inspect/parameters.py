"""Parameter counts of a preset with each mixer, so that models of equal size are compared."""

from __future__ import annotations

import torch

from dynamask.mixers import MIXERS
from dynamask.models import DynamaskForCausalLM, preset


def parameter_counts(preset_name: str) -> dict[str, int]:
    """Count the parameters of a preset's model with each registered mixer, on the meta device (no memory)."""
    counts = {}
    for name in MIXERS:
        with torch.device("meta"):
            model = DynamaskForCausalLM(preset(preset_name, attention=name))
        counts[name] = sum(p.numel() for p in model.parameters())
    return counts
