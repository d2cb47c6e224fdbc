"""Tables, pictures and pages about models and runs."""

from dynamask.inspect.curves import draw_curves
from dynamask.inspect.html_page import inspection_page
from dynamask.inspect.inspection import Inspection, inspect_text
from dynamask.inspect.live_keys import draw_live_keys, layer_expiry
from dynamask.inspect.parameters import parameter_counts
from dynamask.inspect.pieces import token_texts
from dynamask.inspect.retrieval import draw_needle

__all__ = [
    "Inspection",
    "draw_curves",
    "draw_live_keys",
    "draw_needle",
    "inspect_text",
    "inspection_page",
    "layer_expiry",
    "parameter_counts",
    "token_texts",
]
