"""Gated DeltaNet (arXiv 2412.06464) in plain PyTorch as a mixer, for training and validation without a cache.

The package `fla` has faster kernels, which refuse Hopper with the Triton of PyTorch 2.11.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from dynamask.errors import InvalidInputError
from dynamask.mixers import MIXERS, Mixer, SequenceInfo, register
from dynamask_lab.studies.recurrent.delta_rule import CHUNK, gated_delta_rule

GDN = "gdn"
_HEAD = 32
"""Dimensions of a key; values have twice as many."""
_TAPS = 4
"""Tokens of the short convolution of queries, keys and values."""
_STEPS = (0.001, 0.1)
"""Range of the steps that decays start from, as in Mamba-2."""
_RATES = (1.0, 16.0)


class GatedDeltaNetMixer(Mixer):
    """The layer of the paper with its usual proportions: keys of three quarters of the width, values twice that."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = config.hidden_size
        self.heads = width * 3 // 4 // _HEAD
        self.sizes = [self.heads * _HEAD, self.heads * _HEAD, self.heads * 2 * _HEAD]
        self.qkv_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.convolution = nn.Conv1d(sum(self.sizes), sum(self.sizes), _TAPS, groups=sum(self.sizes), bias=False)
        self.gate_proj = nn.Linear(width, self.sizes[2], bias=False)
        self.beta_proj = nn.Linear(width, self.heads, bias=False)
        self.decay_proj = nn.Linear(width, self.heads, bias=False)
        self.o_proj = nn.Linear(self.sizes[2], width, bias=False)
        self.log_rate = nn.Parameter(torch.empty(self.heads).uniform_(*_RATES).log())
        step = torch.empty(self.heads).uniform_(*map(math.log, _STEPS)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        self.norm = nn.Parameter(torch.ones(2 * _HEAD))

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
        batch, length, _ = hidden_states.shape
        mixed = F.pad(self.qkv_proj(hidden_states).mT, (_TAPS - 1, 0))
        mixed = F.silu(self.convolution(mixed)).mT
        beta, step = self.beta_proj(hidden_states), self.decay_proj(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):
            query, key, value = (
                part.float().view(batch, length, self.heads, -1).transpose(1, 2) for part in mixed.split(self.sizes, -1)
            )
            query, key = F.normalize(query, dim=-1) * _HEAD**-0.5, F.normalize(key, dim=-1)
            decay = -self.log_rate.float().exp() * F.softplus(step.float() + self.step_bias.float())
            gates = (decay.transpose(1, 2), beta.float().sigmoid().transpose(1, 2))
            end = -length % CHUNK  # keys of zeros behind the end change nothing before it
            parts = [F.pad(part, (0, 0, 0, end)) for part in (query, key, value)]
            output = gated_delta_rule(*parts, *(F.pad(gate, (0, end)) for gate in gates))[:, :, :length]
            output = F.rms_norm(output, (2 * _HEAD,), self.norm.float(), self.config.rms_norm_eps)
        gate = F.silu(self.gate_proj(hidden_states))
        return self.o_proj(output.transpose(1, 2).flatten(2).to(gate.dtype) * gate)

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
