"""Times of the attention kernels on one GPU: windows per head, narrow windows, against sliding-window kernels.

    PYTHONPATH=.:lab python lab/scripts/kernel_times.py --out times.json
    PYTHONPATH=.:lab python lab/scripts/kernel_times.py --only "narrow" --no-peers
    PYTHONPATH=.:lab python lab/scripts/kernel_times.py --table --seconds 120 --out table.json
    PYTHONPATH=.:lab python lab/scripts/kernel_times.py --table --prepare 3/24

Every figure is the device time of a CUDA graph's replays, but of what the name calls a call, which events around
single calls time. Rows are written as they come. With --table every row of issue 16's attention kernels is timed, what
decides most first; with --prepare K/N every N-th of them is compiled, from the K-th on (K from 0), and none launched.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamask import key_expiry
from dynamask.ops import attend
from dynamask.ops import triton as kernels
from dynamask.ops.triton.lists import KeyLists
from dynamask_lab.benchmarks.gpu.compile_ahead import compile_only
from dynamask_lab.benchmarks.gpu.constants import constants, set_constant
from dynamask_lab.benchmarks.gpu.timing import graph_milliseconds, kernel_microseconds, milliseconds


@dataclass(frozen=True)
class Case:
    """One shape and mask.

    Attributes:
        name: of the row.
        windows: keys that a query sees, for each key/value head.
        kind: "random" scores, or "sliding" windows.
        sinks: first keys that never expire.
        local: newest keys that are always kept (random scores alone).
    """

    name: str
    windows: tuple[int, ...]
    kind: str = "random"
    sinks: int = 0
    local: int = 0
    length: int = 32768
    heads: int = 16
    dim: int = 128
    bias: bool = False

    @property
    def peer_window(self) -> int | None:
        """Window of the sliding-window kernels that compare, where all heads have one."""
        return self.windows[0] if len(set(self.windows)) == 1 else None


CASES = [
    Case("equal 512", (512,) * 4),
    Case("equal 1024", (1024,) * 4),
    Case("heads 136/136/400/3424", (136, 136, 400, 3424)),
    Case("narrow sliding 136", (136,) * 4, "sliding", 4),
    Case("narrow sliding 136 d64", (136,) * 3, "sliding", 4, heads=9, dim=64),
    Case("narrow sliding 136 g16", (136,) * 16, "sliding", 4),
    Case("equal 1024 d64", (1024,) * 3, heads=9, dim=64),
    Case("heads 150/200/2722 d64", (150, 200, 2722), heads=9, dim=64),
    Case("narrow sliding 300", (300,) * 4, "sliding", 4),
    Case("narrow local 136", (136,) * 4, "random", 4, 128),
    Case("narrow local 300", (300,) * 4, "random", 4, 128),
    Case("equal 2048", (2048,) * 4),
    Case("narrow sliding 64", (64,) * 4, "sliding", 4),
    Case("equal 512 g16", (512,) * 16),
    Case("equal 2048 g16", (2048,) * 16),
    Case("equal 2048 bias", (2048,) * 4, bias=True),
    Case("narrow random 136", (136,) * 4),
]

BREAK_EVEN = [Case(f"break-even {w} at {n}w", (w,) * 4, length=n * w) for n in (3, 4) for w in (1024, 2048)]
MASKS = [
    Case(f"mask g{g} w {w} N {n}", (w,) * g, length=n)
    for n in (8192, 32768, 131072, 1 << 20)
    for g in (4, 16)
    for w in (512, 1024, 2048)
]
SHORT = [Case(f"short {n} w {w}", (w,) * 4, length=n) for n, w in ((8192, 512), (8192, 2048))]
LONG = [Case(f"long {n} w 2048", (2048,) * 4, length=n) for n in (32768, 131072)]
TABLE = [("times", CASES[:8]), ("dense", BREAK_EVEN[:2] + LONG + SHORT), ("times", CASES[8:12]), ("mask", MASKS)]
TABLE += [("times", CASES[12:]), ("dense", BREAK_EVEN[2:])]
PROFILED = ("narrow sliding 136 d64", "narrow sliding 136 g16", "break-even 1024 at 3w", "equal 1024")
"""Cases whose kernels the profiler times one by one, too."""

_THIRDS = ("narrow sliding 136 d64", "equal 1024 d64")
_WALKS = ("break-even 1024 at 3w", "equal 1024", "narrow sliding 136 d64")
_SMALL_RUNS = ((1 << 15, 256), (1 << 17, 512), (1 << 20, 1024), (1 << 62, 2048))
_LISTS = ("mask g4 w 512 N 8192", "mask g4 w 512 N 32768", "mask g16 w 512 N 32768", "mask g4 w 1024 N 32768")
_LONG_LISTS = ("mask g4 w 512 N 131072", "mask g16 w 512 N 131072", "mask g16 w 512 N 1048576")
VARIANTS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("4 warps", {"hopper.walk_tiles.FILL_WARPS": 4}, _WALKS),
    ("dQ of all heads", {"hopper.backward_dq.APART": 0}, _THIRDS),
    ("entries 512", {"triton.lists._STEP": 512}, (*_LONG_LISTS, "equal 1024", "narrow sliding 136 d64")),
    ("runs of 256, 1 warp", {"triton.lists._RUNS": _SMALL_RUNS, "triton.lists._DIRECT_WARPS": 1}, _LISTS),
    ("1 warp", {"triton.lists._DIRECT_WARPS": 1}, _LISTS),
    ("runs of 256", {"triton.lists._RUNS": _SMALL_RUNS}, _LISTS),
    ("large blocks of 1024", {"triton.lists.NARROW": 0}, ("narrow sliding 136 d64", "narrow local 136")),
    ("entries 256", {"triton.lists._STEP": 256}, _LONG_LISTS),
    ("8 warps", {"hopper.walk_tiles.FILL_WARPS": 8}, _WALKS),
    ("steps of 128, 1 warp", {"triton.lists._DIRECT_STEP": 128, "triton.lists._DIRECT_WARPS": 1}, _LISTS),
    ("entries 512, large 512", {"triton.lists._STEP": 512, "triton.lists._LARGE": ((1 << 62, 512),)}, _LONG_LISTS),
    ("large blocks of 1024", {"triton.lists.NARROW": 0}, ("narrow random 136", "narrow sliding 136 g16")),
)
"""Name, constants and cases of what --variants times, without peers."""

FLEX = ("narrow sliding 136",)
"""Cases in which FlexAttention, which takes long to compile, is timed too."""


def expiry_of(case: Case, scores: Tensor) -> Tensor:
    """The mask, a head at a time."""
    length = case.length
    if case.kind == "sliding":
        position = torch.arange(length, device=scores.device, dtype=torch.int32)
        heads = [(position + window).clamp(max=length)[None, None] for window in case.windows]
    else:
        heads = [
            key_expiry(scores[:, g : g + 1], min(window, length), local=min(case.local, window))
            for g, window in enumerate(case.windows)
        ]
    expiry = torch.cat(heads, 1).contiguous()
    expiry[:, :, : case.sinks] = length
    return expiry


def flops(case: Case, expiry: Tensor) -> float:
    """Useful work of the forward pass."""
    position = torch.arange(case.length, device=expiry.device)
    pairs = (expiry - position).clamp(min=0).sum(dtype=torch.float64).item()
    return pairs * 4 * case.dim * (case.heads / len(case.windows))


def our_parts(inputs: tuple[Tensor, ...], expiry: Tensor, limits: Any, scale: float) -> Iterator[tuple[str, Callable]]:
    """The launches of a forward and a backward pass one by one."""
    from dynamask.ops.hopper import backward_dkv, backward_dq, forward
    from dynamask.ops.triton.backward import prepare
    from dynamask.ops.triton.inputs import AttentionInputs
    from dynamask.ops.triton.lists import build_lists_and_spans

    query, key, value, bias, grad = inputs
    ratio = query.shape[1] // key.shape[1]
    all_inputs = AttentionInputs.of(query, key, value, expiry, bias, scale)
    lists = kernels.forward_lists(query, value, expiry, limits)
    yield "lists", lambda: kernels.forward_lists(query, value, expiry, limits)
    yield "forward kernel", lambda: forward.forward_kernel_launch(all_inputs, lists)
    output, *parts = forward.forward_kernel_launch(all_inputs, lists)
    sums = prepare(grad, output, *parts, parted=bias is not None)
    yield "prepare", lambda: prepare(grad, output, *parts, parted=bias is not None)
    dq_lists, spans = build_lists_and_spans(
        expiry, query.shape[2], backward_dq.block_of(ratio, all_inputs.widest), limits
    )
    yield (
        "dq kernel",
        lambda: backward_dq.query_kernel_launch(all_inputs, grad, sums, tuple(parts), dq_lists),
    )
    yield (
        "walk",
        lambda: backward_dkv.walk_kernel_launch(all_inputs, grad, sums, spans),
    )


def peers(
    case: Case, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, flex: bool
) -> Iterator[tuple[str, Callable, Any]]:
    """Sliding-window kernels: name, forward, and what a backward pass needs or None."""
    window = case.peer_window
    if window is None:
        return
    q, k, v, g = (t.detach().transpose(1, 2).contiguous() for t in (query, key, value, grad))
    ratio = query.shape[1] // key.shape[1]
    wide_k, wide_v = k.repeat_interleave(ratio, 2), v.repeat_interleave(ratio, 2)

    def flash2() -> tuple[Tensor, ...]:
        return torch.ops.aten._flash_attention_forward(
            q, wide_k, wide_v, None, None, case.length, case.length, 0.0, True, False,
            window_size_left=window - 1, window_size_right=0,
        )  # fmt: skip

    def flash2_backward() -> Any:
        out, lse, rng, unused, _ = flash2()

        def backward() -> tuple[Tensor, ...]:
            return torch.ops.aten._flash_attention_backward(
                g, q, wide_k, wide_v, out, lse, None, None, case.length, case.length, 0.0, True, rng, unused,
                window_size_left=window - 1, window_size_right=0,
            )  # fmt: skip

        return backward

    yield "fa2 (keys repeated)", flash2, flash2_backward

    try:
        yield "cudnn", *cudnn_pass(query.detach(), key.detach(), value.detach(), grad, window)
    except Exception as error:
        print("no cudnn:", f"{type(error).__name__}: {error}"[:300], flush=True)

    if not flex:
        return
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config.donated_buffer = False
    blocks = create_block_mask(
        lambda b, h, i, j: (j <= i) & ((i - j < window) | (j < case.sinks)), None, None, case.length, case.length,
        device="cuda", _compile=True,
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]

    def flex_forward() -> Tensor:
        return compiled(*leaves, block_mask=blocks, enable_gqa=True)

    def flex_backward() -> Any:
        output = flex_forward()
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)

    yield "flex", flex_forward, flex_backward


def cudnn_pass(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, window: int
) -> tuple[Callable[[], Any], Callable[[], Callable[[], Any]]]:
    """cuDNN's sliding window: the forward pass, and what prepares the backward pass."""
    import cudnn

    handle = cudnn.create_handle()
    types = cudnn.data_type
    output, d_query, d_key, d_value = (torch.empty_like(t) for t in (query, query, key, value))
    stats = torch.empty(*query.shape[:3], 1, dtype=torch.float32, device=query.device)
    band = {
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_left_bound": window,
        "diagonal_band_right_bound": 0,
        "attn_scale": query.shape[-1] ** -0.5,
    }

    def graph() -> Any:
        return cudnn.pygraph(
            io_data_type=types.BFLOAT16, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT,
            handle=handle,
        )  # fmt: skip

    def built(made: Any, tensors: dict[Any, Tensor], results: dict[Any, Tensor]) -> Callable[[], Any]:
        for symbol, tensor in results.items():
            symbol.set_output(True).set_dim(list(tensor.shape)).set_stride(list(tensor.stride()))
            symbol.set_data_type(types.FLOAT if tensor.dtype == torch.float32 else types.BFLOAT16)
        made.validate()
        made.build_operation_graph()
        made.create_execution_plans([cudnn.heur_mode.A])
        made.check_support()
        made.build_plans()
        room = torch.empty(max(1, made.get_workspace_size()), dtype=torch.uint8, device=query.device)

        def run() -> None:
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            made.execute({**tensors, **results}, room, handle=handle)

        return run

    forward = graph()
    q, k, v = (forward.tensor_like(t) for t in (query, key, value))
    o, s = forward.sdpa(name="forward", q=q, k=k, v=v, generate_stats=True, **band)
    run_forward = built(forward, {q: query, k: key, v: value}, {o: output, s: stats})

    def prepare_backward() -> Callable[[], Any]:
        run_forward()
        backward = graph()
        q, k, v, o, do, s = (backward.tensor_like(t) for t in (query, key, value, output, grad, stats))
        dq, dk, dv = backward.sdpa_backward(name="backward", q=q, k=k, v=v, o=o, dO=do, stats=s, **band)
        given = {q: query, k: key, v: value, o: output, do: grad, s: stats}
        return built(backward, given, {dq: d_query, dk: d_key, dv: d_value})

    return run_forward, prepare_backward


