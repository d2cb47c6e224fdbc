"""Windows of layers and KV heads: the values of a configuration, its defaults, and changes in training."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from dynamask.errors import InvalidInputError
from dynamask.integers import check_integer, check_window, plain_numbers

HeadWindows = tuple[tuple[int, ...], ...]
"""Keys that each query keeps, per layer and KV head."""

Slopes = list[list[float] | None] | None
"""How much ranks rise per token, in nats: None for not at all, or per layer None or one number per KV head."""

NARROW_WINDOW = 32
"""Keys of a narrow layer of `uneven_windows`, at most."""

_MAX_LOCAL = 128
_SINKS = 4


def resolved_head_windows(windows: int | Sequence[int | Sequence[int]], layers: int, heads: int) -> HeadWindows:
    """Spell out a setting `windows` for every layer and KV head.

    Args:
        windows: one number, one per layer, or one list of `heads` numbers per layer.
        layers: number of layers L.
        heads: number of KV heads G.

    Returns:
        L x G integers.

    Raises:
        InvalidInputError: another number of layers or heads, or a window that is not an integer of at least 1.
    """
    if isinstance(windows, (str, bytes)) or not isinstance(windows, Sequence):
        return ((_window(windows),) * heads,) * layers
    if len(windows) != layers:
        raise InvalidInputError(
            f"windows is one number, or one entry for each of the {layers} layers; got {len(windows)} entries"
        )
    found = []
    for index, layer in enumerate(windows):
        if isinstance(layer, (str, bytes)) or not isinstance(layer, Sequence):
            found.append((_window(layer),) * heads)
            continue
        if len(layer) != heads:
            raise InvalidInputError(
                f"windows of layer {index}: one number, or one for each of the {heads} KV heads; got {len(layer)}"
            )
        found.append(tuple(_window(window) for window in layer))
    return tuple(found)


def _window(window: Any) -> int:
    check_window(window, 0)
    return operator.index(window)


def default_local(smallest: int) -> int:
    """Return the newest positions kept by default: half the smallest window, at most 128."""
    return min(_MAX_LOCAL, smallest // 2)


def default_sinks(smallest: int) -> int:
    """Return the first positions kept by default: 4, or a quarter of a smallest window below 16."""
    return min(_SINKS, smallest // 4)


def check_kept_keys(smallest: int, local: int, sinks: int) -> None:
    """Raise InvalidInputError unless `local` and `sinks` are integers of at least 0 that fit in the smallest window."""
    check_integer(local, "local", 0, "newest keys that are always kept")
    check_integer(sinks, "sinks", 0, "first keys of a segment that are always kept")
    if local + sinks > smallest:
        raise InvalidInputError(
            f"local + sinks must be at most the smallest window; got {local} + {sinks} and a window of {smallest}"
        )


def uneven_windows(layers: int, window: int, *, every: int = 6, first: int = 3, narrow: int | None = None) -> list[int]:
    """Give one layer in `every` a wide window and the others a narrow one, at `window` keys on average.

    Wide layers that come early did worse than late ones (one seed; `docs/results`, locality and scaling, compare the
    forms).

    Args:
        layers: how many, at least 1.
        window: keys a query keeps per layer on average, at least 1.
        every: of so many layers in a row one is wide.
        first: index of the first wide layer; in a model of fewer layers, the last one is wide.
        narrow: window of the others; None: a quarter of `window`, at most `NARROW_WINDOW`.

    Returns:
        A window per layer, `layers · window` keys in all or, where that does not divide, a little less.

    Raises:
        InvalidInputError: `narrow` is not a window, or wider than `window`.
    """
    check_window(window, 0)
    if narrow is None:
        narrow = max(1, min(window // 4, NARROW_WINDOW))
    check_window(narrow, 0)
    if narrow > window:
        raise InvalidInputError(f"narrow layers see less than window={window} keys; got narrow={narrow}")
    wide = [index % every == min(first, layers - 1) % every for index in range(layers)]
    rest = (layers * window - narrow * wide.count(False)) // wide.count(True)
    return [rest if each else narrow for each in wide]


def set_head_windows(model: Any, windows: Sequence[Sequence[int]]) -> None:
    """Change the windows of a native model's mixers, for the steps of a schedule. The configuration stays as it is.

    Args:
        model: a `DynamaskModel` or `DynamaskForCausalLM`.
        windows: L x G integers.
    """
    decoder = getattr(model, "model", model)
    for layer, own in zip(decoder.layers, windows, strict=True):
        shard = getattr(layer.mixer, "head_shard", None)  # of a model split by tensor parallelism
        layer.mixer.windows = tuple(own) if shard is None else shard.of(own)


def checked_slopes(slopes: Any, layers: int, groups: int) -> tuple[tuple[float, ...] | None, ...]:
    """Check a setting `slopes` and round it to the grid on which ranks with slopes are exact.

    Args:
        slopes: None, or one entry per layer, each None or `groups` numbers, in nats per token.
        layers, groups: number of layers and of key/value heads.

    Returns:
        `layers` entries, None for a layer whose ranks do not rise.

    Raises:
        InvalidInputError: another number of layers or heads, or a number that is negative, not finite, or so small
            that the grid has no place for it but 0.
    """
    if slopes is None:
        return (None,) * layers
    from dynamask.mixers.rank_predictor import slope_on_grid

    slopes = plain_numbers(slopes)
    if not isinstance(slopes, (list, tuple)) or len(slopes) != layers:
        raise InvalidInputError(
            f"slopes must be None or a list with an entry for each of the {layers} layers; got {slopes!r}"
        )
    for layer, entry in enumerate(slopes):
        if entry is not None and not (
            isinstance(entry, (list, tuple))
            and len(entry) == groups
            and all(isinstance(slope, (int, float)) and not isinstance(slope, bool) for slope in entry)
            and all(0 <= slope < math.inf for slope in entry)
        ):
            raise InvalidInputError(
                f"the slopes of layer {layer} must be {groups} numbers of at least 0, one per key/value head; got "
                f"{entry!r}"
            )
        for slope in entry or ():
            if slope and not slope_on_grid(slope):
                raise InvalidInputError(
                    f"slopes are multiples of 1/8192 nats per token, and {slope!r} (layer {layer}) would be rounded to "
                    "0: give 0 or at least 1/16384"
                )
    return tuple(
        tuple(slope_on_grid(slope) for slope in entry) if entry is not None and any(entry) else None for entry in slopes
    )
