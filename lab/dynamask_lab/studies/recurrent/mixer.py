"""Gated DeltaNet (arXiv 2412.06464) of the package `fla` as a mixer, for training and validation without a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from dynamask.errors import InvalidInputError, UsageError
from dynamask.mixers import MIXERS, Mixer, SequenceInfo, register

GDN = "gdn"
_HEAD = 32
"""Dimensions of a key; values have twice as many."""


class GatedDeltaNetMixer(Mixer):
    """`fla.layers.GatedDeltaNet` with its usual proportions: keys of three quarters of the width, values twice that.

    Raises:
        UsageError: `fla` is not installed.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        try:
            from fla.layers import GatedDeltaNet
        except ImportError as error:
            raise UsageError(
                "gdn needs the package flash-linear-attention: pip install flash-linear-attention"
            ) from error
        heads = config.hidden_size * 3 // 4 // _HEAD
        self.net = GatedDeltaNet(hidden_size=config.hidden_size, head_dim=_HEAD, num_heads=heads, layer_idx=layer_idx)

    @property
    def rotary_dim(self) -> int:
        """Not read: nothing is rotated."""
        return int(self.config.head_dim)

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`. Raises InvalidInputError for packed or padded rows, and with a cache."""
        if cache is not None or not sequence.plain:
            raise InvalidInputError(
                "gdn reads whole rows of one document here: neither a cache, nor packing or padding"
            )
        return self.net(hidden_states)[0]

    @classmethod
    def cache_layer(cls, config: Any, layer_idx: int) -> CacheLayerMixin:
        """Not used: `forward` takes no cache."""
        return DynamicLayer()


@contextlib.contextmanager
def recurrent_mixer() -> Iterator[None]:
    """Make `gdn` a mixer, for as long as the context lasts: a product model cannot be saved with it."""
    added = GDN not in MIXERS
    if added:
        register(GDN, GatedDeltaNetMixer)
    try:
        yield
    finally:
        if added:
            del MIXERS[GDN]
