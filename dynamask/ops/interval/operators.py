"""`torch.library` operators `dynamask::interval_attention` and its backward, one implementation per device.

Registering them lets torch.compile trace through without a graph break and lets autograd, fake tensors and
export see their shapes. The CPU implementation is `ops/blocked.py`; the CUDA one is `ops/triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamask.ops.interval import blocked


def triton_available() -> bool:
    """Whether the Triton kernels can run: Triton imports and there is a GPU (or Triton's interpreter is on)."""
    try:
        from dynamask.ops import triton as kernels
    except ImportError:
        return False
    return kernels.is_available()


@torch.library.custom_op("dynamask::interval_attention", mutates_args=())
def interval_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    scale: float,
    backend: str,
    max_live: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the output and the log-sum-exp in two parts; see `dynamask.ops.interval.blocked.forward`."""
    return run_forward(query, key, value, expiry, bias, scale, backend, max_live)


def run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    scale: float,
    backend: str,
    max_live: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `interval_attention_op` does, for operators that contain it."""
    if backend == "triton":
        from dynamask.ops import triton as kernels

        output, top, rest = kernels.interval_forward(query, key, value, expiry, bias, scale, max_live)
    else:
        output, top, rest = blocked.forward(query, key, value, expiry, bias, scale)
    # Compiled code believes the strides below, whatever those of the inputs.
    return output.contiguous(), top.contiguous(), rest.contiguous()


@interval_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    scale: float,
    backend: str,
    max_live: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_forward(query, value)


def empty_forward(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the forward's shapes and dtypes, for operators that contain it."""
    wide = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    top, rest = (query.new_empty(query.shape[:-1], dtype=wide) for _ in range(2))
    return output, top, rest


@torch.library.custom_op("dynamask::interval_attention_backward", mutates_args=())
def interval_attention_backward_op(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    output: Tensor,
    top: Tensor,
    rest: Tensor,
    scale: float,
    backend: str,
    max_live: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute gradients to query, key, value and bias; see `dynamask.ops.interval.blocked.backward` for shapes."""
    return run_backward(grad_output, query, key, value, expiry, bias, output, top, rest, scale, backend, max_live)


def run_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    output: Tensor,
    top: Tensor,
    rest: Tensor,
    scale: float,
    backend: str,
    max_live: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `interval_attention_backward_op` does, for operators that contain it."""
    if backend == "triton":
        from dynamask.ops import triton as kernels

        deterministic = torch.are_deterministic_algorithms_enabled()
        gradients = kernels.interval_backward(
            grad_output, query, key, value, expiry, bias, output, top, rest, scale, max_live, deterministic
        )
    else:
        gradients = blocked.backward(grad_output, query, key, value, expiry, bias, output, top, rest, scale)
    dq, dk, dv, dbias = (gradient.contiguous() for gradient in gradients)
    return dq, dk, dv, dbias


@interval_attention_backward_op.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    bias: Tensor | None,
    output: Tensor,
    top: Tensor,
    rest: Tensor,
    scale: float,
    backend: str,
    max_live: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        query.new_empty(expiry.shape, dtype=wide),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, expiry, bias, scale, backend, max_live = inputs
    ctx.save_for_backward(query, key, value, expiry, bias, *output)
    ctx.scale, ctx.backend, ctx.max_live = scale, backend, max_live
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_output, *_):  # type: ignore[no-untyped-def]
    query, key, value, expiry, bias, *parts = ctx.saved_tensors
    dq, dk, dv, dbias = interval_attention_backward_op(
        grad_output.contiguous(), query, key, value, expiry, bias, *parts, ctx.scale, ctx.backend, ctx.max_live
    )
    return dq, dk, dv, None, None if bias is None else dbias.to(bias.dtype), None, None, None


interval_attention_op.register_autograd(_backward, setup_context=_setup_context)
