"""Read prompts of a length that comes again by a recorded CUDA graph: no launch waits for the host.

A long prompt is some fifteen launches of dynamask's kernels and as many of others in each layer. In a small model the
host that gives them out takes longer than the GPU that runs them.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from dynamask.cache import BoundedCache, BoundedLayer
from dynamask.errors import InvalidInputError
from dynamask.integers import check_integer
from dynamask.models.cache_argument import CACHE_NAME, given_cache
from dynamask.models.cuda_graph import REPLAYED, reason_against
from dynamask.models.decoder import decoder_of
from dynamask.models.generation import OwnCacheGeneration
from dynamask.models.recorded_model import RecordedModel
from dynamask.models.recording import recording
from dynamask.ops.context_parallel.shards import current_group
from dynamask.ops.looks import without_looks

_Kind = tuple[Any, ...]


class RecordedPrompts:
    """Prompts of a model by CUDA graphs, until `remove()` or the end of a `with` block.

    Served are calls without gradients that read a whole prompt of at least `shortest` tokens, without padding, into an
    empty `BoundedCache` (or none, where the model makes one): those of `generate()`, too. The first call with a shape
    runs as before, the second is recorded, further ones are replayed; where weights, windows or modules change, it
    starts over. All other calls run as before. What a recording computes with stays reserved for it: about as much
    memory as the call takes.

    Args:
        model: a dynamask or converted causal LM on one GPU.
        shapes: how many shapes (batch, length, kept logits) recordings are held of; the one used longest ago goes.
        shortest: tokens of a row from which on prompts are recorded.

    Attributes:
        reason: why prompts are not recorded, or None where nothing is known to be in the way.

    Raises:
        InvalidInputError: another model, or numbers that are not integers of at least 1.
    """

    def __init__(self, model: Any, *, shapes: int = 1, shortest: int = 256) -> None:
        _check_model(model)
        shapes = check_integer(shapes, "shapes", 1, "recordings that are kept")
        shortest = check_integer(shortest, "shortest", 1, "tokens of a prompt from which on it is recorded")
        self._model, self._shapes, self._shortest = model, shapes, shortest
        self._graphs: OrderedDict[_Kind, _PromptGraph | None] = OrderedDict()  # None: seen once
        self.reason, self._failed = reason_against(self._model), False
        forward = self._model.forward
        self._names = [name for name in inspect.signature(forward).parameters if name != "self"]
        self._before = self._model.__dict__.get("forward")

        @functools.wraps(forward)
        def read_or_run(*args: Any, **kwargs: Any) -> Any:
            output = self._read({**dict(zip(self._names, args, strict=False)), **kwargs})
            return forward(*args, **kwargs) if output is None else output

        self._forward, self._wrapped = forward, read_or_run
        self._model.forward = read_or_run

    def __enter__(self) -> RecordedPrompts:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Let prompts run as before, and free what was recorded."""
        self._graphs.clear()
        self._failed = True
        if self._model.__dict__.get("forward") is not self._wrapped:
            return  # something else stands before it, and still calls it: it runs the model as before
        if self._before is None:
            self._model.__dict__.pop("forward", None)
        else:
            self._model.forward = self._before

    def _read(self, arguments: dict[str, Any]) -> Any:
        """Serve a call from a recording; None where the model must run itself, with nothing changed."""
        tokens = arguments.get("input_ids")
        if not self._serves(arguments) or not isinstance(tokens, Tensor):
            return None
        cache = given_cache(arguments)
        kept = arguments.get("logits_to_keep") or 0
        runs = decoder_of(self._model).layers[0].__dict__.get("forward")  # that of compiled layers
        kind = (tuple(tokens.shape), kept, tokens.dtype, torch.is_inference_mode_enabled(), id(runs))
        if kind not in self._graphs:
            self._graphs[kind] = None
            while len(self._graphs) > self._shapes:
                self._graphs.popitem(last=False)
            return None
        self._graphs.move_to_end(kind)
        graph = self._graphs[kind]
        if graph is not None and not graph.recorded.is_still(self._model):
            self._graphs[kind] = None  # this call runs as before, as the first did, and fills the tables anew
            return None
        if graph is None:
            self.reason = reason_against(self._model)
            if self.reason is not None:
                return None
            try:
                graph = _PromptGraph(self._model, self._forward, tokens, kept)
            except RuntimeError as error:  # nothing has run on the device
                self._failed = True
                self.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                warnings.warn(f"prompts run without a CUDA graph, and slower: {self.reason}", stacklevel=4)
                return None
            self._graphs[kind] = graph
        if cache is None:
            cache = self._model._new_cache()
        return graph.replay(tokens, cache)

    def _serves(self, arguments: dict[str, Any]) -> bool:
        """Whether a call is one that a recording computes."""
        model, tokens = self._model, arguments.get("input_ids")
        if (
            self._failed
            or not isinstance(tokens, Tensor)
            or tokens.dim() != 2
            or tokens.shape[1] < self._shortest
            or not _on_gpu(tokens)
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cuda")
            or torch.compiler.is_compiling()
            or torch.cuda.is_current_stream_capturing()
            or model.training
            or getattr(model, "_tp_size", None)
            or current_group() is not None
        ):
            return False
        if any(v is not None and v is not False and name not in REPLAYED for name, v in arguments.items()):
            return False
        config, kept = model.config, arguments.get("logits_to_keep")
        if config.output_hidden_states or config.output_attentions or not config.use_cache:
            return False
        if getattr(config, "return_dict", True) is False:
            return False
        if arguments.get("use_cache") is False or arguments.get("return_dict") is False:
            return False
        if not (kept is None or (isinstance(kept, int) and kept >= 0)):
            return False
        cache = given_cache(arguments)
        if cache is not None and not _empty(cache, config.num_hidden_layers):
            return False
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if mask is not None and (mask.shape != tokens.shape or not bool(mask.all())):
            return False
        counted = torch.arange(tokens.shape[1], device=tokens.device)
        return positions is None or (
            positions.shape[-1:] == counted.shape and bool((positions.to(counted.device) == counted).all())
        )


