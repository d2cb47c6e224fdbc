"""Decoding from a `BoundedCache` as a CUDA graph.

A full bounded cache never changes its shapes or addresses again, and one that still grows does so seldom. The step of
one token is the same list of launches meanwhile: it is recorded once and replayed. A model of hundreds of small
launches per token otherwise waits for the CPU most of the time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dynamask.cache import BoundedCache, BoundedLayer

_EAGER_STEPS = 2
"""Steps before recording: they compile the kernels, and a short generation is over sooner without a graph."""

_WORTH_RECORDING = 24
"""Steps that a graph must be able to serve before a layer grows: recording takes about as long as a few."""


class StepGraph:
    """One token's forward, recorded.

    Args:
        model: a causal LM called as `model(input_ids=..., position_ids=..., past_key_values=...)`.
        cache: one whose tensors stay where they are: a `BoundedCache` that need not grow (`BoundedLayer.addresses`).
        input_ids, position_ids: (B, 1) of the step that is recorded and then run.
    """

    def __init__(self, model: nn.Module, cache: Cache, input_ids: Tensor, position_ids: Tensor) -> None:
        self._model = weakref.ref(model)
        self._parts = _parts(model)
        self._at = _addresses(cache) if isinstance(cache, BoundedCache) else None
        with torch.inference_mode(False):  # a later step may run in another mode, and writes to them
            self.input_ids, self.position_ids = input_ids.clone(), position_ids.clone()
        self.graph = torch.cuda.CUDAGraph()
        # Recording runs the Python code, which counts the token, but no kernel: `replay` does that.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            output = model(
                input_ids=self.input_ids, position_ids=self.position_ids, past_key_values=cache, use_cache=True
            )
        self.logits = output.logits

    def fits(self, model: nn.Module, cache: BoundedCache, input_ids: Tensor) -> bool:
        """Whether a replay would do what the model would: same model, weights in place, cache in place, no hooks."""
        return (
            self._model() is model
            and input_ids.shape == self.input_ids.shape
            and self._at == _addresses(cache)
            and all(tensor.data_ptr() == at for tensor, at in self._parts)
            and not _hooked(model)
        )

    def replay(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Compute logits (B, 1, vocab) of this token, which goes into the cache."""
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)
        self.graph.replay()
        return self.logits.clone()


_GRAPHS: weakref.WeakKeyDictionary[Cache, StepGraph] = weakref.WeakKeyDictionary()
_EAGER: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()


def decode_by_graph(
    model: nn.Module, cache: Cache | None, input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Any
) -> Tensor | None:
    """Compute logits (B, 1, vocab) of one more token by a recorded graph; None where the model must run itself.

    Args:
        model: see `StepGraph`.
        cache: graphs serve a `BoundedCache` that need not grow for the token and was not made with `graphs=False`.
        input_ids: (B, 1).
        attention_mask: (B, past + 1), 1 = real token, or None.
        position_ids: (B, 1), or None to count, skipping padding.
    """
    if (
        not isinstance(cache, BoundedCache)
        or not cache.graphs
        or input_ids is None
        or not input_ids.is_cuda
        or input_ids.shape[1] != 1
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cuda")
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
        or _addresses(cache) is None
        or model.training
    ):
        return None
    past = cache.get_seq_length()
    if attention_mask is not None:
        if attention_mask.shape != (input_ids.shape[0], past + 1) or not bool(attention_mask[:, -1].all()):
            return None  # the model's own forward complains, or treats the padding
        if position_ids is None:
            position_ids = attention_mask.long().sum(-1, keepdim=True) - 1
    if position_ids is None:
        position_ids = torch.full_like(input_ids, past)
    position_ids = position_ids.expand_as(input_ids)
    graph = _GRAPHS.get(cache)
    if graph is not None and graph.fits(model, cache, input_ids):
        for layer in cache.layers:
            layer.advance()  # type: ignore[attr-defined]
        return graph.replay(input_ids, position_ids)
    _GRAPHS.pop(cache, None)
    _EAGER[cache] = _EAGER.get(cache, 0) + 1
    if _EAGER[cache] <= _EAGER_STEPS or _hooked(model) or any(p.device != input_ids.device for p in model.parameters()):
        return None
    if min(layer.steps_in_place for layer in cache.layers) < _WORTH_RECORDING:  # type: ignore[attr-defined]
        return None
    _EAGER[cache] = 0  # should the cache move, it starts over
    _GRAPHS[cache] = graph = StepGraph(model, cache, input_ids, position_ids)
    return graph.replay(input_ids, position_ids)


def _addresses(cache: BoundedCache) -> list[tuple[int, ...]] | None:
    found = []
    for layer in cache.layers:
        assert isinstance(layer, BoundedLayer)
        at = layer.addresses()
        if at is None:
            return None
        found.append(at)
    return found


def _parts(model: nn.Module) -> list[tuple[Tensor, int]]:
    return [(tensor, tensor.data_ptr()) for tensor in _tensors(model)]


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _hooked(model: nn.Module) -> bool:
    """Whether somebody listens inside the model: a replay would not call them."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        for module in model.modules()
        if module is not model
    )
