"""Gradients of batches of few shapes, replayed as CUDA graphs: small models wait for the host otherwise."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynamask.training.recorded_gradients import RecordedGradients, clear_gradients, record_checked

_WORTH = 8
"""Batches of a shape after which it is recorded."""


class ReplayedGradients:
    """Computes the loss of a batch, and puts its gradients into the parameters.

    On a GPU a shape that comes often is recorded, once for the windows that it meets, and its replay compared with the
    pass as it is. Where that fails, a warning says why, and all batches run as they are.

    Args:
        model: its parameters' `grad` must be None at every call.
        loss_of: computes a scalar from the tensors of a batch.
        record: whether the model's passes look at no data on the host.
    """

    def __init__(self, model: Any, loss_of: Callable[..., Tensor], *, record: bool = True) -> None:
        self._model, self._loss_of = model, loss_of
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._recorded: dict[Any, RecordedGradients] = {}
        self._seen: Counter[Any] = Counter()
        self._able = record and all(parameter.is_cuda for parameter in self._parameters)
        self._pool = torch.cuda.graph_pool_handle() if self._able else None

    def __call__(self, *batch: Tensor) -> Tensor:
        """() the loss, detached."""
        if not self._able:
            return self._as_it_is(*batch)
        length = batch[0].shape[1]
        kept = tuple(tuple(min(window, length) for window in layer) for layer in self._model.config.head_windows)
        kind = (*(tensor.shape for tensor in batch), kept)
        if kind not in self._recorded:
            self._seen[kind] += 1
            if self._seen[kind] <= _WORTH:
                return self._as_it_is(*batch)
            self._forget(batch, kept)
            self._record(kind, *batch)
            clear_gradients(self._parameters)
            if not self._able:
                return self._as_it_is(*batch)
        loss: Tensor = self._recorded[kind](*batch)
        return loss

    def _as_it_is(self, *batch: Tensor) -> Tensor:
        loss = self._loss_of(*batch)
        loss.backward()
        return loss.detach()

    def _record(self, kind: Any, *batch: Tensor) -> None:
        try:
            self._recorded[kind] = record_checked(self._loss_of, self._parameters, *batch, pool=self._pool)
        except Exception as error:  # whatever it is, the run goes on without
            self._able = False
            self._recorded.clear()
            warnings.warn(f"batches are not recorded: {' '.join(str(error).split())[:300]}", stacklevel=3)
            clear_gradients(self._parameters)
        torch.cuda.empty_cache()  # what warming up has left

    def _forget(self, batch: tuple[Tensor, ...], kept: Any) -> None:
        """Let go of recordings of the same shape under other windows, which do not come back."""
        shapes = tuple(tensor.shape for tensor in batch)
        for kind in [kind for kind in self._recorded if kind[:-1] == shapes and kind[-1] != kept]:
            del self._recorded[kind]
