"""Run the decoder layers of a model compiled: one graph for all of them, in training and for whole texts.

A layer in training is some hundred small launches, and a fast GPU waits for the CPU that gives them out. Compiling one
layer takes seconds, because all layers of a model share the graph: what differs between them (windows, slopes) enters
as tensors.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynamask.cache import bounded_layer
from dynamask.convert.attention import CallFacts, TensorRules
from dynamask.convert.models import is_converted
from dynamask.errors import InvalidInputError
from dynamask.mixers.rank_predictor import slope_tensor
from dynamask.models.decoder import attention_of

_MOST_KINDS = 6
"""Kinds of calls (shapes, dtypes, modes) that are compiled for; others run as they are."""

_LONG = 4096
"""Tokens from which on reading a text into a cache is compiled for: each length takes a compilation."""

_TOLERANCE, _GRADIENT_TOLERANCE = 0.1, 0.3
"""Of the norm of the difference over the norm of the result, where a first call is compared with the layer itself. In
16 bits a rank near the threshold may fall on its other side, as random ranks often do; a wrong graph is off by far
more."""


class CompiledLayers:
    """The decoder layers of a model, compiled until `remove()` or the end of a `with` block.

    Texts of 4096 tokens or more that are read into an empty `BoundedCache`, without padding, are served, too. Calls
    that a compiled layer does not serve run as before: those that continue a cache, with an observer, over processes,
    of texts within the windows, of models split by tensor parallelism, and of layers that slide or are dense in a
    converted model. The first call of each kind is compared with the layer itself, gradients included; where they
    differ or compiling fails, a warning says so and the layers run as before.

    Args:
        model: a converted or a dense causal LM of transformers.
        backend: of `torch.compile`.

    Raises:
        InvalidInputError: a model without a list of decoder layers.
    """

    def __init__(self, model: Any, *, backend: str = "inductor") -> None:
        check_compilable(model)
        layers = model.base_model.layers
        # Layers that are split exchange sums with other processes.
        split = bool(getattr(model, "_tp_size", None))
        self.failure: str | None = "tensor parallelism" if split else None
        self._kinds: set[tuple[Any, ...]] = set()
        self._converted = is_converted(model)
        self._function = _ranked_layer if self._converted else _dense_layer
        self._compiled = torch.compile(
            _copy_of(self._function), backend=backend, fullgraph=True, dynamic=False, options=_options(backend)
        )
        self._layers = [layer for layer in layers if "forward" not in layer.__dict__]
        for layer in self._layers:
            layer.forward = _Runner(self, layer)

    def __enter__(self) -> CompiledLayers:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Let the layers run as before."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)
        self._layers = []

    def run(self, layer: Any, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer, compiled where the call allows it."""
        prepare = _ranked_call if self._converted else _dense_call
        call = None if args or self.failure is not None else prepare(layer, hidden_states, kwargs)
        if call is None or not self._checked(layer, hidden_states, call):
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        output, loss, kept = self._compiled(layer, hidden_states, *call)
        if loss is not None:
            _losses_of(layer, kwargs["dynamask"]).append(loss)
        if kept:
            _empty_layer(layer, kwargs).fill(*kept)
        return output

    def _checked(self, layer: Any, hidden_states: Tensor, call: tuple[Any, ...]) -> bool:
        """Whether calls of this kind are compiled; the first of a kind is tried out."""
        kind = (
            *(_kind(part) for part in (hidden_states, *call)),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(hidden_states.device.type),
            layer.training,
            tuple(parameter.requires_grad for parameter in layer.parameters()),
        )
        if kind in self._kinds:
            return True
        if len(self._kinds) >= _MOST_KINDS:
            return False
        try:
            self._try(layer, hidden_states, call)
        except Exception as error:  # whatever a compiler or an incomplete installation raises
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            warnings.warn(f"decoder layers run uncompiled, and slower: {self.failure}", stacklevel=4)
            return False
        self._kinds.add(kind)
        return True

    def _try(self, layer: Any, hidden_states: Tensor, call: tuple[Any, ...]) -> None:
        """Compare the compiled layer with the layer, on the data of a call.

        Raises:
            ArithmeticError: they differ.
        """
        # Around the call may stand a layer that is recomputed, which counts what is saved for its backward pass.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            found, expected = (_results(run, layer, hidden_states, call) for run in (self._compiled, self._function))
        for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
            if (actual is None) != (wanted is None):
                raise ArithmeticError("the compiled layer has other gradients than the layer")
            if actual is None or wanted is None:
                continue
            error = float((actual.double() - wanted.double()).norm())
            tolerance = _TOLERANCE if index < 2 else _GRADIENT_TOLERANCE
            if not error <= tolerance * float(wanted.double().norm()) + 1e-6:
                raise ArithmeticError(
                    f"the compiled layer differs from the layer by {error:.3g} where the norm is "
                    f"{float(wanted.double().norm()):.3g}"
                )


