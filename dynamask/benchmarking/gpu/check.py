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
_PAIRS = 1 << 25  # of query and key that exist at a time in float64


def cases() -> list[dict[str, Any]]:
    """What is checked, with all `KINDS` of scores each: every dtype and head_dim, the timed head ratios, long rows.

    Long rows take other kernels (the walk of the backward pass, lists in two steps), those that are timed.
    """
    every = [{"dtype": dtype, "dim": dim, "groups": 4} for dtype in DTYPES for dim in DIMS]
    every += [{"dtype": "bfloat16", "dim": 128, "groups": groups} for groups in (1, 16)]
    long = {"groups": 4, "length": 16384, "window": 2048}
    return [{"dtype": d, "dim": n, **long} for d, n in (("bfloat16", 128), ("bfloat16", 64), ("float16", 128))] + every


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
    """Output and gradients in float64, some queries at a time, since the reference materialises its mask."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    query, key, value = wide[:3]
    heads, length, dim = query.shape[1:]
    step = max(1, _PAIRS // (heads * length))
    outputs = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        bias = wide[3][..., :stop] if len(wide) == 4 else None
        # The last queries of a prefix, which is how the operator takes fewer queries than keys.
        prefix = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], expiry[..., :stop])
        output = interval_attention_reference(*prefix, bias, dim**-0.5)
        output.backward(grad[:, :, start:stop].double())
        outputs.append(output.detach())
    return (torch.cat(outputs, dim=2), *(t.grad for t in wide if t.grad is not None))


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
