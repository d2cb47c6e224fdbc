"""Tables and pictures about models and runs."""

from dynamask.inspect.curves import draw_curves
from dynamask.inspect.live_keys import draw_live_keys, layer_expiry
from dynamask.inspect.parameters import parameter_counts
from dynamask.inspect.retrieval import draw_needle

__all__ = ["draw_curves", "draw_live_keys", "draw_needle", "layer_expiry", "parameter_counts"]
