"""Attention as dynamask 0.1 had it, for the studies that were run with it.

Mixers "dma01", "swa01", "mha01" and "mla01" read the options of 0.1 (recency, score_form, ranking="attention",
distance_penalty, rope_layers, ...) from `config.mixer_options`; `config_of_0_1` makes such a configuration from the
fields of 0.1.
"""

from dynamask.mixers import register
from dynamask_lab.legacy.config import config_of_0_1, scheduled_window, set_window
from dynamask_lab.legacy.gate import OldGate
from dynamask_lab.legacy.mixers import OldDense, OldDynamicMask, OldLatent, OldSliding

register("dma01", OldDynamicMask)
register("swa01", OldSliding)
register("mha01", OldDense)
register("mla01", OldLatent)

__all__ = [
    "OldDense",
    "OldDynamicMask",
    "OldGate",
    "OldLatent",
    "OldSliding",
    "config_of_0_1",
    "scheduled_window",
    "set_window",
]
