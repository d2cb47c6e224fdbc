"""What interval attention is compared with: other kernels, each called as its authors mean it, in its own layout."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamask_lab.benchmarks.gpu.problem import Problem


@dataclass(frozen=True)
class Call:
    """A peer on a problem, ready to be timed.

    Attributes:
        forward: gives the output.
        inputs: tensors in the peer's own layout that its backward pass gives gradients to; none: it has no backward.
        grad: gradient of the output, in the peer's layout.
        output: brings the output to (1, H, N, D).
    """

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    grad: Tensor
    output: Callable[[Tensor], Tensor] = lambda output: output


@dataclass(frozen=True)
class Peer:
    """A kernel to compare with.

    Attributes:
        label: its name in tables and pictures.
        mask: "dense" (causal, every key), "same" (our mask and bias) or "own" (a sparsity of its own).
        prepare: puts a problem into its layout; what it does is not timed.
        package: distribution whose version is recorded.
        note: what a reader of the figures must know.
    """

    label: str
    mask: str
    prepare: Callable[[Problem], Call]
    package: str | None = None
    note: str = ""


def versions() -> dict[str, list[str]]:
    """Versions found of every peer's distribution; two of one where two folders of the path hold one each."""
    wanted = {peer.package for peer in PEERS.values() if peer.package}
    return {name: sorted({d.version for d in _distributions(name)}) for name in sorted(wanted)}


def _distributions(name: str) -> Iterable[importlib.metadata.Distribution]:
    return importlib.metadata.distributions(name=name)


def _sdpa(backend: SDPBackend) -> Callable[[Problem], Call]:
    def prepare(problem: Problem) -> Call:
        query, key, value = (t.detach().requires_grad_() for t in problem.inputs[:3])

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        return Call(forward, (query, key, value), problem.grad)

    return prepare


def _by_position(problem: Problem) -> tuple[list[Tensor], Tensor]:
    """Query, key and value as (1, N, heads, D), and the output's gradient."""
    inputs = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in problem.inputs[:3]]
    return inputs, problem.grad.transpose(1, 2).contiguous()


def _by_head(output: Tensor) -> Tensor:
    return output.transpose(1, 2)


def _fa3(problem: Problem) -> Call:
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        from fa3_fwd import flash_attn_func  # type: ignore[no-redef]
    (query, key, value), grad = _by_position(problem)
    query, key, value = (t.detach() for t in (query, key, value))
    return Call(lambda: flash_attn_func(query, key, value, causal=True), (), grad, _by_head)


