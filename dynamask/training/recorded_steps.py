"""The micro-steps of a transformers `Trainer` as CUDA graphs."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynamask.errors import InvalidInputError
from dynamask.models.cuda_graph import reason_against
from dynamask.training.recorded_gradients import (
    RecordedGradients,
    clear_gradients,
    free_recordings,
    record_checked,
)

_MOST_RECORDINGS = 3
"""Graphs of one training: for shapes of batches, or rules of a model that change. Each keeps its memory."""


_SAID = "training steps are not recorded as a CUDA graph, and slower: "


class RecordedSteps:
    """Computes the gradients of a trainer's batches by replaying what was recorded.

    The first batch of a shape runs as it is, the second is recorded, and its replay compared with the step as it is.
    Batches that cannot be replayed run as they are; where recording fails, a warning says so, and all do.

    Args:
        trainer: a transformers `Trainer`.
        step: computes the gradients of a batch, as `Trainer.training_step`, and looks at no data on the host.
        wanted: whether a warning also gives a reason that is known from the beginning.
    """

    def __init__(self, trainer: Any, step: Callable[..., Tensor], *, wanted: bool = False) -> None:
        self._trainer, self._step, self._wanted = trainer, step, wanted
        self._seen: set[Any] = set()
        self._recorded: dict[Any, RecordedGradients] = {}
        self._known = False
        self.reason: str | None = None
        """Why nothing is recorded, once that is known."""

    def __call__(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        """Put the gradients of a batch into the parameters, added to those there, and return its loss."""
        own = functools.partial(self._step, model, num_items_in_batch=num_items_in_batch, **kwargs)
        if not self._known:
            self._known, self.reason = True, reason_against_recording(self._trainer, model)
            if self._wanted and self.reason is not None:
                warnings.warn(_SAID + self.reason, stacklevel=4)
        if self.reason is not None or kwargs or not all(isinstance(each, Tensor) for each in inputs.values()):
            return own(inputs)
        inputs = self._trainer._prepare_inputs(inputs)
        tensors = {name: inputs[name] for name in sorted(inputs)}
        if num_items_in_batch is not None:
            items = torch.as_tensor(num_items_in_batch, device=self._trainer.args.device)
            tensors["num_items_in_batch"] = items
        parameters = list(model.parameters())
        kind = self._kind(model, parameters, tensors)
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        if kind not in self._recorded:
            if kind not in self._seen or len(self._recorded) >= _MOST_RECORDINGS:
                self._seen.add(kind)
                return own(inputs)
            self._try(model, learning, kind, tensors)
            if self.reason is not None:
                return own(inputs)
        return self._replay(learning, kind, list(tensors.values()))

    def _kind(self, model: Any, parameters: list[nn.Parameter], tensors: dict[str, Tensor]) -> Any:
        """What a recording is made for: shapes, where parameters lie and which learn, what is read on the host."""
        shapes = tuple((name, each.shape, each.dtype) for name, each in tensors.items())
        config = getattr(model, "config", None)
        names = ("windows", "slopes", "local", "sinks", "rank_loss_weight")
        rules = tuple(repr(getattr(config, name, None)) for name in names)
        places = tuple((each.data_ptr(), each.requires_grad) for each in parameters)
        return shapes, rules, places, getattr(self._trainer, "current_gradient_accumulation_steps", 1)

    def _run(self, model: Any, names: list[str], *tensors: Tensor) -> Tensor:
        inputs = dict(zip(names, tensors, strict=True))
        items = inputs.pop("num_items_in_batch", None)
        return self._step(model, inputs, num_items_in_batch=items)

    def _try(self, model: Any, parameters: list[nn.Parameter], kind: Any, tensors: dict[str, Tensor]) -> None:
        """Record the gradients of the parameters that learn, or give the reason why that fails."""
        held = [parameter.grad for parameter in parameters]
        run = functools.partial(self._run, model, list(tensors))
        try:
            clear_gradients(parameters)
            options: dict[str, Any] = {"backward": False, "compare": not _drops(model)}
            self._recorded[kind] = record_checked(run, parameters, *tensors.values(), **options)
        except (InvalidInputError, RuntimeError) as error:
            self.reason = " ".join(str(error).split())[:300]
            self._recorded.clear()
            warnings.warn(_SAID + self.reason, stacklevel=4)
        finally:
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient
        if self.reason is not None:
            free_recordings()

    def _replay(self, parameters: list[nn.Parameter], kind: Any, tensors: list[Tensor]) -> Tensor:
        recorded = self._recorded[kind]
        # A recording writes its own gradients anew: what is to be added up must lie elsewhere.
        held = [None if p.grad is None else p.grad.clone() for p in parameters]
        clear_gradients(parameters)
        loss: Tensor = recorded(*tensors)
        both = [(p, before) for p, before in zip(parameters, held, strict=True) if before is not None]
        added = [(before, p.grad) for p, before in both if p.grad is not None]
        if added:
            torch._foreach_add_([before for before, _ in added], [gradient for _, gradient in added])
        for parameter, before in both:
            parameter.grad = before
        return loss


def reason_against_recording(trainer: Any, model: Any) -> str | None:
    """Return why the steps of a trainer cannot be recorded, or None if nothing known is in the way.

    Args:
        trainer: a transformers `Trainer`.
        model: that it trains, as it is handed to `training_step`.
    """
    args = trainer.args
    places = {parameter.device for parameter in model.parameters()}
    if len(places) != 1 or next(iter(places)).type != "cuda":
        return f"parameters lie on {sorted(map(str, places))}, and a CUDA graph is of one GPU"
    if args.world_size > 1 or args.n_gpu > 1:
        return "several GPUs train together"
    how = getattr(args, "gradient_checkpointing_kwargs", None) or {}
    checkpointed = args.gradient_checkpointing or getattr(model, "is_gradient_checkpointing", False)
    checkpointed = checkpointed and (how.get("preserve_rng_state", True) or how.get("use_reentrant", True))
    for hinders, what in (
        (
            checkpointed,
            "gradient checkpointing keeps the state of random numbers: set gradient_checkpointing_kwargs="
            '{"use_reentrant": False, "preserve_rng_state": False}',
        ),
        (args.fp16, "float16 scales the loss by what the last steps gave"),
        (args.torch_compile, "torch_compile may compile in any step"),
        (args.torch_empty_cache_steps is not None, "torch_empty_cache_steps waits for the GPU"),
        (getattr(args, "deepspeed", None), "DeepSpeed runs the backward pass"),
    ):
        if hinders:
            return what
    return reason_against(model)


def record_steps(trainer: Any, *, wanted: bool = True) -> Any:
    """Let a transformers `Trainer` replay its training steps as CUDA graphs, on one GPU.

    The host gives out some hundred launches for a layer; with short texts and small models, that decides the time of a
    step. A replay is one launch. Batches must keep their shape: each shape is recorded, up to three; others run as they
    are. What a step does on the host besides (hooks of modules, prints) happens when it is recorded, not in replays;
    models with hooks are not recorded. Call it once, before `trainer.train()`, and after `add_rank_loss`.

        trainer = dynamask.training.record_steps(transformers.Trainer(model, ...))

    `AtomicTrainer` (and `dynamask train`) and `DistillationTrainer` have an argument `recorded` in its place.

    Args:
        trainer: a transformers `Trainer`, or one derived from it, of a native, a converted or a dense model.
        wanted: see `RecordedSteps`.

    Returns:
        The trainer.

    Raises:
        InvalidInputError: something without a `training_step`, or whose steps are recorded already.
    """
    step = getattr(trainer, "training_step", None)
    if step is None or not inspect.ismethod(step):
        raise InvalidInputError(
            f"record_steps takes a transformers Trainer whose steps are not recorded yet; got {type(trainer).__name__}"
        )
    trainer.training_step = RecordedSteps(trainer, step, wanted=wanted)
    return trainer


def _drops(model: nn.Module) -> bool:
    """Whether a step depends on random numbers."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


__all__ = ["RecordedSteps", "reason_against_recording", "record_steps"]
