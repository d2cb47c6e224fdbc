"""Forward and backward pass of one batch as a CUDA graph: no launch waits for the host.

A layer in training is some hundred launches. Where they are short, as in small models and short texts, the host that
gives them out decides the time of a step; recorded, the GPU does.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from dynamask.errors import InvalidInputError
from dynamask.models.recording import recording
from dynamask.ops.looks import without_looks

_CLOSE = 0.02
"""Largest relative difference of loss and norm of the gradients from the step as it is: bfloat16 and atomic sums."""

_WARM_UP = 3
"""Passes before recording: they compile kernels and fill the tables that a graph cannot."""


class RecordedGradients:
    """Computes loss and gradients by replaying what was recorded.

    The passes must not look at the data on the host. Dynamask's models take padding masks and packed documents
    (`position_ids` that start over) as given while recording; transformers' search for the latter is left out, so
    dense models must not pack. Losses of earlier passes may be held. Checkpointed layers need
    `gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}`.

        step = RecordedGradients(lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
                                 model.parameters(), ids)
        for ids in blocks:
            loss = step(ids)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    Args:
        loss_of: computes a scalar from the inputs, or a tuple of the scalar and further tensors to return.
        parameters: those whose gradients are wanted; their `grad` must be None.
        inputs: tensors on the GPU, of the shapes and dtypes of all later calls. They are used for warming up.
        backward: whether the backward pass of the scalar is run here; otherwise `loss_of` runs it.
        pool: memory that it shares with other recordings, `torch.cuda.graph_pool_handle()`, each of which overwrites
            the gradients of the others; None: memory of its own.

    Raises:
        InvalidInputError: inputs that are not on a GPU, or parameters with gradients.
        RuntimeError: something in the passes cannot be recorded. The process can go on without.
    """

    def __init__(
        self,
        loss_of: Callable[..., Any],
        parameters: Iterable[nn.Parameter],
        *inputs: Tensor,
        backward: bool = True,
        pool: Any = None,
    ) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        check_recordable(self._parameters, inputs)
        self._inputs = [tensor.clone() for tensor in inputs]

        def passes() -> Any:
            results = loss_of(*self._inputs)
            if backward:
                (results[0] if isinstance(results, tuple) else results).backward()
            return tuple(each.detach() for each in results) if isinstance(results, tuple) else results.detach()

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(aside), without_looks(), _without_search():
                for _ in range(_WARM_UP):
                    _renew(self._parameters)
                    passes()
                    clear_gradients(self._parameters)
        finally:
            clear_gradients(self._parameters)
            torch.cuda.current_stream().wait_stream(aside)
        gc.collect()  # what waits in reference cycles would hold as much memory as the graph takes
        _renew(self._parameters)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with without_looks(), _without_search(), recording(self.graph, pool):
                self._results = passes()
            self._gradients = [parameter.grad for parameter in self._parameters]
        finally:
            clear_gradients(self._parameters)
        self._places = [parameter.data_ptr() for parameter in self._parameters]

    def __call__(self, *inputs: Tensor) -> Any:
        """Return what `loss_of` returned for these inputs, and put the gradients into `grad` of the parameters.

        The gradients stay valid until the next call.

        Raises:
            InvalidInputError: inputs of other shapes, dtypes or devices, parameters that were moved, or gradients of
                the last call that were not set to None: they would be overwritten.
        """
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]
        expected = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self._inputs]
        if shapes != expected:
            raise InvalidInputError(
                f"recorded for inputs {[(tuple(s), d) for s, d, _ in expected]} and called with "
                f"{[(tuple(s), d) for s, d, _ in shapes]}: record another step for other shapes"
            )
        if any(parameter.grad is not None for parameter in self._parameters):
            raise InvalidInputError(_GRADIENTS_LEFT)
        if any(p.data_ptr() != place for p, place in zip(self._parameters, self._places, strict=True)):
            raise InvalidInputError("parameters were moved after the step was recorded: record it again")
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        results = self._results
        return tuple(each.clone() for each in results) if isinstance(results, tuple) else results.clone()


def clear_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set the gradients of parameters to None."""
    for parameter in parameters:
        parameter.grad = None


