"""Colour, marker and dash of each mechanism in all pictures, distinguishable without colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's palette, which survives every common colour blindness.
BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK, GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00"),
    *("#56B4E9", "#CC79A7", "#000000", "#7F7F7F"),
)

MECHANISMS: dict[str, dict[str, Any]] = {
    "dma": {"color": BLUE, "marker": "o", "linestyle": "-", "linewidth": 2.2},
    "dma, paper": {"color": SKY, "marker": "D", "linestyle": "-"},
    "mha": {"color": BLACK, "marker": "s", "linestyle": "--"},
    "swa": {"color": ORANGE, "marker": "^", "linestyle": "--"},
    "mla": {"color": GREEN, "marker": "v", "linestyle": "-."},
    "nsa": {"color": RED, "marker": "P", "linestyle": ":"},
}
_SPARE = [
    {"color": color, "marker": marker, "linestyle": "-"}
    for color, marker in zip((PINK, GREY, "#8C510A", "#332288", "#117733", "#882255"), "X*<>hp", strict=True)
]


def line_style(name: str, number: int = 0) -> dict[str, Any]:
    """Return keyword arguments of `axes.plot` for a mechanism; for an unknown name, those of its number."""
    if name in MECHANISMS:
        return dict(MECHANISMS[name])
    # Six looks, then the same six dashed.
    dashes = "-" if number // len(_SPARE) % 2 == 0 else (0, (2, 1))
    return _SPARE[number % len(_SPARE)] | {"linestyle": dashes}


def save_figure(figure: Any, picture: str | Path) -> Path:
    """Write a matplotlib figure, the same bytes for the same figure and version of matplotlib.

    Args:
        figure: what to write.
        picture: file, by its suffix .svg, .png or .pdf.
    """
    import matplotlib

    path = Path(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    # By default ids of a drawing are random, and a date is written.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "dynamask", "svg.fonttype": "path"}):
        figure.savefig(path, dpi=150, metadata=metadata)
    return path