def measure(case: Case, with_peers: bool, with_flex: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    groups, length = len(case.windows), case.length
    row: dict[str, Any] = {"name": case.name, "windows": case.windows, "N": length, "H": case.heads, "D": case.dim}
    query, grad = (torch.randn(1, case.heads, length, case.dim, device="cuda").bfloat16() for _ in range(2))
    key, value = (torch.randn(1, groups, length, case.dim, device="cuda").bfloat16() for _ in range(2))
    scores = torch.randn(1, groups, length, device="cuda")
    bias = scores if case.bias else None
    expiry = expiry_of(case, scores)
    limits = tuple(window + case.sinks for window in case.windows)
    work = flops(case, expiry)
    if case.kind == "random":
        row["expiry"] = graph_milliseconds(lambda: key_expiry(scores, min(case.windows[-1], length), local=case.local))
    with torch.no_grad():

        def call() -> Tensor:
            return attend(query, key, value, expiry, bias=bias, backend="triton", max_live=limits)

        row["forward"], row["forward, a call"] = graph_milliseconds(call), milliseconds(call)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    output = attend(*leaves, expiry, bias=bias, backend="triton", max_live=limits)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, grad, retain_graph=True)

    row["backward, a call"] = milliseconds(backward)
    with torch.no_grad():
        for name, run in our_parts((query, key, value, bias, grad), expiry, limits, case.dim**-0.5):
            row[name] = graph_milliseconds(run)
    row["backward"] = row["prepare"] + row["dq kernel"] + row["walk"] + row["lists"]
    row["forward TFLOP/s"] = work / row["forward"] / 1e9
    row["backward TFLOP/s"] = 2.5 * work / row["backward, a call"] / 1e9
    if with_peers:
        for name, forward, prepare_backward in peers(case, query, key, value, grad, with_flex):
            try:
                with torch.no_grad():
                    row[name] = graph_milliseconds(forward)
                    row[f"{name}, a call"] = milliseconds(forward)
                if prepare_backward is not None:
                    row[f"{name} backward"] = milliseconds(prepare_backward())
            except Exception as error:
                row[name] = f"{type(error).__name__}: {error}"[:200]
    if case.name in PROFILED:
        with torch.no_grad():
            row["forward, kernels"] = kernel_microseconds(call)
        row["backward, kernels"] = kernel_microseconds(backward)
    return row