def loss_and_norm(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return (2,) float32: a loss, and the norm of the gradients that the parameters hold."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack([loss.float(), torch.nn.utils.get_total_norm(gradients)])


def record_checked(
    loss_of: Callable[..., Any],
    parameters: Iterable[nn.Parameter],
    *inputs: Tensor,
    backward: bool = True,
    pool: Any = None,
    compare: bool = True,
    advice: str = "",
) -> RecordedGradients:
    """Record a step, and compare its first replay with the step as it is.

    Args:
        loss_of, parameters, inputs, backward, pool: see `RecordedGradients`; `loss_of` returns a scalar.
        compare: False where a step depends on random numbers.
        advice: see `check_replay`.

    Raises:
        InvalidInputError, RuntimeError: as `RecordedGradients` and `check_replay`.
    """
    parameters = list(parameters)
    loss = loss_of(*inputs)
    if backward:
        loss.backward()
    expected = loss_and_norm(loss.detach(), parameters)
    del loss  # before recording: what a pass keeps is as much memory as the graph's
    clear_gradients(parameters)
    torch.cuda.empty_cache()  # the recording has memory of its own
    recorded = RecordedGradients(loss_of, parameters, *inputs, backward=backward, pool=pool)
    found = loss_and_norm(recorded(*inputs), parameters)
    clear_gradients(parameters)
    if compare:
        check_replay(found, expected, advice)
    return recorded


def free_recordings() -> None:
    """Give back the memory that recordings which are gone have kept to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_replay(found: Tensor, expected: Tensor, advice: str = "") -> None:
    """Refuse a recorded step whose first replay differs from the step as it is.

    Args:
        found, expected: `loss_and_norm` of the two.
        advice: end of the message.

    Raises:
        InvalidInputError: they differ by more than bfloat16 and atomic sums explain, or are no numbers.
    """
    if not bool(((found - expected) / expected).abs().max() < _CLOSE):
        raise InvalidInputError(
            f"the recorded step gives loss and norm of the gradients {found.tolist()}, the step as it is "
            f"{expected.tolist()}{advice}"
        )


def _renew(parameters: list[nn.Parameter]) -> None:
    """Let go of the nodes that add up gradients.

    A node belongs to the stream that was current when it was made, and lives as long as any loss computed from the
    parameter. One of another stream would end the recording. Data of another dtype makes torch forget it.
    """
    for parameter in parameters:
        data = parameter.data
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=data.device)
        parameter.data = data


@contextlib.contextmanager
def _without_search() -> Iterator[None]:
    """Keep transformers from looking for packed documents, and from making masks because it sees a recording."""
    own: dict[str, Any] = {
        name: getattr(masking_utils, name, None) for name in ("find_packed_sequence_indices", "is_tracing")
    }
    replaced: dict[str, Any] = {
        "find_packed_sequence_indices": lambda position_ids: None,
        "is_tracing": lambda *tensors: False,
    }
    try:
        for name, function in replaced.items():
            if own[name] is not None:
                setattr(masking_utils, name, function)
        yield
    finally:
        for name, function in own.items():
            if function is not None:
                setattr(masking_utils, name, function)


_GRADIENTS_LEFT = (
    "parameters hold gradients, which the recorded step would overwrite: call zero_grad(set_to_none=True) before it; "
    "it does not accumulate"
)


def check_recordable(parameters: list[nn.Parameter], inputs: tuple[Tensor, ...]) -> None:
    """Refuse what cannot be recorded.

    Raises:
        InvalidInputError: no parameters or inputs, some not on one GPU, or parameters with gradients.
    """
    if not parameters or not inputs:
        raise InvalidInputError("a recorded step needs inputs, and parameters that require gradients")
    places = {tensor.device for tensor in (*parameters, *inputs)}
    if len(places) > 1 or next(iter(places)).type != "cuda":
        raise InvalidInputError(
            f"a recorded step is a CUDA graph of one GPU; parameters and inputs lie on {sorted(map(str, places))}"
        )
    if any(parameter.grad is not None for parameter in parameters):
        raise InvalidInputError(_GRADIENTS_LEFT)


__all__ = [
    "RecordedGradients",
    "check_recordable",
    "check_replay",
    "clear_gradients",
    "free_recordings",
    "loss_and_norm",
    "record_checked",
]
