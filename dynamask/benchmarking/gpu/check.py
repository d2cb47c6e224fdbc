"""Errors of output and gradients against float64, beside those of PyTorch's own dense kernels on the same inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamask import key_expiry
from dynamask.benchmarking.gpu.problem import KINDS, scores_like
from dynamask.ops import attend
from dynamask.ops.reference import interval_attention_reference

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DIMS = (64, 96, 128, 192, 256)
NAMES = ("output", "d_query", "d_key", "d_value", "d_scores")
ALLOWED = 1.5  # times the dense kernel's error
WRONG = 10.0  # more than this is no rounding error


def cases() -> list[dict[str, Any]]:
    """What is checked, with all `KINDS` of scores each: every dtype and head_dim, and the timed head ratios."""
    every = [{"dtype": dtype, "dim": dim, "groups": 4} for dtype in DTYPES for dim in DIMS]
    return every + [{"dtype": "bfloat16", "dim": 128, "groups": groups} for groups in (1, 16)]


def check_case(dtype: str, dim: int, groups: int, length: int = 1024, window: int = 256) -> list[dict[str, Any]]:
    """One row per kind of scores, see `check`, on one GPU.

    All memory that the kernels could be given is filled with NaN first, so that an element nobody wrote shows.
    """
    rows = []
    for kind in KINDS:
        poison()
        rows.append(check(dtype, dim, 16, groups, length, window, kind, "cuda", "triton"))
    return rows


def check(
    dtype: str, dim: int, heads: int, groups: int, length: int, window: int, kind: str, device: str, backend: str
) -> dict[str, Any]:
    """Relative errors (Euclidean norm) on fresh random inputs.

    Args:
        dtype: of `DTYPES`.
        dim, heads, groups, length, window: D, H, G, N and w.
        kind: of scores, see `scores_like`.
        device, backend: where our operator runs, and which of its backends.

    Returns:
        The case; the error of each of `NAMES`; "dense_" with the same names, of the dense kernel named in "dense" on
        its own problem (causal, no scores); "worst", the largest of ours over theirs. The scores' gradient, which no
        dense kernel has, is held against the largest error of the dense gradients.
    """
    kind_of_number = DTYPES[dtype]
    query = torch.randn(1, heads, length, dim, device=device, dtype=kind_of_number, requires_grad=True)
    key, value = (
        torch.randn(1, groups, length, dim, device=device, dtype=kind_of_number, requires_grad=True) for _ in range(2)
    )
    scores = scores_like(kind, (1, groups, length), device).requires_grad_()
    grad = torch.randn(query.shape, device=device, dtype=kind_of_number)
    expiry = key_expiry(scores, window)
    inputs = (query, key, value, scores)
    actual = attend(query, key, value, expiry, bias=scores, backend=backend, max_live=window)
    got = (actual, *torch.autograd.grad(actual, inputs, grad))
    wanted = _expected(inputs, expiry, grad)
    row: dict[str, Any] = {"dtype": dtype, "D": dim, "G": groups, "N": length, "w": window, "scores": kind}
    ours = {name: error(a, b) for name, a, b in zip(NAMES, got, wanted, strict=True)}

    name, dense = _dense(query, key, value)
    found = (dense, *torch.autograd.grad(dense, inputs[:3], grad))
    full = torch.full_like(expiry, length)
    theirs = {name: error(a, b) for name, a, b in zip(NAMES[:4], found, _expected(inputs[:3], full, grad), strict=True)}
    theirs["d_scores"] = max(theirs[gradient] for gradient in NAMES[1:4])
    row.update(ours)
    row["dense"] = name
    row.update({f"dense_{name}": value for name, value in theirs.items() if name != "d_scores"})
    row["worst"] = max((ours[name] / theirs[name] for name in NAMES), key=lambda r: (r != r, r))  # NaN is the worst
    return row


def _expected(inputs: tuple[Tensor, ...], expiry: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    wide = [t.detach().double().requires_grad_() for t in inputs]
    bias = wide[3] if len(wide) == 4 else None
    output = interval_attention_reference(wide[0], wide[1], wide[2], expiry, bias, wide[0].shape[-1] ** -0.5)
    return (output, *torch.autograd.grad(output, wide, grad.double()))


def _dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[str, Tensor]:
    """The fused dense kernel of this dtype: flash, or the memory-efficient one for float32."""
    if query.dtype != torch.float32 or not query.is_cuda:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return "flash", F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    ratio = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(ratio, dim=1) for t in (key, value))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return "efficient", F.scaled_dot_product_attention(query, key, value, is_causal=True)


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def poison(megabytes: int = 1024) -> None:
    """Fill memory that the next allocations will reuse with ones: NaN in every float type, -1 in integers."""
    large = torch.full((megabytes << 20,), 255, dtype=torch.uint8, device="cuda")
    # Allocations of up to a megabyte come from a pool of their own.
    small = [torch.full((512 << 10,), 255, dtype=torch.uint8, device="cuda") for _ in range(64)]
    del large, small


def failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that are plainly wrong, not merely less exact than allowed: NaN, or above `WRONG` times dense's error."""
    return [row for row in rows if not row["worst"] <= WRONG]
