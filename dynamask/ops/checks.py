"""Checks of the arguments that the operators share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dynamask.errors import InvalidInputError
from dynamask.ops.looks import looks_allowed

Window = SupportsIndex | Sequence[int] | Tensor
"""Keys each query keeps: an integer, or one per key/value head."""


def check_tensor(name: str, value: object, shape: str | tuple[int, ...]) -> None:
    """Raise `InvalidInputError` unless `value` is a tensor; `name` and `shape` describe it in the message.

    The shape is written out in the message alone: dynamic numbers become no text while a call is compiled.
    """
    if not isinstance(value, Tensor):
        raise InvalidInputError(f"{name} must be a torch.Tensor of shape {shape}; got {type(value).__name__}")


def needs_reference(*tensors: Tensor | None) -> bool:
    """Return whether a transform of `torch.func` (grad, vjp, jvp, their jacobians) or a tangent runs through a call.

    The operators' derivatives serve `backward()` and `torch.autograd.grad` alone.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        levels = torch._C._functorch.get_interpreter_stack() or []
        if any(level.key() == torch._C._functorch.TransformType.Grad for level in levels):
            return True
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise `InvalidInputError` where `needs_reference`: in forward mode torch would take the derivative for zero."""
    if needs_reference(*tensors):
        raise InvalidInputError(
            "this operator has derivatives in reverse mode alone, by backward() and torch.autograd.grad: for "
            "transforms of torch.func call interval_attention with backend='reference', which has them all"
        )


def check_segment_ids(segment_ids: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """Raise `InvalidInputError` unless segment_ids is None or (B, N) non-decreasing integers on `device`."""
    if segment_ids is None:
        return
    check_tensor("segment_ids", segment_ids, (batch, length))
    if segment_ids.shape != (batch, length) or segment_ids.is_floating_point():
        raise InvalidInputError(
            f"segment_ids must be integers of shape {(batch, length)}; "
            f"got {segment_ids.dtype} of shape {tuple(segment_ids.shape)}"
        )
    if segment_ids.device != device:
        raise InvalidInputError(f"segment_ids is on {segment_ids.device}, the scores on {device}: move one of them")
    # On a GPU the look at the data would stall the stream; there the caller's word is taken while compiling
    # or capturing, and checked otherwise.
    if not looks_allowed() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    if length > 1 and bool((segment_ids[:, 1:] < segment_ids[:, :-1]).any()):
        row = int((segment_ids[:, 1:] < segment_ids[:, :-1]).any(-1).nonzero()[0])
        raise InvalidInputError(
            f"segment_ids must not decrease along the sequence (row {row} does): number the packed documents "
            "in the order in which they stand"
        )


def check_key_mask(key_mask: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """Raise `InvalidInputError` unless key_mask is None or a (B, N) bool tensor on `device`."""
    if key_mask is None:
        return
    check_tensor("key_mask", key_mask, (batch, length))
    if key_mask.dtype != torch.bool or key_mask.shape != (batch, length):
        raise InvalidInputError(
            f"key_mask must be a bool tensor of shape {(batch, length)}, True for a real token; "
            f"got {key_mask.dtype} of shape {tuple(key_mask.shape)} (an attention_mask becomes one with .bool())"
        )
    if key_mask.device != device:
        raise InvalidInputError(f"key_mask is on {key_mask.device}, the scores on {device}: move one of them")


def check_position_ids(position_ids: Tensor | None, batch: int, new: int) -> None:
    """Raise `InvalidInputError` unless positions are None or of shape (batch or 1, new), one for each token."""
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, new), (1, new)):
        raise InvalidInputError(
            f"position_ids must be of shape {(batch, new)} or {(1, new)}, one for each token of the call; got "
            f"{tuple(position_ids.shape)}"
        )


def check_attention_mask(attention_mask: Tensor) -> None:
    """Refuse a mask of floating type that is additive (0 for visible) rather than 1 for a real token.

    Integer and bool masks pass without a look at their values, and so does every mask while compiling.

    Args:
        attention_mask: (B, N).

    Raises:
        InvalidInputError: floating values other than 0 and 1, or none that is 1.
    """
    if not attention_mask.is_floating_point() or not looks_allowed():
        return
    real = attention_mask == 1
    if not bool((real | (attention_mask == 0)).all()) or not bool(real.any()):
        raise InvalidInputError(
            "attention_mask must hold 1 for a real token and 0 for padding; got floating values other than 0 and 1, or "
            "no 1 at all, as in an additive mask (0 visible, a large negative number hidden): pass "
            "(additive_mask == 0).long()"
        )
