"""Decoding from a `BoundedCache` as a CUDA graph, for dynamask's models and converted ones.

A full bounded cache never changes its shapes or addresses again, and one that still grows does so seldom. The step of
one token is the same list of launches meanwhile: it is recorded once and replayed. A model of hundreds of small
launches per token otherwise waits for the CPU most of the time.

`generate()` and calls of the model with one token do this by themselves, from the third token on. `reason_against`
says why a model is not served.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dynamask.cache import BoundedCache, BoundedLayer
from dynamask.models.recorded_model import RecordedModel, listened_to
from dynamask.models.recording import recording

_EAGER_STEPS = 2
"""Steps before recording: they compile the kernels, and a short generation is over sooner without a graph."""

_WORTH_RECORDING = 24
"""Steps that a graph must be able to serve before a layer grows: recording takes about as long as a few."""

_GROWING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies change with the length of the text."""


REPLAYED = frozenset(
    {
        *("input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "cache_params"),
        *("cache_position", "use_cache", "return_dict", "logits_to_keep"),
    }
)
"""Arguments of a forward call that a recorded step or prompt serves."""

Step = Callable[[nn.Module, BoundedCache, Tensor, Tensor], Tensor | None]
"""See `decode_by_graph`."""


class StepGraph:
    """One token's forward, recorded.

    Args:
        model: a causal LM called as `model(input_ids=..., position_ids=..., past_key_values=...)`.
        cache: one whose tensors stay where they are: a `BoundedCache` that need not grow (`BoundedLayer.addresses`).
        input_ids, position_ids: (B, 1) of the step that is recorded and then run.
    """

    def __init__(self, model: nn.Module, cache: Cache, input_ids: Tensor, position_ids: Tensor) -> None:
        self._recorded = RecordedModel(model)
        self._at = _addresses(cache) if isinstance(cache, BoundedCache) else None
        with torch.inference_mode(False):  # a later step may run in another mode, and writes to them
            self.input_ids, self.position_ids = input_ids.clone(), position_ids.clone()
        self.graph = torch.cuda.CUDAGraph()
        # Recording runs the Python code, which counts the token, but no kernel: `replay` does that.
        with recording(self.graph):
            output = model(
                input_ids=self.input_ids, position_ids=self.position_ids, past_key_values=cache, use_cache=True
            )
        self.logits = output.logits

    def fits(self, model: nn.Module, at: list[tuple[int, ...]], input_ids: Tensor) -> bool:
        """Whether a replay would do what the model would: same model, weights in place, cache in place, no hooks.

        Args:
            model: that is to run.
            at: where its cache's tensors lie now.
            input_ids: (B, 1).
        """
        return input_ids.shape == self.input_ids.shape and self._at == at and self._recorded.is_still(model)

    def replay(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Compute logits (B, 1, vocab) of this token, which goes into the cache."""
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)
        self.graph.replay()
        return self.logits.clone()


_GRAPHS: weakref.WeakKeyDictionary[Cache, StepGraph] = weakref.WeakKeyDictionary()
_EAGER: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()


def decode_by_graph(
    model: nn.Module,
    cache: Cache | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Any,
    *,
    counts_padding: bool = False,
    step: Step | None = None,
) -> Tensor | None:
    """Compute logits (B, 1, vocab) of one more token by a recorded graph; None where the model must run itself.

    Args:
        model: see `StepGraph`.
        cache: graphs serve a `BoundedCache` that need not grow for the token and was not made with `graphs=False`.
        input_ids: (B, 1).
        attention_mask: (B, past + 1), 1 = real token, or None.
        position_ids: (B, 1), or None to count.
        counts_padding: whether padding takes a position where the model counts them, as in transformers' models. Rows
            with padding and no `position_ids` are then left to the model.
        step: called as `step(model, cache, input_ids, position_ids)` where no graph serves: the model's step in fewer
            launches, or None with nothing changed. A graph records it, too.
    """
    if (
        not isinstance(cache, BoundedCache)
        or not isinstance(input_ids, Tensor)
        or input_ids.dim() != 2
        or input_ids.shape[1] != 1
        or not _on_gpu(input_ids)
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cuda")
        or torch.compiler.is_compiling()
        or model.training
        or getattr(model, "_tp_size", None)  # its step exchanges sums with other processes
    ):
        return None
    capturing = _capturing()
    at = None if capturing or not cache.graphs else _addresses(cache)
    if at is None and step is None:
        return None
    past = cache.get_seq_length()
    if attention_mask is not None:
        if capturing or attention_mask.shape != (input_ids.shape[0], past + 1):
            return None  # the model's own forward complains
        if not bool(attention_mask[:, -1].all()):
            return None  # it treats the padding
        if position_ids is None:
            if not counts_padding:
                position_ids = attention_mask.long().sum(-1, keepdim=True) - 1
            elif not bool(attention_mask.all()):
                return None
    if position_ids is None:
        position_ids = torch.full_like(input_ids, past)
    if position_ids.shape not in ((1, 1), input_ids.shape):
        return None
    position_ids = position_ids.expand_as(input_ids)
    logits = None if at is None else _by_graph(model, cache, at, input_ids, position_ids)
    if logits is None and step is not None:
        logits = step(model, cache, input_ids, position_ids)
    return logits


def _by_graph(
    model: nn.Module, cache: BoundedCache, at: list[tuple[int, ...]], input_ids: Tensor, position_ids: Tensor
) -> Tensor | None:
    """Replay the cache's graph, or record one when it is worth it."""
    graph = _GRAPHS.get(cache)
    if graph is not None and graph.fits(model, at, input_ids):
        for layer in cache.layers:
            layer.advance()  # type: ignore[attr-defined]
        return graph.replay(input_ids, position_ids)
    _GRAPHS.pop(cache, None)
    _EAGER[cache] = _EAGER.get(cache, 0) + 1
    if _EAGER[cache] <= _EAGER_STEPS or reason_against(model) is not None:
        return None
    if any(parameter.device != input_ids.device for parameter in model.parameters()):
        return None
    if min(layer.steps_in_place for layer in cache.layers) < _WORTH_RECORDING:  # type: ignore[attr-defined]
        return None
    _EAGER[cache] = 0  # should the cache move, it starts over
    counts = [layer.counts() for layer in cache.layers]  # type: ignore[attr-defined]
    try:
        graph = StepGraph(model, cache, input_ids, position_ids)
    except RuntimeError as error:
        # Nothing has run on the device. An operation that a graph cannot hold comes from the model's own modules.
        for layer, count in zip(cache.layers, counts, strict=True):
            layer.restore_counts(count)  # type: ignore[attr-defined]
        cache.graphs = False
        warnings.warn(
            f"decoding runs without a CUDA graph, and slower: {type(error).__name__}: {str(error).strip()[:200]}",
            stacklevel=4,
        )
        return None
    _GRAPHS[cache] = graph
    return graph.replay(input_ids, position_ids)


def reason_against(model: nn.Module) -> str | None:
    """Return why a model's step cannot be replayed as a graph, or None if nothing about the model is in the way.

    Args:
        model: a dynamask or converted causal LM.
    """
    for name, module in model.named_modules():
        if module is not model and listened_to(module):
            return f"{name} has hooks, which a replay would not call"
        if hasattr(module, "adapter_layer_names"):  # a layer of peft
            return f"{name} has adapters, which may be switched between two tokens: merge them first"
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in _GROWING_ROPE:
                return f"{name} has a rotary embedding of type {kind!r}, which changes with the length of the text"
    return None


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _addresses(cache: BoundedCache) -> list[tuple[int, ...]] | None:
    found = []
    for layer in cache.layers:
        assert isinstance(layer, BoundedLayer)
        at = layer.addresses()
        if at is None:
            return None
        found.append(at)
    return found
