"""Future attention on a GPU: checked against float64, then timed against flash attention's forward pass.

    PYTHONPATH=.:lab python lab/scripts/future_attention_gpu.py                # about 40 s on 16 cores
    PYTHONPATH=.:lab python lab/scripts/future_attention_gpu.py --no-check     # times only

The checks run in several processes, since most of their time is compilation, and warm Triton's cache for the times.
Every row stands by itself: one that fails prints its error, and the rest go on. Exit code 0 only if all checks passed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamask.ops.future_attention import future_attention, future_attention_by_definition
from dynamask.ops.triton import future_attention as kernels
from dynamask.ops.triton.future_attention import Tiles
from dynamask_lab.benchmarks.gpu.compile_ahead import compile_only

SUM_TILES = {
    64: [
        Tiles(128, 64, 4, 3, tma=True, registers=128),
        Tiles(128, 128, 8, 3, tma=True),
        Tiles(128, 64, 4, 3),
        Tiles(128, 64, 8, 3, tma=True),
    ],
    128: [
        Tiles(128, 128, 8, 2, tma=True, registers=128),
        Tiles(128, 64, 4, 2, tma=True),
        Tiles(128, 64, 8, 3, tma=True),
        Tiles(128, 64, 4, 3),
    ],
}
MAX_TILES = {
    64: [
        Tiles(64, 128, 4, 3, tma=True, registers=168),
        Tiles(64, 128, 4, 3, tma=True),
        Tiles(64, 128, 8, 3, tma=True),
        Tiles(128, 64, 4, 3, tma=True, registers=168),
        Tiles(128, 128, 8, 3, tma=True),
        Tiles(64, 128, 4, 3, registers=168),
    ],
    128: [
        Tiles(64, 128, 4, 2, tma=True, registers=168),
        Tiles(64, 128, 4, 3, tma=True),
        Tiles(64, 128, 8, 2, tma=True),
        Tiles(128, 64, 4, 2, tma=True, registers=168),
        Tiles(64, 128, 4, 3, registers=168),
    ],
}
SHAPES = [(length, dim, *heads) for dim in (64, 128) for heads in ((9, 3), (16, 8)) for length in (8192, 32768)]
Case = tuple[str, Callable[[], tuple[float, float]]]


def error_of(
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    length: int = 1234,
    heads: int = 6,
    groups: int = 2,
    packed: bool = False,
    padding: str = "",
    spread: float = 1.0,
    local: int = 0,
    first_query: int = 0,
    **tiles: Tiles,
) -> tuple[float, float]:
    """Largest error of a weight against float64, and what is allowed."""
    generator = torch.Generator("cuda").manual_seed(dim)
    query = (torch.randn(2, heads, length, dim, device="cuda", generator=generator) * spread).to(dtype)
    key = torch.randn(2, groups, length, dim, device="cuda", generator=generator).to(dtype)
    segments = mask = None
    if packed:
        segments = (torch.rand(2, length, device="cuda", generator=generator) < 0.005).long().cumsum(-1)
    position = torch.arange(length, device="cuda").expand(2, length)
    if padding:
        holes = torch.rand(2, length, device="cuda", generator=generator) < 0.9
        mask = {"left": position >= 317, "right": position < length - 317, "holes": holes}[padding]
        query = query.masked_fill(~mask[:, None, :, None], float("nan"))
        key = key.masked_fill(~mask[:, None, :, None], float("nan"))
    expected = future_attention_by_definition(
        query.double(), key.double(), local=local, first_query=first_query, segment_ids=segments, key_mask=mask
    )
    if tiles:
        actual = kernels.future_attention_launch(
            query, key, None, local, first_query, segments, mask, dim**-0.5, **tiles
        )
    else:
        actual = future_attention(
            query, key, local=local, first_query=first_query, segment_ids=segments, key_mask=mask, backend="triton"
        )
    error = (actual.double() - expected).abs()
    # A NaN compares with nothing.
    return (float(error.max()) if bool(error.isfinite().all()) else float("nan")), 2e-5 * max(1.0, spread)


def cases() -> list[Case]:
    """Every check by name, those that take longest to compile first."""
    found: list[Case] = [
        ("d256 float32", lambda: error_of(256, torch.float32)),
        ("d128 float32", lambda: error_of(128, torch.float32)),
        ("d256", lambda: error_of(256)),
        ("d192 packed", lambda: error_of(192, packed=True)),
        ("d64 float32", lambda: error_of(64, torch.float32)),
        ("d64 packed", lambda: error_of(64, packed=True, local=9)),
        ("d64 left padding", lambda: error_of(64, padding="left", first_query=400)),
        ("d64 right padding", lambda: error_of(64, padding="right")),
        ("d64 packed, holes", lambda: error_of(64, packed=True, padding="holes", local=9, first_query=100)),
        ("d128 packed, holes", lambda: error_of(128, packed=True, padding="holes")),
        ("d96", lambda: error_of(96)),
        ("d80", lambda: error_of(80)),
        ("d32", lambda: error_of(32)),
        ("d64 float16", lambda: error_of(64, torch.float16)),
        ("d64", lambda: error_of(64)),
        ("d128", lambda: error_of(128)),
        ("d64 local, first query", lambda: error_of(64, local=130, first_query=517)),
        ("d128 packed", lambda: error_of(128, packed=True)),
        ("d64 one group", lambda: error_of(64, heads=8, groups=1, length=4096)),
        ("d64 large logits", lambda: error_of(64, spread=40.0)),
        ("d64 short", lambda: error_of(64, length=5)),
    ]
    for dim in (64, 128):
        sums, largest = SUM_TILES[dim], MAX_TILES[dim]
        for tiles in sums[1:]:
            found.append((f"d{dim} sum {show(tiles)}", partial(error_of, dim, sum_tiles=tiles, max_tiles=largest[0])))
        for tiles in largest[1:]:
            found.append((f"d{dim} max {show(tiles)}", partial(error_of, dim, sum_tiles=sums[0], max_tiles=tiles)))
    return found


def show(tiles: Tiles) -> str:
    """A configuration in a few characters."""
    copies = "tma" if tiles.tma else "ptr"
    registers = f" r{tiles.registers}" if tiles.registers else ""
    return f"{tiles.queries}x{tiles.keys} w{tiles.warps} s{tiles.stages} {copies}{registers}"


def run_checks(shard: int, shards: int) -> bool:
    """Run every `shards`-th check and print a line for each."""
    passed = True
    for name, check in cases()[shard::shards]:
        began = time.perf_counter()
        try:
            error, allowed = check()
            good = error <= allowed
            result = f"error {error:.1e}{'' if good else f'  WRONG, allowed {allowed:.0e}'}"
        except Exception as problem:
            good, result = False, f"FAILED {type(problem).__name__}: {str(problem)[:300]}"
        passed &= good
        print(f"  {name:<34}{result}  ({time.perf_counter() - began:.1f} s)", flush=True)
    return passed


def check_in_processes(shards: int, seconds: float) -> bool:
    """Run all checks in `shards` processes; what is not done in time counts as failed."""
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = []
    for shard in range(shards):
        command = [sys.executable, str(Path(__file__).resolve()), "--shard", str(shard), "--processes", str(shards)]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
    passed = True
    for process in running:
        try:
            text, _ = process.communicate(timeout=max(1.0, seconds - (time.perf_counter() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
            text = process.communicate()[0] + "  TIMED OUT\n"
        passed &= process.returncode == 0
        lines = [line for line in text.splitlines() if line.startswith("  ")] if process.returncode in (0, 1) else None
        print("\n".join(lines) if lines else text[-1500:], flush=True)
    print(f"checks: {'all passed' if passed else 'NOT ALL PASSED'} in {time.perf_counter() - began:.1f} s", flush=True)
    return passed


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call by events, its inputs not in the L2 cache."""
    flush = torch.empty(128 << 20, dtype=torch.int8, device="cuda")
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(400_000)  # the host launches the whole call meanwhile
        start.record()
        run()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)


