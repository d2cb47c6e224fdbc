"""Tables and pictures about models and runs."""

from dynamask.reports.curves import draw_curves
from dynamask.reports.live_keys import draw_live_keys, layer_expiry
from dynamask.reports.needle import draw_needle
from dynamask.reports.parameters import parameter_counts

__all__ = ["draw_curves", "draw_live_keys", "draw_needle", "layer_expiry", "parameter_counts"]