def is_compilable(model: Any) -> bool:
    """Whether a model has the list of decoder layers that `CompiledLayers` takes."""
    return isinstance(getattr(getattr(model, "base_model", None), "layers", None), nn.ModuleList)


def check_compilable(model: Any) -> None:
    """Raise `InvalidInputError` unless `is_compilable(model)`."""
    if not is_compilable(model):
        raise InvalidInputError(
            f"compiled_layers takes a causal LM with a list of decoder layers; got {type(model).__name__}"
        )


def compiled_layers(model: Any, *, backend: str = "inductor") -> CompiledLayers:
    """Compile the decoder layers of a converted or dense causal LM; see `CompiledLayers`, which it returns.

    with dynamask.convert.compiled_layers(model):
        trainer.train()
    """
    return CompiledLayers(model, backend=backend)


class _Runner:
    """Stands in for a layer's `forward`."""

    def __init__(self, owner: CompiledLayers, layer: nn.Module) -> None:
        self.owner, self.layer = owner, layer

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.owner.run(self.layer, hidden_states, args, kwargs)


_CACHES = ("past_key_values", "cache")


def _without_cache(kwargs: dict[str, Any], ignored: bool = False) -> dict[str, Any] | None:
    """The arguments of a layer but for a cache; None where there is one that is not ignored."""
    if torch.compiler.is_compiling() or (not ignored and any(kwargs.get(name) is not None for name in _CACHES)):
        return None
    return {k: value for k, value in kwargs.items() if value is not None and k not in ("dynamask", *_CACHES)}


def _empty_layer(layer: Any, kwargs: dict[str, Any]) -> Any:
    """The layer of a given bounded cache that this one fills, if it holds nothing yet and no gradients are wanted."""
    cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
    if cache is None or torch.is_grad_enabled():
        return None
    held = bounded_layer(cache, attention_of(layer).layer_idx)
    return held if held is not None and held.seen == 0 else None