def _flex(problem: Problem) -> Call:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config.donated_buffer = False  # or its backward pass could not be timed more than once
    query, key, value, scores = (t.detach().requires_grad_() for t in problem.inputs)
    expiry = problem.expiry
    ratio, length = query.shape[1] // key.shape[1], query.shape[2]

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < expiry[b, h // ratio, j])

    # The scores' gradient is left out: FlexAttention sums captured gradients by one atomic per pair of the mask.
    bias = scores.detach()

    def add_score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[b, h // ratio, j]

    blocks = create_block_mask(mask, 1, query.shape[1], length, length, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        return compiled(query, key, value, score_mod=add_score, block_mask=blocks, enable_gqa=True)

    return Call(forward, (query, key, value), problem.grad)


def _nsa(problem: Problem) -> Call:
    from fla.ops.nsa import compression, parallel, parallel_nsa

    # Its autotuners would compile 120 kernels. What is left out: one warp, other depths of pipeline.
    for kernel, keep in (
        (parallel.parallel_nsa_kernel_topk, lambda config: config.num_warps > 1),
        (parallel.parallel_nsa_fwd_kernel, lambda config: config.num_stages == 2),
        (parallel.parallel_nsa_bwd_kernel_dq, lambda config: config.num_stages == 2),
        (parallel.parallel_nsa_bwd_kernel_dkv, lambda config: config.num_stages == 1 and config.num_warps == 4),
        (compression.parallel_nsa_compression_bwd_kernel_dq, lambda config: config.num_warps > 1),
        (compression.parallel_nsa_compression_bwd_kernel_dkv, lambda config: config.num_warps == 4),
    ):
        _keep_configs(kernel, keep)
    (query, key, value), grad = _by_position(problem)
    shape = problem.shape
    compressed, selected = (
        torch.rand(1, shape.length, shape.heads, device="cuda", dtype=query.dtype).requires_grad_() for _ in range(2)
    )
    block = 64

    def forward() -> Tensor:
        return parallel_nsa(
            query, key, value, compressed, selected, block_size=block, block_counts=shape.window // block
        )

    return Call(forward, (query, key, value, compressed, selected), grad, _by_head)


def _fsa1(problem: Problem) -> Call:
    kernels = _old_flash_sparse_attn()
    # One program per head, one after the other over the keys, is never the faster at these lengths.
    _keep_configs(kernels._bwd_kernel, lambda config: config.kwargs["SEQUENCE_PARALLEL"])
    (query, key, value), grad = _by_position(problem)
    mask = wide_mask(problem.expiry)
    bias = problem.scores.detach().to(query.dtype).unsqueeze(2).requires_grad_()

    def forward() -> Tensor:
        return kernels.triton_sparse_attn_func(query, key, value, mask, bias, True)

    return Call(forward, (query, key, value, bias), grad, _by_head)


def wide_mask(expiry: Tensor) -> Tensor:
    """The whole mask of an expiry, for kernels that read one.

    Heads lie far enough apart that their stride needs 64 bits: kernels that multiply a head's number by a 32-bit
    stride would run over at N = 32K, and read elsewhere.

    Args:
        expiry: (1, G, N) int32.

    Returns:
        (1, G, N, N) bool.

    Raises:
        ValueError: it would not fit into the memory that is free.
    """
    _, groups, length = expiry.shape
    stride = max(length * length, 2**31) if groups * length * length >= 2**31 else length * length
    size = (groups - 1) * stride + length * length
    if expiry.is_cuda and size > 0.8 * torch.cuda.mem_get_info()[0]:
        raise ValueError(f"its mask of {groups} x {length} x {length} bytes takes {size / 2**30:.0f} GiB of memory")
    mask = torch.zeros(size, dtype=torch.bool, device=expiry.device)
    mask = mask.as_strided((1, groups, length, length), (groups * stride, stride, length, 1))
    position = torch.arange(length, device=expiry.device)
    for start in range(0, length, 2048):
        query = position[start : start + 2048, None]
        mask[:, :, start : start + 2048] = (position <= query) & (query < expiry[:, :, None, :])
    return mask


def _old_flash_sparse_attn() -> ModuleType:
    """The Triton module of flash-sparse-attn 1.x, also where 2.x stands before it on the path.

    It needs nothing else of its package, whose CUDA extension no wheel brings along.
    """
    for found in _distributions("flash-sparse-attn"):
        if found.version.startswith("1."):
            path = found.locate_file("flash_sparse_attn/flash_sparse_attn_triton.py")
            spec = importlib.util.spec_from_file_location("flash_sparse_attn_1", str(path))
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = module
                spec.loader.exec_module(module)
                return module
    raise ImportError("flash-sparse-attn 1.x is not installed: put a folder that holds it on PYTHONPATH")


def _fsa2(problem: Problem) -> Call:
    attention = _new_flash_sparse_attn().flash_sparse_attn_func
    (query, key, value), grad = _by_position(problem)
    return Call(lambda: attention(query, key, value, is_causal=True), (query, key, value), grad, _by_head)


def _fsa2_gated(problem: Problem) -> Call:
    attention = _new_flash_sparse_attn().flash_gated_attn_func
    (query, key, value), grad = _by_position(problem)
    alpha = torch.ones(1, problem.shape.length, problem.shape.heads, device="cuda", dtype=query.dtype)
    delta = problem.scores.detach().to(query.dtype).transpose(1, 2).contiguous()
    alpha, delta = alpha.requires_grad_(), delta.requires_grad_()

    def forward() -> Tensor:
        return attention(query, key, value, alpha, delta, is_causal=True)

    return Call(forward, (query, key, value, alpha, delta), grad, _by_head)


# Of the 54 configurations of its autotuner, which would take minutes to compile.
_FSA2_FORWARD = {(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3)}
_FSA2_BACKWARD = {(64, 64, 4, 2), (64, 128, 8, 1), (64, 128, 8, 2), (128, 128, 8, 1)}


def _new_flash_sparse_attn() -> ModuleType:
    """flash-sparse-attn 2.x, its autotuner held to a few configurations."""
    if "triton_kernels" not in sys.modules and importlib.util.find_spec("triton_kernels") is None:
        _stand_in_for_triton_kernels()
    import flash_sparse_attn
    from flash_sparse_attn.ops.triton import autotuner, launch_template

    for kind in ("sparse", "gated"):
        for direction, kept in (("fwd", _FSA2_FORWARD), ("bwd", _FSA2_BACKWARD)):
            _hold_to(autotuner, f"get_{direction}_{kind}_autotune_configs", kept)
    # It would keep its choice on the disk, made while other work shares the GPU (`apart.py`).
    launch_template.store_launch_config = lambda *args, **kwargs: None
    return flash_sparse_attn


def _hold_to(autotuner: Any, name: str, kept: set[tuple[int, int, int, int]]) -> None:
    every = getattr(autotuner, name)

    def few(*args: Any, **kwargs: Any) -> list[Any]:
        def key(config: Any) -> tuple[int, int, int, int]:
            return config.kwargs["TILE_M"], config.kwargs["TILE_N"], config.num_warps, config.num_stages

        return [config for config in every(*args, **kwargs) if key(config) in kept]

    if getattr(every, "__name__", "") != "few":
        setattr(autotuner, name, few)


def _stand_in_for_triton_kernels() -> None:
    """Empty modules of that name: its projections import them, which attention never calls, and no wheel has them."""
    for name, attributes in (
        ("triton_kernels", ()),
        ("triton_kernels.matmul_ogs", ("matmul_ogs", "PrecisionConfig", "FlexCtx")),
        ("triton_kernels.numerics", ("InFlexData", "OutFlexData")),
    ):
        module = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, None)
        sys.modules[name] = module


def _keep_configs(kernel: Any, keep: Callable[[Any], bool]) -> None:
    """Hold a Triton autotuner, wherever it stands among a kernel's decorators, to some of its configurations."""
    while kernel is not None and not hasattr(kernel, "configs"):
        kernel = getattr(kernel, "fn", None)
    if kernel is not None:
        kernel.configs = [config for config in kernel.configs if keep(config)] or kernel.configs


PEERS: dict[str, Peer] = {
    "fa3": Peer("FlashAttention-3", "dense", _fa3, "fa3-fwd", "its wheel has no backward"),
    "cudnn": Peer("SDPA, cuDNN", "dense", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    "flash": Peer("SDPA, flash", "dense", _sdpa(SDPBackend.FLASH_ATTENTION)),
    "flex": Peer("FlexAttention", "same", _flex, note="no gradient to the scores"),
    "fsa1": Peer(
        "flash-sparse-attn 1.2.4",
        "same",
        _fsa1,
        "flash-sparse-attn",
        "its Triton kernel; the mask is materialised, (G, N, N), before the time is taken; scores in bfloat16",
    ),
    "nsa": Peer(
        "fla NSA",
        "own",
        _nsa,
        "fla-core",
        "blocks of 64, w / 64 of them selected, and all compressed blocks; without its sliding branch, which needs "
        "flash-attn; autotuned over part of its configurations",
    ),
    "fsa2": Peer(
        "flash-sparse-attn 2.0.6",
        "own",
        _fsa2,
        "flash-sparse-attn",
        "takes no mask and no bias: causal, skips tiles below its own default threshold, of which random data has "
        "none; autotuned over 4 of its 54 configurations; triton_kernels, which its projections need, left out",
    ),
    "fsa2_gated": Peer(
        "flash-sparse-attn 2.0.6, gated",
        "own",
        _fsa2_gated,
        "flash-sparse-attn",
        "takes no mask: gate logits log-sigmoid(score), whole tiles skipped; autotuned over 4 of its 54 configurations",
    ),
}
DENSE = tuple(name for name, peer in PEERS.items() if peer.mask == "dense")
