"""Windows that differ from layer to layer: as many keys in all, most of them where a layer is to look far."""

from __future__ import annotations

from collections.abc import Sequence

from dynamask.errors import InvalidInputError
from dynamask.ops.checks import check_window

UNEVEN = "uneven"
"""Value of `layer_windows` that stands for `uneven_windows` of a model's layers and window."""


NARROW_WINDOW = 32
"""Keys of a narrow layer, at most. What few keys can teach seems to be learned early (after 300 steps of a model of two
layers, one seed, the narrower the window the lower dma's loss: `docs/results`, ablation). At 512 keys a layer on
average, 32 did 0.25 nats better than a quarter of the window, and 64 as well as 32."""


def uneven_windows(layers: int, window: int, *, every: int = 6, first: int = 3, narrow: int | None = None) -> list[int]:
    """One wide layer in `every`; the others see what is next to them, and the wide ones share what that leaves.

    At 4.4M parameters and 128 keys a layer on average, one wide layer of six (608 keys, the others 32) took a sliding
    window from 2.258 to 1.951 nats on code, past dense attention's 2.041 (`docs/results`, locality); at 512 keys of
    4096 tokens (2912, the others 32), from 2.646 to 2.439 (scaling), and at 20.6M parameters from 1.875 to 1.824. Early
    wide layers did worse than late ones (one seed). Larger models have not been measured.

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
    if narrow is None:
        narrow = max(1, min(window // 4, NARROW_WINDOW))
    check_window(narrow, 0)
    if narrow > window:
        raise InvalidInputError(f"narrow layers see less than window={window} keys; got narrow={narrow}")
    wide = [index % every == min(first, layers - 1) % every for index in range(layers)]
    rest = (layers * window - narrow * wide.count(False)) // wide.count(True)
    return [rest if each else narrow for each in wide]


def resolved_windows(
    given: Sequence[int] | str | None, layers: int, window: int, narrow: int | None = None
) -> list[int] | None:
    """What a setting `layer_windows` asks for.

    Args:
        given: a window per layer, "uneven", or None for `window` in all of them.
        layers, window: of the model.
        narrow: see `uneven_windows`.

    Returns:
        A window per layer, or None.

    Raises:
        InvalidInputError: another word, another number of windows than of layers, or a window below 1.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given != UNEVEN:
            raise InvalidInputError(f'layer_windows is a window per layer or "{UNEVEN}"; got {given!r}')
        return uneven_windows(layers, window, narrow=narrow)
    if len(given) != layers:
        raise InvalidInputError(
            f"layer_windows gives the window of each of the {layers} layers; got {len(given)} windows"
        )
    for each in given:
        check_window(each, 0)
    return list(given)