def mask_share(case: Case, values: dict[str, Any]) -> dict[str, Any]:
    """Expiry and lists beside the forward kernel; lists by other constants are compared with the usual ones."""
    torch.manual_seed(0)
    groups = len(case.windows)
    query = torch.empty(1, case.heads, case.length, case.dim, device="cuda", dtype=torch.bfloat16)
    key, value = (query.new_empty(1, groups, case.length, case.dim) for _ in range(2))
    for tensor in (query, key, value):
        tensor.normal_()
    scores = torch.randn(1, groups, case.length, device="cuda")
    expiry = key_expiry(scores, case.windows)

    def call() -> Tensor:
        return attend(query, key, value, expiry, backend="triton", max_live=case.windows)

    row: dict[str, Any] = {"name": case.name}
    usual = kernels.forward_lists(query, value, expiry, case.windows)
    with torch.no_grad(), constants(values):
        if values:
            row["same lists"] = same_lists(kernels.forward_lists(query, value, expiry, case.windows), usual)
        row["expiry"] = graph_milliseconds(lambda: key_expiry(scores, case.windows))
        row["lists"] = graph_milliseconds(lambda: kernels.forward_lists(query, value, expiry, case.windows))
        row["forward"] = graph_milliseconds(call, steps_of(case))
    row["share"] = (row["expiry"] + row["lists"]) / (row["forward"] + row["expiry"])
    return row


