"""A key/value cache of constant size that loses nothing: a `BoundedLayer` for each layer of a model.

A key that a window of others outranks never returns to any later query (design section 2), so forgetting it changes no
output: decoding from the bounded cache is the same attention as decoding from the full one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from dynamask.cache_layer import BoundedLayer, LiveKeys, Windows
from dynamask.errors import InvalidInputError
from dynamask.integers import plain_numbers


class LayeredCache(Cache):
    """A transformers cache some of whose layers are bounded."""

    def crop(self, max_length: int = 0, *, tokens_to_remove: int | None = None) -> None:
        """Forget the last positions in all layers, or in none.

        Args:
            max_length: as in `BoundedLayer.crop`.
            tokens_to_remove: the same, under the name of newer releases of transformers.

        Raises:
            CacheRollbackError: a layer has evicted a key that was alive at that length. No layer is changed then.
        """
        wanted = max_length if tokens_to_remove is None else tokens_to_remove
        for layer in self.layers:
            if isinstance(layer, BoundedLayer):
                layer.check_crop(wanted)
        super().crop(wanted)

    def reset(self) -> None:
        """Forget everything. transformers' growing layers keep their length, over zeros: here they are emptied, too."""
        for layer in self.layers:
            layer.reset()
            if isinstance(layer, DynamicLayer):
                layer.keys = layer.values = None
                layer.is_initialized = False


class BoundedCache(LayeredCache):
    """A transformers cache of at most `windows[l][g]` keys for key/value head g of layer l, at any length.

    Logits equal those of the full cache: what it forgets, no later query could see. Works in `generate()`
    (greedy, sampling, beams), with prefill, chunked prefill and single tokens in any order.

    Args:
        config: configuration of the model it is for; gives layers, windows, local and sinks where not given here.
        windows: keys per query: an integer for all heads, one per layer, or one per layer and key/value head.
        local: newest real tokens that are always kept. Default `config.local`, or 0.
        sinks: first real tokens of a row that are always kept. Default `config.sinks`, or 0.
        num_hidden_layers: default `config.num_hidden_layers`, or the number of layers in `windows`.
        graphs: on a GPU, record the step of a dynamask or converted model as a CUDA graph, and replay it for every
            further token (`dynamask.models.cuda_graph`). The same numbers without the launches' waiting.

    Raises:
        InvalidInputError: no windows to be found, or attention that a bounded cache cannot serve.

    It cannot go back past an eviction: `crop` raises `CacheRollbackError` then, and changes nothing.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        windows: Windows | Sequence[Sequence[int]] | None = None,
        local: int | None = None,
        sinks: int | None = None,
        num_hidden_layers: int | None = None,
        graphs: bool = True,
    ) -> None:
        self.graphs = graphs
        super().__init__(layers=_bounded_layers(config, windows, local, sinks, num_hidden_layers))

    def check_consistent(self) -> None:
        """See `check_consistent`: refuse a cache whose layers have seen different numbers of tokens."""
        check_consistent(self)

    def check_fits(self, windows: Sequence[Windows], *, local: int = 0, sinks: int = 0) -> None:
        """Refuse a model that keeps other keys, or has another number of layers, than this cache was made for.

        Args:
            windows: of each layer: an integer, or one per key/value head.
            local, sinks: of all layers.

        Raises:
            InvalidInputError: they do not fit.
        """
        if len(windows) != len(self.layers):
            raise InvalidInputError(
                f"this cache was made for {len(self.layers)} layers and the model has {len(windows)}: make it from "
                "the configuration of the model, BoundedCache(model.config)"
            )
        for layer, each in zip(self.layers, windows, strict=True):
            layer.check_fits(each, local=local, sinks=sinks)

    @property
    def num_bytes(self) -> int:
        """Return the memory of all layers, in bytes."""
        return cache_bytes(self)


def check_consistent(cache: Cache, layers: int | None = None) -> None:
    """Refuse a cache whose layers have seen different numbers of tokens, as an interrupted forward leaves it.

    Args:
        cache: any transformers cache, at the start of a model's forward. Bounded and growing layers are compared.
        layers: of the model; None: not compared.

    Raises:
        InvalidInputError: they have, or a bounded layer belongs to a cache for another number of layers.
    """
    bounded = any(isinstance(layer, BoundedLayer) for layer in cache.layers)
    if bounded and layers is not None and len(cache.layers) != layers:
        raise InvalidInputError(
            f"this cache was made for {len(cache.layers)} layers and the model has {layers}: make it from the "
            "configuration of the model, BoundedCache(model.config)"
        )
    compared = BoundedLayer if torch.compiler.is_compiling() else (BoundedLayer, DynamicLayer)
    seen = {int(layer.get_seq_length()) for layer in cache.layers[:layers] if isinstance(layer, compared)}
    if len(seen) > 1:
        raise InvalidInputError(
            f"the layers of this cache have seen different numbers of tokens ({min(seen)} to {max(seen)}): a forward "
            "pass was interrupted, or the model has fewer layers than the cache. Call cache.reset() and start over, "
            "or continue from a copy made before"
        )


def check_takes_call(cache: Cache, batch: int, new: int) -> None:
    """Refuse a call that does not fit what a cache holds, before any layer writes to it.

    Args:
        cache: at the start of a model's forward; it is not changed.
        batch: rows of the call.
        new: positions of the call.

    Raises:
        InvalidInputError: no cache of transformers, one that holds other rows, or a static one without room for `new`.
    """
    if not isinstance(cache, Cache):
        raise InvalidInputError(
            f"past_key_values must be a cache of transformers or dynamask; got {type(cache).__name__}: use "
            "BoundedCache(model.config) or DynamicCache()"
        )
    if torch.compiler.is_compiling():
        return
    for layer in cache.layers:
        keys = layer.keys if layer.is_initialized else None
        if keys is not None and keys.dim() > 2 and keys.shape[0] != batch:
            raise InvalidInputError(
                f"the cache holds {keys.shape[0]} sequences and was given {batch}: start a new cache or reorder this "
                "one"
            )
    # Static layers are of one size and written in order, so the first has the least room. To read its length is to wait
    # for the device.
    index = next((index for index, layer in enumerate(cache.layers) if type(layer) is StaticLayer), None)
    if index is not None:
        static = cache.layers[index]
        held, room = int(static.get_seq_length()), static.max_cache_len
        if held + new > room:
            raise InvalidInputError(
                f"layer {index} of this {type(cache).__name__} has room for {room} positions; it holds {held} and was "
                f"given {new}: make it with a larger max_cache_len"
            )


def dropping_layers(cache: Cache, new: int) -> list[tuple[int, int, int]]:
    """Find the layers that slide by positions, as transformers', and will not hand over all keys of the next call.

    Args:
        cache: any transformers cache; it is not changed.
        new: positions of the call.

    Returns:
        Of each such layer its index, the keys that it will hand over, and the positions up to the end of the call.
    """
    found = []
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "is_sliding", False):
            held, length = layer.get_mask_sizes(new)[0], int(layer.get_seq_length()) + new
            if held < length:
                found.append((index, held, length))
    return found


def cache_bytes(cache: Cache) -> int:
    """Return the memory of a cache's tensors, in bytes, whatever its kind."""
    total = 0
    for layer in cache.layers:
        held = getattr(layer, "num_bytes", None)
        if held is None:
            tensors = [t for t in (layer.keys, layer.values) if t is not None]
            held = sum(t.numel() * t.element_size() for t in tensors)
        total += held
    return total


