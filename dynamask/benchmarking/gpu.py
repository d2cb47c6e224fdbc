"""Interval attention on a GPU against its peers, in one run: correct first, then timed on random data.

Peers: PyTorch SDPA with the flash and the cuDNN backend (dense causal), FlashAttention-3's forward where its wheel
`fa3-fwd` is installed (dense causal), FlexAttention with the very same mask and bias.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamask import key_expiry
from dynamask.ops import attend
from dynamask.ops.reference import interval_attention_reference


def environment() -> dict[str, Any]:
    """Device and versions."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def scores_like(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Scores that decide which keys are kept.

    "random" (kept keys scattered, the worst case for locality), "rising" (all clustered: a sliding window) or
    "falling" (the first keys stay for ever).
    """
    scores = torch.randn(shape, device="cuda")
    if kind == "random":
        return scores
    return scores.sort(-1, descending=kind == "falling").values


def check(dim: int, heads: int, groups: int, window: int, kind: str, dtype: torch.dtype, length: int = 2048) -> dict:
    """Errors of output and gradients against float64, and SDPA flash's on a dense mask of the same inputs."""
    shape = (1, groups, length)
    query = torch.randn(1, heads, length, dim, device="cuda", dtype=dtype, requires_grad=True)
    key, value = (torch.randn(*shape, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    scores = scores_like(kind, shape).requires_grad_()
    expiry = key_expiry(scores, window)
    grad = torch.randn(query.shape, device="cuda", dtype=dtype)
    inputs = (query, key, value, scores)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    wide_query, wide_key, wide_value, wide_scores = wide
    expected = interval_attention_reference(wide_query, wide_key, wide_value, expiry, wide_scores, dim**-0.5)
    wanted = (expected, *torch.autograd.grad(expected, wide, grad.double()))
    actual = attend(query, key, value, expiry, bias=scores, backend="triton", max_live=window)
    got = (actual, *torch.autograd.grad(actual, inputs, grad))
    names = ("output", "d_query", "d_key", "d_value", "d_scores")
    result = {name: _error(a, b) for name, a, b in zip(names, got, wanted, strict=True)}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        dense = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    full = torch.full(shape, length, dtype=torch.int32, device="cuda")
    reference = interval_attention_reference(wide_query, wide_key, wide_value, full, None, dim**-0.5)
    result["flash_output"] = _error(dense, reference)
    return result


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def time_attention(
    length: int, dim: int, heads: int, groups: int, window: int, kind: str = "random", peers: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Median milliseconds of ours (and its parts) and of each peer, bfloat16, batch 1.

    Args:
        length, dim, heads, groups, window: N, D, H, G and w.
        kind: see `scores_like`.
        peers: of "flash", "cudnn", "fa3", "flex".
    """
    dtype = torch.bfloat16
    query = torch.randn(1, heads, length, dim, device="cuda", dtype=dtype, requires_grad=True)
    key, value = (torch.randn(1, groups, length, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    scores = scores_like(kind, (1, groups, length)).requires_grad_()
    expiry = key_expiry(scores, window)
    grad = torch.randn(query.shape, device="cuda", dtype=dtype)
    seen = (expiry - torch.arange(length, device="cuda")).clamp(min=0).sum().item()
    flops = 4.0 * dim * (heads // groups) * seen
    row: dict[str, Any] = {"N": length, "D": dim, "H": heads, "G": groups, "w": window, "scores": kind}
    inputs = (query, key, value, scores)

    def ours() -> Tensor:
        return attend(query, key, value, expiry, bias=scores, backend="triton", max_live=window)

    from dynamask.ops.triton import forward_lists

    # Replayed as a graph: a training step queues its launches ahead, so their device time is what it pays.
    row["expiry_ms"] = _ms_graph(lambda: key_expiry(scores, window))
    row["lists_ms"] = _ms_graph(lambda: forward_lists(query, value, expiry, window))
    with torch.no_grad():
        row["forward_ms"] = _ms(ours)
    output = ours()
    row["backward_ms"] = _ms(lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True))
    row["memory_forward"] = _extra_memory(torch.no_grad()(ours), inputs)
    row["memory_backward"] = _extra_memory(lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True), inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)
    row["deterministic_backward_ms"] = _ms(lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True))
    torch.use_deterministic_algorithms(False)
    row["mask_share"] = (row["expiry_ms"] + row["lists_ms"]) / row["forward_ms"]
    row["forward_tflops"] = flops / row["forward_ms"] / 1e9
    row["backward_tflops"] = 2.5 * flops / row["backward_ms"] / 1e9
    for peer in peers:
        try:
            attention = _PEERS[peer](query, key, value, scores, expiry)
            with torch.no_grad():
                row[f"{peer}_forward_ms"] = _ms(attention)
            if peer in ("flash", "cudnn"):
                dense = attention()
                row[f"{peer}_backward_ms"] = _ms(
                    partial(torch.autograd.grad, dense, inputs[:3], grad, retain_graph=True)
                )
        except Exception as error:  # a peer that cannot run here is reported, not fatal
            row[f"{peer}_error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return row


def _extra_memory(run: Callable[[], Any], inputs: tuple[Tensor, ...]) -> float:
    """Peak memory of a run above what stood before it and what it returns, as a share of the inputs' size."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    peak = torch.cuda.max_memory_allocated() - before
    kept = sum(t.nbytes for t in (results if isinstance(results, tuple) else (results,)))
    return (peak - kept) / sum(t.nbytes for t in inputs)


def time_decode(context: int, window: int, batch: int, dim: int = 128, heads: int = 16, groups: int = 4) -> dict:
    """Microseconds of one decoding step's attention over the bounded cache, and of dense SDPA over the context."""
    dtype = torch.bfloat16
    query = torch.randn(batch, heads, 1, dim, device="cuda", dtype=dtype)
    slots = min(window, context)
    key, value = (torch.randn(batch, groups, slots, dim, device="cuda", dtype=dtype) for _ in range(2))
    bias = torch.randn(batch, groups, slots, device="cuda")
    expiry = torch.full((batch, groups, slots), slots, dtype=torch.int32, device="cuda")
    row: dict[str, Any] = {"context": context, "w": window, "B": batch, "D": dim, "H": heads, "G": groups}
    with torch.no_grad():
        bounded = partial(attend, query, key, value, expiry, bias=bias, backend="triton", max_live=window)
        row["bounded_us"] = 1e3 * _ms_graph(bounded)
        del key, value
        if batch * context * groups * dim * 4 < 40e9:
            key, value = (torch.randn(batch, groups, context, dim, device="cuda", dtype=dtype) for _ in range(2))
            dense = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)
            row["dense_us"] = 1e3 * _ms_graph(dense)
    return row


def _flash(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, expiry: Tensor) -> Callable[[], Tensor]:
    return _sdpa(SDPBackend.FLASH_ATTENTION, query, key, value)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, expiry: Tensor) -> Callable[[], Tensor]:
    return _sdpa(SDPBackend.CUDNN_ATTENTION, query, key, value)


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    def attention() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return attention


def _fa3(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, expiry: Tensor) -> Callable[[], Tensor]:
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        from fa3_fwd import flash_attn_func  # type: ignore[no-redef]
    q, k, v = (t.detach().transpose(1, 2).contiguous() for t in (query, key, value))
    return lambda: flash_attn_func(q, k, v, causal=True)


def _flex(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, expiry: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ratio, length = query.shape[1] // key.shape[1], query.shape[2]

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < expiry[b, h // ratio, j])

    def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + scores[b, h // ratio, j]

    blocks = create_block_mask(mask, 1, query.shape[1], length, length, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, score_mod=bias, block_mask=blocks, enable_gqa=True)


_PEERS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Callable[[], Tensor]]] = {
    "flash": _flash,
    "cudnn": _cudnn,
    "fa3": _fa3,
    "flex": _flex,
}


def _ms(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=15, rep=80, return_mode="median"))


def _ms_graph(run: Callable[[], Any]) -> float:
    """For steps as short as a launch: replays of a CUDA graph of 20 of them."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            run()
    return _ms(graph.replay) / 20


def benchmark_gpu(lengths: list[int], windows: list[int]) -> dict[str, Any]:
    """Check, then time, the operator at H = 16, G = 4 and 16, D = 128 and 64, and decoding.

    Args:
        lengths: N to time.
        windows: w to time.

    Returns:
        "environment", "errors" (against float64), "attention" and "decode" rows.

    Raises:
        AssertionError: an output error above 1.5 times flash SDPA's on its own problem, or a gradient off by 1%.
    """
    errors = []
    for kind in ("random", "rising", "falling"):
        for dim, groups in ((128, 4), (128, 16), (64, 4)):
            row = check(dim, 16, groups, 512, kind, torch.bfloat16)
            if not (row["output"] <= 1.5 * row["flash_output"] and max(row.values()) < 1e-2):
                raise AssertionError(f"wrong result, so no time is worth anything: {kind}, D={dim}, G={groups}: {row}")
            errors.append({"scores": kind, "D": dim, "G": groups, **row})
    attention = []
    for dim, groups in ((128, 4), (128, 16), (64, 4)):
        for window in windows:
            for length in lengths:
                if window >= length:
                    continue
                peers: tuple[str, ...] = ("flash", "cudnn", "fa3") if window == windows[-1] else ()
                if length == 32768 and window == windows[-1] and groups == 4:
                    peers += ("flex",)
                attention.append(time_attention(length, dim, 16, groups, window, peers=peers))
    for length in (262144, 1048576):
        attention.append(time_attention(length, 128, 16, 4, windows[-1]))
    for kind in ("rising", "falling"):
        attention.append(time_attention(32768, 128, 16, 4, windows[-1], kind=kind))
    decode = [
        time_decode(context, 2048, batch)
        for batch in (1, 32)
        for context in (2048, 32768, 524288)
        if batch < 32 or context < 524288
    ]
    return {"environment": environment(), "errors": errors, "attention": attention, "decode": decode}


def markdown(results: dict[str, Any]) -> str:
    """The results as tables for people."""
    lines = [", ".join(f"{key} {value}" for key, value in results["environment"].items()), ""]
    lines += [
        "bfloat16, batch 1, random scores unless said; milliseconds (forward and backward with their lists, expiry and "
        "lists by themselves as graphs); TFLOP/s of useful work; mask_share: expiry + lists over forward; memory: peak "
        "above the results, over the inputs' size",
        "",
    ]
    columns = [
        *("N", "D", "G", "w", "scores", "expiry_ms", "lists_ms", "forward_ms", "forward_tflops", "backward_ms"),
        *("backward_tflops", "deterministic_backward_ms", "mask_share", "memory_forward", "memory_backward"),
        *("fa3_forward_ms", "cudnn_forward_ms", "cudnn_backward_ms", "flash_forward_ms"),
        *("flash_backward_ms", "flex_forward_ms"),
    ]
    lines += [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in results["attention"]:
        lines.append(" | ".join(_cell(row.get(column)) for column in columns))
    lines += ["", "Decoding, microseconds of one step's attention:", "", "context | batch | bounded cache | dense SDPA"]
    lines.append("--- | --- | --- | ---")
    for row in results["decode"]:
        cells = (row["context"], row["B"], row["bounded_us"], row.get("dense_us"))
        lines.append(" | ".join(_cell(cell) for cell in cells))
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
