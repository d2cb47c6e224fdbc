"""Tables and pictures about models and runs."""

from dynamask.reports.curves import draw_curves
from dynamask.reports.live_keys import draw_live_keys, layer_expiry
from dynamask.reports.parameters import parameter_counts

__all__ = ["draw_curves", "draw_live_keys", "layer_expiry", "parameter_counts"]