def _dense_call(layer: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The further arguments of `_dense_layer`, or None for a call that it does not serve."""
    plain = _without_cache(kwargs)
    return None if plain is None else (plain,)


def _dense_layer(layer: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> tuple[Any, None, None]:
    return layer.__class__.forward(layer, hidden_states, **kwargs), None, None


def _ranked_call(layer: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The further arguments of `_ranked_layer`, or None for a call that it does not serve."""
    long = hidden_states.shape[1] >= _LONG
    held, facts, module = _empty_layer(layer, kwargs) if long else None, kwargs.get("dynamask"), attention_of(layer)
    plain = _without_cache(kwargs, ignored=held is not None)
    if plain is None or facts is None or facts.observer is not None or facts.shards is not None:
        return None
    if module.rank_predictor is None or facts.length != hidden_states.shape[1]:
        return None
    rules = module.config.layer_rules[module.layer_idx] if facts.rules is None else facts.rules[module.layer_idx]
    if rules.windows is None or facts.length <= min(rules.windows):
        return None
    if held is not None:
        if facts.key_mask is not None or facts.segment_ids is not None or module.head_group is not None:
            return None
        held.check_fits(rules.windows, local=rules.local, sinks=rules.sinks, slopes=rules.slopes)
    plain.pop("attention_mask", None)  # what it says is in the facts
    # Layers without slopes get zeros, and so the same graph.
    slopes = slope_tensor(tuple(rules.slopes or (0.0,) * len(rules.windows)), hidden_states.device)
    tensors = (_window_tensor(rules.windows), slopes, facts.ages, facts.position_ids)
    learns = _losses_of(layer, facts) is not None
    return (*tensors, facts.segment_ids, facts.key_mask, rules.local, rules.sinks, learns, held is not None, plain)


def _ranked_layer(
    layer: Any,
    hidden_states: Tensor,
    windows: Tensor,
    slopes: Tensor,
    ages: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
    local: int,
    sinks: int,
    learns: bool,
    keeps: bool,
    kwargs: dict[str, Any],
) -> tuple[Any, Tensor | None, list[Tensor] | None]:
    """Run a converted layer on facts that are tensors; return its output, the loss of its ranks, and what to keep."""
    losses: list[Tensor] = []
    kept: list[Tensor] = []
    facts = CallFacts(hidden_states.shape[1], key_mask, segment_ids, position_ids, ages)
    gathered = losses if learns else None, kept if keeps else None
    facts.tensor_rules = TensorRules(windows, slopes, local, sinks, *gathered)
    output = layer.__class__.forward(layer, hidden_states, dynamask=facts, **kwargs)
    return output, losses[0] if losses else None, kept or None


def _losses_of(layer: Any, facts: CallFacts) -> Any:
    """Where the loss of this layer's ranks goes, or None where they do not learn."""
    module = attention_of(layer)
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.rank_predictor.parameters())
    if not trained:
        return None
    return facts.losses if facts.losses is not None else module.rank_losses if module.training else None


def _results(run: Callable[..., Any], layer: Any, hidden_states: Tensor, call: tuple[Any, ...]) -> list[Tensor | None]:
    """Output, loss, what is kept and gradients of a call."""
    inputs = hidden_states.detach().requires_grad_(hidden_states.requires_grad)
    output, loss, kept = run(layer, inputs, *call)
    output = output[0] if isinstance(output, tuple) else output
    results = [output.detach(), None if loss is None else loss.detach(), *(kept or ())]
    if not output.requires_grad:
        return results
    wanted = [tensor for tensor in (inputs, *layer.parameters()) if tensor.requires_grad]
    slope = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(0)).to(output.device)
    total = (output * slope).sum().float()
    gradients = torch.autograd.grad(total if loss is None else total + loss, wanted, allow_unused=True)
    return [*results, *gradients]


_windows: dict[tuple[int, ...], Tensor] = {}


def _window_tensor(windows: tuple[int, ...]) -> Tensor:
    """(G,) int64 on the CPU, the same one for the same windows."""
    if windows not in _windows:
        with torch.inference_mode(False):
            _windows[windows] = torch.tensor(windows)
    return _windows[windows]


def _kind(part: Any) -> Any:
    """What of an argument a graph is compiled for."""
    if isinstance(part, Tensor):
        return part.shape, part.dtype, part.requires_grad
    if isinstance(part, dict):
        return tuple((name, _kind(value)) for name, value in sorted(part.items()))
    if isinstance(part, (tuple, list)):
        return tuple(_kind(value) for value in part)
    return part if isinstance(part, (int, float, str, bool)) else type(part)


def _options(backend: Any) -> dict[str, Any] | None:
    """Let inductor round where eager operations round: ranks decide by small differences."""
    if backend != "inductor":
        return None
    import torch._inductor.config as config

    return {"emulate_precision_casts": True} if hasattr(config, "emulate_precision_casts") else None


def _copy_of(function: Any) -> Any:
    """A function with a code object of its own: `torch.compile` limits how often one is compiled in a process."""
    copied = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    copied.__kwdefaults__, copied.__defaults__ = function.__kwdefaults__, function.__defaults__
    return copied


def _same(tensor: Tensor) -> Tensor:
    return tensor


__all__ = ["CompiledLayers", "compiled_layers"]
