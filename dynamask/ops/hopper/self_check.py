"""A check of the Hopper kernels against the definition, at the first use of each variant in a process.

A variant is a pass, a dtype, head widths, a number of query heads per key/value head, and whether there is a bias. A
new Triton or driver can miscompile a kernel that other machines run correctly; the portable kernels then take its
place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynamask.ops.hopper.dispatch import distrust, hopper, variant
from dynamask.ops.interval.reference import interval_attention_reference

_LENGTH, _LIFETIME, _GROUPS = 384, 200, 2
_TOLERANCE = 0.03
"""Of the norm of the difference over the norm of the result; 16-bit arithmetic stays below a fifth of it."""

_seen: set[tuple[Any, ...]] = set()


def check_first_use(
    attention_pass: str, query: Tensor, value: Tensor, bias: Tensor | None, compute: Callable[..., tuple[Tensor, ...]]
) -> None:
    """Compare a pass with the definition on a small problem, once per variant, and distrust it where they differ.

    Args:
        attention_pass: "forward" or "backward".
        query: (B, H, Nq, D); value (B, G, N, Dv), as the kernels would get them.
        bias: (B, G, N) or None.
        compute: `small_problem(...)` -> the results to compare, by the kernels: the output, or the gradients to query,
            key and value.
    """
    if hopper(attention_pass, query, value) is None:
        return
    kind = (attention_pass, *variant(query, value), bias is not None)
    if kind in _seen or _capturing():
        return
    _seen.add(kind)  # first, because `compute` comes through here again
    try:
        agrees = _agrees(attention_pass, query, value, bias is not None, compute)
        reason = "their results differ from the definition's"
    except Exception as error:  # a kernel that does not compile or launch is as bad as a wrong one
        agrees, reason = False, f"they failed: {error}"
    if not agrees:
        distrust(attention_pass, query, value)
        warnings.warn(
            f"dynamask's Hopper kernels ({attention_pass}, {query.dtype}, head widths {query.shape[3]} and "
            f"{value.shape[3]}) are not used on this machine, because {reason}. The portable kernels take their place "
            "and are slower. Please report it with the versions of torch, triton and the driver.",
            stacklevel=2,
        )


def _agrees(
    attention_pass: str, query: Tensor, value: Tensor, biased: bool, compute: Callable[..., tuple[Tensor, ...]]
) -> bool:
    """Whether the kernels' results are the definition's within rounding."""
    device, ratio = query.device, query.shape[1] // value.shape[1]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(query.dtype)

    # Around the first use may stand a layer that is recomputed, which counts what is saved for its backward pass.
    own_hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), torch.enable_grad(), own_hooks:
        q = normal(1, _GROUPS * ratio, _LENGTH, query.shape[3])
        k = normal(1, _GROUPS, _LENGTH, query.shape[3])
        v = normal(1, _GROUPS, _LENGTH, value.shape[3])
        gradient = normal(1, _GROUPS * ratio, _LENGTH, value.shape[3])
        lifetime = torch.randint(0, _LIFETIME, (1, _GROUPS, _LENGTH), device=device, generator=generator)
        # Few keys live in the last head: the walk takes such rows by other tiles.
        lifetime[:, -1] *= torch.randint(0, 6, (_LENGTH,), device=device, generator=generator) == 0
        birth = torch.arange(_LENGTH, device=device)
        expiry = torch.minimum(birth + lifetime, birth.new_tensor(_LENGTH)).to(torch.int32)
        bias = normal(1, _GROUPS, _LENGTH).float() if biased else None
        scale = query.shape[3] ** -0.5
        wide_q, wide_k, wide_v = inputs = [tensor.float().requires_grad_() for tensor in (q, k, v)]
        expected = interval_attention_reference(wide_q, wide_k, wide_v, expiry, bias, scale)
        wanted: tuple[Tensor, ...] = (expected,)
        if attention_pass == "backward":
            wanted = torch.autograd.grad(expected, inputs, gradient.float())
        with torch.no_grad():
            found = compute(gradient, q, k, v, expiry, bias, scale)
    return all(_close(a, b.detach()) for a, b in zip(found, wanted, strict=False))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _close(found: Tensor, wanted: Tensor) -> bool:
    error = (found.float() - wanted).norm() / wanted.norm()
    return bool(error < _TOLERANCE)  # NaN is not below it


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
