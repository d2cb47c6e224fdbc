"""Errors of output and gradients against float64, beside those of PyTorch's own dense kernels on the same inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamask import key_expiry
from dynamask.ops.interval.api import attend
from dynamask.ops.interval.operators import interval_attention_op
from dynamask.ops.interval.reference import interval_attention_reference
from dynamask_lab.benchmarks.gpu.problem import KINDS, scores_like

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DIMS = (64, 96, 128, 192, 256)
NAMES = ("output", "d_query", "d_key", "d_value", "d_scores")
ALLOWED = 1.5  # times the dense kernel's error
WRONG = 10.0  # more than this is no rounding error
_PAIRS = 1 << 23  # of query and key that exist at a time in float64


_LONG = {"length": 16384, "window": 2048}

# What the benchmarks time, the whole model (G = 8) and NSA's shape (G = 1) included, on rows long enough for the
# kernels that they time.
TIMED: list[dict[str, Any]] = [
    *({"dtype": "bfloat16", "dim": dim, "groups": groups, **_LONG} for dim, groups in ((128, 4), (128, 16), (64, 4))),
    *({"dtype": "bfloat16", "dim": 128, "groups": groups, **_LONG} for groups in (8, 1)),
    {"dtype": "bfloat16", "dim": 128, "groups": 4, **_LONG, "deterministic": True},
]


def cases() -> list[dict[str, Any]]:
    """What is checked, with all `KINDS` of scores each: every dtype and head_dim, the timed head ratios, long rows.

    Long rows take other kernels (the walk of the backward pass, lists in two steps), those that are timed.
    """
    every = [{"dtype": dtype, "dim": dim, "groups": 4} for dtype in DTYPES for dim in DIMS]
    every += [{"dtype": "bfloat16", "dim": 128, "groups": groups} for groups in (1, 16)]
    return [*TIMED, {"dtype": "float16", "dim": 128, "groups": 4, **_LONG}, *every]


def check_case(
    dtype: str,
    dim: int,
    groups: int,
    length: int = 1024,
    window: int = 256,
    heads: int = 16,
    deterministic: bool = False,
) -> list[dict[str, Any]]:
    """One row per kind of scores, see `check`, on one GPU.

    All memory that the kernels could be given is filled with NaN first, so that an element nobody wrote shows.
    """
    rows = []
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    for kind in KINDS:
        poison()
        rows.append(check(dtype, dim, heads, groups, length, window, kind, "cuda", "triton"))
        if deterministic:
            rows[-1]["deterministic"] = True
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


def kept_wrongly(scores: Tensor, expiry: Tensor, window: int, count: int = 32) -> int:
    """How many of a sample of queries do not keep the `window` best-scored keys of their prefix.

    Args:
        scores: (1, G, N) float; expiry: (1, G, N) int32, under test.
        window: w.
        count: queries looked at per head, the last one among them.
    """
    groups, length = scores.shape[1:]
    position = torch.arange(length, device=scores.device)
    wrong = 0
    for group in range(groups):
        for i in [*torch.randint(length, (count - 1,)).tolist(), length - 1]:
            prefix = scores.detach()[0, group, : i + 1]
            seen = expiry[0, group, : i + 1] > i
            kept = min(window, i + 1)
            # Equal scores at the threshold may be exchanged; which of them stays is tested with the operator.
            fits = int(seen.sum()) == kept and bool(prefix[seen].min() >= prefix.topk(kept).values[-1])
            wrong += not fits or bool((expiry[0, group] < position).any())
    return wrong


def sampled_errors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    expiry: Tensor,
    grad: Tensor,
    max_live: int,
    *,
    backward: bool = True,
    backend: str = "triton",
    count: int = 32,
) -> dict[str, float]:
    """Relative errors against float64 at a sample of queries and of keys: what a row of any length can afford.

    Args:
        query, grad: (1, H, N, D); key, value: (1, G, N, D); scores: (1, G, N); expiry: (1, G, N) int32.
        max_live: see `dynamask.ops.attend`.
        backward: the gradients, too.
        backend: of our operator.
        count: queries, and keys that some query sees, per key/value head.

    Returns:
        The error of each of `NAMES` (without `backward`, of the output alone) and of "lse", the log-sum-exp that the
        gradients of the sampled keys are computed from.
    """
    groups, length, dim = key.shape[1:]
    ratio, scale = query.shape[1] // groups, dim**-0.5
    inputs = tuple(t.detach().requires_grad_(backward) for t in (query, key, value, scores))
    output, top, rest = interval_attention_op(*inputs[:3], expiry, inputs[3], scale, backend, [max_live] * groups)
    lse = top + rest
    gradients = torch.autograd.grad(output, inputs, grad) if backward else ()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def compare(name: str, got: Tensor, wanted: Tensor) -> None:
        found.setdefault(name, []).append((got.double(), wanted))

    position = torch.arange(length, device=key.device)
    for group in range(groups):
        heads = slice(group * ratio, (group + 1) * ratio)
        keys, values, bias = (t.detach()[0, group].double() for t in (key, value, scores))
        dies = expiry[0, group]
        i = torch.cat([torch.randint(length, (count - 1,), device=key.device), position[-1:]])
        rows, slopes = query.detach()[0, heads, i].double(), grad[0, heads, i].double()
        seen = (position <= i[:, None]) & (i[:, None] < dies)
        logits = (rows @ keys.T * scale + bias).masked_fill(~seen, float("-inf"))
        sums = logits.logsumexp(-1)
        weights = (logits - sums[..., None]).exp()
        mixed = weights @ values
        compare("output", output.detach()[0, heads, i], mixed)
        compare("lse", lse[0, heads, i], sums)
        if not backward:
            continue
        inner = weights * (slopes @ values.T - (slopes * mixed).sum(-1, keepdim=True))
        compare("d_query", gradients[0][0, heads, i], inner @ keys * scale)
        living = (dies > position).nonzero()[:, 0]
        for j in living[torch.randint(len(living), (count // 4,), device=key.device)].tolist():
            life = slice(j, int(dies[j]))
            rows, slopes = query.detach()[0, heads, life].double(), grad[0, heads, life].double()
            weight = (rows @ keys[j] * scale + bias[j] - lse[0, heads, life].double()).exp()
            delta = (slopes * output.detach()[0, heads, life].double()).sum(-1)
            inner = weight * (slopes @ values[j] - delta)
            compare("d_key", gradients[1][0, group, j], torch.einsum("hn,hnd->d", inner, rows) * scale)
            compare("d_value", gradients[2][0, group, j], torch.einsum("hn,hnd->d", weight, slopes))
            compare("d_scores", gradients[3][0, group, j], inner.sum())
    return {
        name: error(torch.cat([a.flatten() for a, _ in pairs]), torch.cat([b.flatten() for _, b in pairs]))
        for name, pairs in found.items()
    }


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