def attempt(run: Callable[[], object]) -> tuple[float, str]:
    """Time of a call, or NaN and the error."""
    try:
        return milliseconds(run), ""
    except Exception as problem:
        return float("nan"), f"{type(problem).__name__}: {str(problem)[:120]}"


def flash(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Tensor:
    """Attention's forward pass in torch."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def flash3() -> Callable[..., Tensor] | None:
    """FlashAttention 3's forward pass, None where it is not installed."""
    for name in ("fa3_fwd_interface", "fa3_fwd", "flash_attn_interface"):
        try:
            return __import__(name).flash_attn_func
        except Exception:
            continue
    return None


def time_shape(length: int, dim: int, heads: int, groups: int, variants: bool) -> None:
    """Print a row of times and ratios, and under it every configuration of both kernels, or the first one alone."""
    query = torch.randn(1, heads, length, dim, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, groups, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    notes = []

    def timed(name: str, run: Callable[[], object]) -> float:
        took, error = attempt(run)
        notes.append(f"    {name}: {error or f'{took:.3f}'}")
        return took

    fast = timed("flash", lambda: flash(query, key, value, SDPBackend.FLASH_ATTENTION))
    cudnn = timed("cudnn", lambda: flash(query, key, value, SDPBackend.CUDNN_ATTENTION))
    fa3, third = flash3(), float("nan")
    if fa3 is not None:
        rows = [t.transpose(1, 2).contiguous() for t in (query, key, value)]
        third = timed("fa3", lambda: fa3(*rows, causal=True))
    whole = timed("future attention", lambda: future_attention(query, key, backend="triton"))

    bounds, scale = kernels.Bounds(), dim**-0.5
    lse = kernels.log_sum_exp_launch(query, key, bounds, 0, scale)

    def sum_run(tiles: Tiles) -> Callable[[], object]:
        return lambda: kernels.log_sum_exp_launch(query, key, bounds, 0, scale, tiles)

    def max_run(tiles: Tiles) -> Callable[[], object]:
        return lambda: kernels.largest_launch(query, key, lse, bounds, 0, 0, scale, tiles)

    sums = [timed(f"sum {show(tiles)}", sum_run(tiles)) for tiles in SUM_TILES[dim][: None if variants else 1]]
    largest = [timed(f"max {show(tiles)}", max_run(tiles)) for tiles in MAX_TILES[dim][: None if variants else 1]]
    best = sum(min((t for t in times if t == t), default=float("nan")) for times in (sums, largest))
    ratios = " ".join(f"{whole / peer:5.2f} ({best / peer:.2f})" for peer in (fast, cudnn, third))
    shape = f"{length} {dim} {heads}/{groups}"
    peers = f"{fast:7.3f}{cudnn:7.3f}{third:7.3f}"
    print(f"{shape:<14}{peers} | {whole:7.3f} {sums[0]:7.3f} {largest[0]:7.3f} {best:7.3f} | {ratios}")
    print("\n".join(notes), flush=True)


def time_dim(dim: int, variants: bool = True) -> None:
    """Print the rows of a head width."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, fa3 {'found' if flash3() else 'not installed'}")
    print(
        "N D H/G, ms       flash  cudnn    fa3 |  future     sum     max    best | ratios to flash, cudnn, fa3 (best)"
    )
    for length, width, heads, groups in SHAPES:
        if width != dim:
            continue
        try:
            time_shape(length, dim, heads, groups, variants)
        except Exception as problem:
            print(f"{length} {dim} {heads}/{groups}: FAILED {type(problem).__name__}: {str(problem)[:300]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-check", action="store_true", help="times only")
    parser.add_argument("--no-time", action="store_true", help="checks only")
    parser.add_argument("--processes", type=int, default=14, help="that share the checks")
    parser.add_argument("--seconds", type=float, default=120.0, help="checks that are not done by then have failed")
    parser.add_argument("--shard", type=int, help="run this share of the checks in this process and nothing else")
    parser.add_argument("--dim", type=int, choices=(64, 128), help="time this head width in this process, nothing else")
    parser.add_argument("--no-variants", action="store_true", help="with --dim: the tiles in use alone")
    parser.add_argument("--prepare", action="store_true", help="with --dim: compile, and launch nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 2
    if arguments.shard is not None:
        return int(not run_checks(arguments.shard, arguments.processes))
    if arguments.dim is not None:
        if arguments.prepare:
            globals().update(milliseconds=lambda run: (run(), 1.0)[1])
        with compile_only() if arguments.prepare else nullcontext():
            time_dim(arguments.dim, not arguments.no_variants)
        return 0
    passed = arguments.no_check or check_in_processes(arguments.processes, arguments.seconds)
    if not arguments.no_time:
        began = time.perf_counter()
        for dim in (64, 128):  # a process each: after a faulty memory access a process can time nothing more
            subprocess.run([sys.executable, str(Path(__file__).resolve()), "--dim", str(dim)], timeout=120, check=False)
        print(f"times: {time.perf_counter() - began:.1f} s")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
