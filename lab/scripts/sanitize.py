"""Every kernel family once, on short uneven rows, to be run under compute-sanitizer on a GPU.

    python lab/scripts/sanitize.py                        # compiles everything, outside the sanitizer
    compute-sanitizer --tool memcheck --error-exitcode 3 python lab/scripts/sanitize.py

Every tensor gets an allocation of its own, so that what runs over its end is seen. One line per stage, as it is done:
a run that is cut short says how far it came. Results are compared with the definition, too.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynamask import key_expiry
from dynamask.cache import BoundedLayer
from dynamask.ops.interval.api import attend
from dynamask.ops.interval.reference import interval_attention_reference
from dynamask_lab.benchmarks.gpu.compile_ahead import compile_only
from dynamask_lab.benchmarks.gpu.constants import constants

# Neither a multiple of a tile nor of 16: the last tile of everything is partly filled.
LENGTH = 1001
WINDOW = 200
SINKS = 1


def windows_of(groups: int) -> tuple[int, ...]:
    """From one key to all of them beside each other."""
    return ((WINDOW, LENGTH, 1, 70) * groups)[:groups]


def inputs(dim: int, groups: int, length: int, device: str, heads: int = 8) -> tuple[Tensor, ...]:
    """Query, key, value, scores that want a gradient, and a gradient of the output."""
    query, grad = (torch.randn(1, heads, length, dim, device=device).bfloat16() for _ in range(2))
    key, value = (torch.randn(1, groups, length, dim, device=device).bfloat16() for _ in range(2))
    scores = torch.randn(1, groups, length, device=device)
    return *(t.requires_grad_() for t in (query, key, value, scores)), grad


def forward_and_backward(
    dim: int, groups: int, device: str, backend: str, *, heads: int = 8, only: int | None = None
) -> float:
    """Largest relative error of the output and the gradients.

    Args:
        dim, groups, heads: D, G and H.
        device, backend: where it runs.
        only: so many queries, the last ones.
    """
    query, key, value, scores, grad = inputs(dim, groups, LENGTH, device, heads)
    if only is not None:
        query, grad = (t.detach()[:, :, -only:].contiguous() for t in (query, grad))
        query.requires_grad_()
    windows = windows_of(groups)
    expiry = key_expiry(scores, windows, sinks=SINKS)
    wanted_from = [t.detach().double().requires_grad_() for t in (query, key, value, scores)]
    output = attend(query, key, value, expiry, bias=scores, backend=backend, max_live=windows)
    expected = interval_attention_reference(*wanted_from[:3], expiry, wanted_from[3], dim**-0.5)
    pairs = [(output, expected)]
    got = torch.autograd.grad(output, (query, key, value, scores), grad)
    pairs += zip(got, torch.autograd.grad(expected, wanted_from, grad.double()), strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def packed_and_padded(device: str) -> float:
    """How many expiries differ from those that the tensor operations give on a CPU."""
    scores = torch.randn(2, 3, LENGTH, device=device)
    segments = (torch.arange(LENGTH, device=device) // 333).expand(2, -1).contiguous()
    mask = torch.rand(2, LENGTH, device=device) > 0.1
    facts: list[dict[str, Any]] = [{}, {"segment_ids": segments}, {"key_mask": mask}, {"local": WINDOW // 4}]
    wrong = 0
    for given in facts:
        on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in given.items()}
        wrong += int((key_expiry(scores, WINDOW, **given).cpu() != key_expiry(scores.cpu(), WINDOW, **on_cpu)).sum())
    return float(wrong)


def masks_of_longer_rows(device: str) -> float:
    """How many expiries differ from those of the tensor operations, and lists from the mask, filtered and scanned."""
    from dynamask.ops.triton.lists import build_lists

    length = 9001
    windows = (WINDOW, length, 70)
    scores = torch.randn(1, 3, length)
    mask = torch.rand(1, length) > 0.1
    wrong = 0
    for given in ({}, {"key_mask": mask}):
        expected = key_expiry(scores, windows, **given)
        on_device = {name: value.to(device) for name, value in given.items()}
        for filtered in ((1 << 13, 3), (1 << 30, 1)):
            with constants({"triton.expiry._FILTER": filtered}):
                wrong += int((key_expiry(scores.to(device), windows, **on_device).cpu() != expected).sum())
        if device == "cpu":
            continue
        for scan in (0, 1 << 20):
            with constants({"triton.lists.SCAN": scan}):
                lists = build_lists(expected.to(device), length - 13, 48, windows)
            start = 13 + 48 * torch.arange(lists.blocks)
            stop = (start + 48).clamp(max=length)
            position = torch.arange(length)
            for row in range(3):
                dies = expected[0, row]
                seen = (position < stop[:, None]) & (dies > torch.maximum(position, start[:, None]))
                listed = (lists.whole[row] + lists.partial[row]).cpu()
                wrong += int((listed != seen.sum(1)).sum())
    return float(wrong)


@torch.no_grad()
def decoding(device: str) -> float:
    """Largest relative error of a few steps from a ragged cache, whose kernel replaces keys in place."""
    query, key, value, scores, _ = inputs(64, 2, LENGTH + 3, device)
    windows = (WINDOW, 70)
    layer, worst = BoundedLayer(windows, sinks=SINKS), 0.0
    parts = [slice(0, LENGTH), *(slice(i, i + 1) for i in range(LENGTH, LENGTH + 3))]
    for part in parts:
        one = (query[:, :, part], key[:, :, part], value[:, :, part], scores[:, :, part])
        got = layer.attend(*one, bias_is_rank=True)
        seen = slice(0, part.stop)
        expiry = key_expiry(scores[:, :, seen], windows, sinks=SINKS)
        prefix = (query[:, :, part].double(), key[:, :, seen].double(), value[:, :, seen].double())
        wanted = interval_attention_reference(*prefix, expiry, scores[:, :, seen].double(), 64**-0.5)
        worst = max(worst, ((got.double() - wanted).norm() / wanted.norm()).item())
    return worst


@contextmanager
def walking() -> Any:
    """The Hopper walk for dK and dV, which rows this short would not take."""
    from dynamask.ops.hopper import backward_dkv as backward_hopper
    from dynamask.ops.triton import backward

    chosen = backward._walk_kernel
    backward._walk_kernel = lambda *_: backward_hopper.walk_kernel_launch
    try:
        yield
    finally:
        backward._walk_kernel = chosen


@contextmanager
def deterministic() -> Any:
    """Deterministic algorithms, where there are some."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