class _PromptGraph:
    """A prompt's forward, recorded with the cache that it fills."""

    def __init__(self, model: Any, forward: Any, tokens: Tensor, kept: int) -> None:
        self.recorded = RecordedModel(model)
        with torch.inference_mode(False):
            self._tokens = tokens.clone()
        self._cache = model._new_cache()
        if not _empty(self._cache, len(self._cache.layers)):
            raise RuntimeError(f"{type(self._cache).__name__} has layers that a recorded prompt cannot fill")
        self.graph = torch.cuda.CUDAGraph()
        with without_looks(), recording(self.graph):
            arguments = {"input_ids": self._tokens, "past_key_values": self._cache, "use_cache": True}
            output = forward(**arguments, logits_to_keep=kept)
        self._logits, self._output_class = output.logits, type(output)

    def replay(self, tokens: Tensor, cache: BoundedCache) -> Any:
        """Return the model's output for these tokens, and put their keys into an empty cache of the same rules."""
        for mine, given in zip(self._cache.layers, cache.layers, strict=True):
            given.check_takes(mine)  # type: ignore[attr-defined]
        self._tokens.copy_(tokens)
        self.graph.replay()
        for mine, given in zip(self._cache.layers, cache.layers, strict=True):
            given.take(mine)  # type: ignore[attr-defined]
        return self._output_class(logits=self._logits.clone(), **{CACHE_NAME: cache})


def recorded_prompts(model: Any, *, shapes: int = 1, shortest: int = 256) -> RecordedPrompts:
    """Read prompts of lengths that come again by CUDA graphs; see `RecordedPrompts`, which it returns.

    with dynamask.convert.compiled_layers(model), dynamask.convert.recorded_prompts(model):
        model.generate(prompt, max_new_tokens=64)
    """
    return RecordedPrompts(model, shapes=shapes, shortest=shortest)


def _check_model(model: Any) -> None:
    if not isinstance(model, OwnCacheGeneration):
        raise InvalidInputError(f"recorded_prompts takes a dynamask or converted causal LM; got {type(model).__name__}")


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _empty(cache: Any, layers: int) -> bool:
    """Whether a cache is a bounded one without keys, whose user wants graphs."""
    if not isinstance(cache, BoundedCache) or not cache.graphs or len(cache.layers) != layers:
        return False
    return all(type(layer) is BoundedLayer and layer.seen == 0 for layer in cache.layers)


__all__ = ["RecordedPrompts", "recorded_prompts"]