def same_lists(first: KeyLists, second: KeyLists) -> bool:
    """Whether two lists of a batch of one hold the same keys; a key that dies as a block ends may be of either kind."""
    good, begin = True, 0
    for group, size in enumerate(first.capacities):
        end = begin + first.blocks * size
        place = torch.arange(size, device=first.index.device)
        kept = []
        for lists in (first, second):
            keys = lists.index[begin:end].view(-1, size)
            front, back = place < lists.whole[group, :, None], place >= size - lists.partial[group, :, None]
            kept.append(torch.where(front | back, keys, -1).sort(-1).values)
        good = good and torch.equal(*kept)
        begin = end
    return good


def steps_of(case: Case) -> int:
    """Calls of a graph: as many as take some 20 ms, and at most 20."""
    pairs = case.length * case.windows[0] * case.heads
    return max(1, min(20, (20 << 31) // pairs))


def compile_mask(case: Case) -> None:
    """What `mask_share` launches, without the tensors of a long row."""
    groups = len(case.windows)
    scores = torch.empty(1, groups, case.length, device="cuda")
    expiry = key_expiry(scores, case.windows)
    narrow = torch.empty(1, device="cuda", dtype=torch.bfloat16)
    query, value = (narrow.expand(1, heads, case.length, case.dim) for heads in (case.heads, groups))
    kernels.forward_lists(query, value, expiry, case.windows)
    if case.length <= 32768:
        query, value = query.contiguous(), value.contiguous()
        attend(query, value, value, expiry, backend="triton", max_live=case.windows)


def dense_times(case: Case) -> dict[str, float]:
    """Dense causal attention on the same shape by torch's fastest backends and FlashAttention 3: forward, backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    groups = len(case.windows)
    shape = (1, case.heads, case.length, case.dim)
    query, grad = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    key, value = (torch.randn(1, groups, *shape[2:], device="cuda").bfloat16() for _ in range(2))
    ratio = case.heads // groups
    leaves = [t.detach().requires_grad_() for t in (query, *(t.repeat_interleave(ratio, 1) for t in (key, value)))]
    times: dict[str, float] = {}
    for name, backend in (("dense cudnn", SDPBackend.CUDNN_ATTENTION), ("dense flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            with torch.no_grad():
                times[name] = milliseconds(
                    lambda: torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
                )
            output = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
            times[f"{name} backward"] = milliseconds(
                lambda out=output: torch.autograd.grad(out, leaves, grad, retain_graph=True)
            )
    try:
        from fa3_fwd_interface import flash_attn_func
    except Exception as error:  # its wheel has no backward pass
        print(f"no FlashAttention 3: {type(error).__name__}: {error}"[:300], flush=True)
        return times
    q, k, v = (t.transpose(1, 2).contiguous() for t in (query, key, value))
    with torch.no_grad():
        times["dense fa3"] = milliseconds(lambda: flash_attn_func(q, k, v, causal=True))
    return times


def _once(run: Callable[[], Any], _steps: int = 1) -> float:
    run()
    return 1.0


def time_case(
    kind: str, case: Case, values: dict[str, Any], arguments: argparse.Namespace, flex: tuple[str, ...]
) -> dict[str, Any]:
    """A row of kind "times", "dense" or "mask" with other constants."""
    if kind == "mask" and not arguments.prepare:
        return mask_share(case, values)
    with constants(values):
        if kind == "mask":
            compile_mask(case)
            return {"name": case.name}
        with_peers = not arguments.no_peers and not values and case.name.startswith("narrow")
        row = measure(case, with_peers, case.name in flex)
        return row | dense_times(case) if kind == "dense" and not arguments.prepare else row


def settings(given: list[str]) -> Iterator[tuple[str, Any]]:
    """`module.NAME=value` -> name, value."""
    for setting in given:
        name, _, value = setting.partition("=")
        yield name, ast.literal_eval(value)


def line(row: dict[str, Any]) -> str:
    """A row of at most 400 characters."""
    short = {"forward": "fwd", "backward": "bwd", "a call": "call", "kernel": "k"}
    parts = []
    for name, value in row.items():
        if name in ("windows", "N", "H", "D") or isinstance(value, dict):
            continue
        for long, brief in short.items():
            name = name.replace(long, brief)
        parts.append(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"[:90])
    return " | ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds one of these, between commas")
    parser.add_argument("--commit", help="of the code, where there is no repository")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--mask", action="store_true", help="time expiry and lists beside the forward pass instead")
    parser.add_argument("--table", action="store_true", help="every row, what decides most first")
    parser.add_argument(
        "--variants", action="store_true", help="other constants of some rows instead, or with --table after it"
    )
    parser.add_argument("--prepare", metavar="K/N", help="compile every N-th row, from the K-th on, and launch none")
    parser.add_argument("--dense", action="store_true", help="time short rows beside dense attention instead")
    parser.add_argument("--set", nargs="*", default=[], metavar="MODULE.NAME=VALUE", help="of dynamask.ops, a literal")
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no case after this long")
    arguments = parser.parse_args()
    began = time.perf_counter()
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    commit = arguments.commit or found
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit, "set": arguments.set}
    flex = () if arguments.no_flex else FLEX
    rows = []
    for name, value in settings(arguments.set):
        set_constant(name, value)
    only = arguments.only.split(",")
    chosen = [("mask", MASKS)] if arguments.mask else [("times", CASES)]
    if arguments.dense:
        chosen = [("dense", [*BREAK_EVEN, *SHORT, *LONG])]
    todo: list[tuple[str, Case, str, dict[str, Any]]] = [
        (kind, case, case.name, {}) for kind, cases in (TABLE if arguments.table else chosen) for case in cases
    ]
    if arguments.variants:
        known = {case.name: case for case in (*CASES, *BREAK_EVEN, *MASKS)}
        todo = todo if arguments.table else []
        todo += [
            ("mask" if name.startswith("mask") else "times", known[name], f"{name}, {variant}", values)
            for variant, values, names in VARIANTS
            for name in names
        ]
    if arguments.prepare:
        globals().update(milliseconds=_once, graph_milliseconds=_once, kernel_microseconds=_once)
        arguments.no_peers = True
        part, parts = (int(number) for number in arguments.prepare.split("/"))
        todo = [row for row in todo if row[3] or any(part in row[1].name for part in only)][part::parts]
    with compile_only() if arguments.prepare else nullcontext():
        for kind, case, name, values in todo:
            chosen_row = values or any(part in case.name for part in only)
            if not chosen_row or time.perf_counter() - began > arguments.seconds:
                continue
            try:
                row = time_case(kind, case, values, arguments, flex) | {"name": name}
            except Exception as error:
                row = {"name": name, "error": f"{type(error).__name__}: {error}"[:500]}
            rows.append(row)
            print(f"{time.perf_counter() - began:.1f} s | {line(row)}", flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps({**facts, "rows": rows}, indent=1))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