Stage = tuple[str, AbstractContextManager[Any], Callable[[], float], float]


def stages(device: str, backend: str) -> Sequence[Stage]:
    """(name, what is switched for it, what it runs, the largest error allowed), the most doubtful first."""
    hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    found: list[Stage] = []
    for dim, heads, groups in ((128, 8, 2), (64, 8, 2), (128, 8, 8), (64, 9, 3)):
        name = f"D = {dim}, H/G = {heads // groups}"
        run = partial(forward_and_backward, dim, groups, device, backend, heads=heads)
        if hopper:
            found.append((f"forward, walk and dQ, {name}", walking(), run, 0.02))
        else:
            found.append((f"forward and backward, {name}", nullcontext(), run, 0.02))
    found.append(("expiry, packed and padded", nullcontext(), partial(packed_and_padded, device), 0.0))
    found.append(("masks of 9001 keys", nullcontext(), partial(masks_of_longer_rows, device), 0.0))
    found.append(("decoding", nullcontext(), partial(decoding, device), 0.02))
    atomics = partial(forward_and_backward, 128, 2, device, backend)
    found.append(("backward by atomics", nullcontext(), atomics, 0.02))
    found.append(("deterministic backward", deterministic(), atomics, 0.02))
    wide = partial(forward_and_backward, 96, 2, device, backend, only=LENGTH // 3)
    found.append(("the last third of the queries, D = 96", nullcontext(), wide, 0.02))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no stage after so many")
    parser.add_argument("--stages", type=int, help="so many, the most doubtful first; default: all")
    parser.add_argument("--only", default="", help="stages whose name holds one of these, between commas")
    parser.add_argument("--prepare", action="store_true", help="compile and launch nothing")
    arguments = parser.parse_args()
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read at the first allocation
    device, backend = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "torch")
    torch.manual_seed(0)
    began, wrong = time.perf_counter(), []
    for name, switched, run, allowed in stages(device, backend)[: arguments.stages]:
        if not any(part in name for part in arguments.only.split(",")):
            continue
        if time.perf_counter() - began > arguments.seconds:
            print(f"not begun: {name}", flush=True)
            continue
        with switched, compile_only() if arguments.prepare else nullcontext():
            error = run()
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{time.perf_counter() - began:6.1f} s  {name}: error {error:.2g}", flush=True)
        if not error <= allowed and not arguments.prepare:
            wrong.append(name)
    if wrong:
        raise SystemExit(f"wrong results: {', '.join(wrong)}")
    print("done", flush=True)


if __name__ == "__main__":
    main()
