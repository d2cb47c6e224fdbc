"""Which layers know positions: rotary embeddings where a layer looks near, content alone where it looks far.

Rotary embeddings (RoPE) fail at distances that training has not shown. Layers without them (NoPE) do not, and every
other layer still tells them the order (arXiv 2501.18795, and Llama 4, SmolLM3 and Command A). A wide layer of
`uneven_windows` is such a place: all of its neighbours look near.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynamask.errors import InvalidInputError

NARROW = "narrow"
"""Value of `rope_layers` that stands for the layers that look no further than the model's window."""

_UNBOUNDED = frozenset({"mha", "mla", "nsa"})


def resolved_rope_layers(
    given: Sequence[bool] | str | None, mixers: Sequence[str], windows: Sequence[int] | None, window: int
) -> list[bool] | None:
    """What a setting `rope_layers` asks for.

    Args:
        given: whether each layer rotates, "narrow", or None for all of them.
        mixers: name of each layer's attention.
        windows: of each layer, or None where all have `window`.
        window: of the model.

    Returns:
        Whether each layer rotates, or None for all.

    Raises:
        InvalidInputError: another word, another number of layers, or "narrow" where no layer looks further than
            `window`.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given != NARROW:
            raise InvalidInputError(f'rope_layers says of each layer whether it rotates, or "{NARROW}"; got {given!r}')
        own = windows or [window] * len(mixers)
        near = [name not in _UNBOUNDED and each <= window for name, each in zip(mixers, own, strict=True)]
        if all(near):
            raise InvalidInputError(
                f'rope_layers="{NARROW}" leaves RoPE out of the layers that look further than window={window}, and '
                'there is none: give layer_windows (such as "uneven") or layer_attention too, or list the layers'
            )
        return near
    if len(given) != len(mixers):
        raise InvalidInputError(
            f"rope_layers says of each of the {len(mixers)} layers whether it rotates; got {len(given)} values"
        )
    return list(given)
