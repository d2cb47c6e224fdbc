"""The registry of mixers: `config.attention` names one of these.

To add one, subclass `Mixer`, implement `forward` and `cache_layer`, and `register` it
(`examples/add_a_mixer.py` does).
"""

from __future__ import annotations

from dynamask.errors import InvalidInputError
from dynamask.mixers.base import GroupedQueryMixer, Mixer, RMSNorm, SequenceInfo
from dynamask.mixers.dma import DynamicMaskAttention
from dynamask.mixers.gate import DynamicMaskGate
from dynamask.mixers.mha import MultiHeadAttention
from dynamask.mixers.mla import MultiHeadLatentAttention
from dynamask.mixers.nsa import NativeSparseAttention
from dynamask.mixers.rank_predictor import RankPredictor
from dynamask.mixers.swa import SlidingWindowAttention

MIXERS: dict[str, type[Mixer]] = {
    "dma": DynamicMaskAttention,
    "mha": MultiHeadAttention,
    "swa": SlidingWindowAttention,
    "mla": MultiHeadLatentAttention,
    "nsa": NativeSparseAttention,
}


def register(name: str, mixer: type[Mixer]) -> None:
    """Make `config.attention = name` build `mixer`. Raises InvalidInputError if the name is taken."""
    if MIXERS.get(name, mixer) is not mixer:
        raise InvalidInputError(f"a mixer named {name!r} exists already ({MIXERS[name].__name__}); choose another name")
    MIXERS[name] = mixer


def get_mixer(name: str) -> type[Mixer]:
    """Return a mixer class by name. Raises InvalidInputError for an unknown one, naming those there are."""
    if name not in MIXERS:
        raise InvalidInputError(f"attention must be one of {', '.join(MIXERS)}; got {name!r}")
    return MIXERS[name]


__all__ = [
    "MIXERS",
    "DynamicMaskAttention",
    "DynamicMaskGate",
    "GroupedQueryMixer",
    "Mixer",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "NativeSparseAttention",
    "RMSNorm",
    "RankPredictor",
    "SequenceInfo",
    "SlidingWindowAttention",
    "get_mixer",
    "register",
]