def bounded_layer(cache: Cache, layer_idx: int) -> BoundedLayer | None:
    """Return the cache's layer if it is a bounded one."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    return layer if isinstance(layer, BoundedLayer) else None


def _bounded_layers(
    config: Any,
    windows: Windows | Sequence[Sequence[int]] | None,
    local: int | None,
    sinks: int | None,
    num_hidden_layers: int | None,
) -> list[BoundedLayer]:
    """The layers of a `BoundedCache`."""
    make = getattr(config, "bounded_cache_layers", None)
    own: list[BoundedLayer] | None = None if make is None else make()
    if own is not None and (windows, local, sinks, num_hidden_layers) == (None, None, None, None):
        return own
    count = num_hidden_layers if num_hidden_layers is not None else getattr(config, "num_hidden_layers", None)
    given = windows
    if given is None:
        # A window per head, per layer, or one: converted models may have layers that were sliding already.
        for name in ("head_windows", "layer_windows", "window", "keep_window_size"):
            given = getattr(config, name, None)
            if given is not None:
                break
    given = plain_numbers(given)
    if count is None and isinstance(given, list):
        count = len(given)
    if given is None or count is None:
        raise InvalidInputError(
            "BoundedCache needs a config with windows and num_hidden_layers, or both as arguments; "
            f"got windows={given!r}, num_hidden_layers={count!r}"
        )
    each: list[Any] = given if isinstance(given, list) else [given] * count
    if len(each) != count:
        raise InvalidInputError(f"windows must be an integer or one entry per layer ({count}); got {len(each)} entries")
    if any(window is None for window in each):
        raise InvalidInputError(
            "this model has layers left dense, whose queries see every past key, as no bounded cache keeps them: "
            "generate() without past_key_values takes the right cache, or use DynamicCache"
        )
    if sinks is None:
        sinks = getattr(config, "sinks", None) or 0
    locals_ = getattr(config, "layer_locals", None) if local is None and windows is None else None
    if locals_ is None:
        locals_ = [(getattr(config, "local", None) or 0) if local is None else local] * count
    # Layers of converted models that slide have no sinks.
    of_layers = getattr(config, "layer_sinks", None) if windows is None and local is None else None
    sinks_ = [sinks] * count if of_layers is None else of_layers
    return [BoundedLayer(window, local=n, sinks=first) for window, n, first in zip(each, locals_, sinks_, strict=True)]


__all__ = [
    "BoundedCache",
    "BoundedLayer",
    "LayeredCache",
    "LiveKeys",
    "Windows",
    "bounded_layer",
    "cache_bytes",
    "check_consistent",
    "check_takes_call",
    "dropping_layers",
]
