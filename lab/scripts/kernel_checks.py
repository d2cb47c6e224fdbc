"""Check the attention kernels of a Hopper GPU against float64, and that they repeat themselves bit for bit.

    PYTHONPATH=.:lab python lab/scripts/kernel_checks.py --runs 100

Windows from 1 to N beside each other in one call, sinks, with and without a bias, D = 64 and 128, both backward passes.
Memory that a kernel allocates holds NaN before, so that a number it does not write is seen. One line per check; exit
code 1 if any is wrong.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dynamask import key_expiry
from dynamask.cache import BoundedLayer
from dynamask.ops import attend
from dynamask.ops.hopper import dispatch
from dynamask.ops.interval.reference import interval_attention_reference
from dynamask.ops.triton import backward
from dynamask_lab.benchmarks.gpu.compile_ahead import compile_only
from dynamask_lab.benchmarks.gpu.constants import set_constant

TOLERANCE = 0.016
"""Of the norm of the difference over that of the result, in bfloat16."""


@contextmanager
def walk_from(queries: int) -> Iterator[None]:
    """The walk for dK and dV from so many queries on."""
    before = backward.WALK_FROM
    backward.WALK_FROM = queries
    try:
        yield
    finally:
        backward.WALK_FROM = before


def problem(
    length: int, windows: tuple[int, ...], heads: int, dim: int, device: str, local: int = 0, sinks: int = 4
) -> tuple[list[Tensor], Tensor, Tensor, tuple[int, ...]]:
    """Fresh query, key, value and scores; an output gradient, the expiry and the most keys that a query sees."""
    groups = len(windows)
    query, grad = (torch.randn(1, heads, length, dim, device=device).bfloat16() for _ in range(2))
    key, value = (torch.randn(1, groups, length, dim, device=device).bfloat16() for _ in range(2))
    scores = torch.randn(1, groups, length, device=device)
    rows = [
        key_expiry(
            scores[:, g : g + 1], window, local=min(local, window), sinks=min(sinks, window - min(local, window))
        )
        for g, window in enumerate(windows)
    ]
    return [query, key, value, scores], grad, torch.cat(rows, 1).contiguous(), windows


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, where there are some."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def poison(device: str) -> None:
    """Fill what the allocator hands out next with NaN."""
    blocks = [
        torch.full((size,), float("nan"), device=device) for size in (1 << 26, 1 << 24, 1 << 22, 1 << 20, 1 << 16)
    ]
    del blocks


def run(inputs: list[Tensor], grad: Tensor, expiry: Tensor, live: tuple[int, ...], bias: bool, backend: str) -> Any:
    leaves = [t.detach().requires_grad_() for t in inputs[: 4 if bias else 3]]
    output = attend(*leaves[:3], expiry, bias=leaves[3] if bias else None, backend=backend, max_live=live)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def ragged_steps(inputs: list[Tensor], windows: tuple[int, ...], begin: int, sinks: int) -> list[Tensor]:
    """Outputs of a text's begin and of single tokens after it, from a cache with a window for each head."""
    layer, outputs = BoundedLayer(windows, sinks=sinks), []
    with torch.no_grad():
        for start, stop in ((0, begin), *((i, i + 1) for i in range(begin, inputs[0].shape[2]))):
            outputs.append(layer.attend(*(tensor[:, :, start:stop] for tensor in inputs), bias_is_rank=True))
    return outputs


def ragged_error(inputs: list[Tensor], windows: tuple[int, ...], outputs: list[Tensor], sinks: int) -> float:
    """Relative error of those outputs against attention over the whole text in float64."""
    query, key, value, scores = inputs
    expiry = key_expiry(scores.cpu(), windows, sinks=sinks).to(scores.device)
    ratio, rows = query.shape[1] // len(windows), []
    for group in range(len(windows)):
        one = slice(group, group + 1)
        wide = [t.double() for t in (query[:, group * ratio : (group + 1) * ratio], key[:, one], value[:, one])]
        bias = scores[:, one].double()
        rows.append(interval_attention_reference(*wide, expiry[:, one], bias, query.shape[-1] ** -0.5))
    wanted = torch.cat(rows, 1)
    return ((torch.cat(outputs, 2).double() - wanted).norm() / wanted.norm()).item()


def errors(inputs: list[Tensor], grad: Tensor, expiry: Tensor, found: list[Tensor], bias: bool) -> list[float]:
    """Relative error of the output and each gradient against float64, a key/value head at a time."""
    query, key, value, scores = inputs
    ratio = query.shape[1] // key.shape[1]
    parts = [torch.zeros(2, dtype=torch.float64) for _ in found]
    for group in range(key.shape[1]):
        heads, one = slice(group * ratio, (group + 1) * ratio), slice(group, group + 1)
        wide = [query[:, heads], key[:, one], value[:, one], scores[:, one]][: 4 if bias else 3]
        wide = [t.detach().double().requires_grad_() for t in wide]
        output = interval_attention_reference(
            *wide[:3], expiry[:, one], wide[3] if bias else None, query.shape[-1] ** -0.5
        )
        wanted = [output.detach(), *torch.autograd.grad(output, wide, grad[:, heads].double())]
        chosen = [heads, heads, one, one, one]
        for total, got, right, part in zip(parts, found, wanted, chosen, strict=False):
            difference = (got[:, part].double() - right).square().sum().cpu()
            total += torch.stack([difference, right.square().sum().cpu()])
    return [(total[0] / total[1]).sqrt().item() for total in parts]


def main() -> int:
    """Check what the options choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="of deterministic mode; 0: none")
    parser.add_argument("--set", nargs="*", default=[], metavar="MODULE.NAME=VALUE", help="of dynamask.ops, a literal")
    parser.add_argument("--part", default="0/1", metavar="K/N", help="every N-th check, from the K-th on (K from 0)")
    parser.add_argument("--walks", action="store_true", help="the walk alone, not the backward pass by atomic sums")
    parser.add_argument("--prepare", action="store_true", help="compile, launch nothing and check nothing")
    parser.add_argument("--small", action="store_true", help="short rows and few runs, on any device")
    arguments = parser.parse_args()
    for setting in arguments.set:
        name, _, chosen = setting.partition("=")
        set_constant(name, ast.literal_eval(chosen))
    device, backend = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "torch")
    warnings.simplefilter("error", UserWarning)  # kernels that give way to others warn
    torch.manual_seed(time.time_ns() % (1 << 31))
    n = 200 if arguments.small else 4500
    bad = 0

    def report(name: str, good: bool, detail: str) -> None:
        nonlocal bad
        bad += not good
        print(f"{'ok   ' if good else 'WRONG'} {name}: {detail}", flush=True)

    mixes = [
        (16, (1, n, 136, 700), n),
        (9, (150, n, 1), n),
        (6, (136, 1, 90, 300, 136, 200), n),
        (12, (150, n), n),
        (3, (136, 200, 3), 90 if arguments.small else 17000),
    ]
    shapes = [(dim, *mix, bias) for bias in (False, True) for dim in (128, 64) for mix in mixes]
    ahead = compile_only() if arguments.prepare else nullcontext()
    if arguments.prepare:
        arguments.runs = min(arguments.runs, 1)
    part, parts = (int(number) for number in arguments.part.split("/"))
    with ahead:
        walks = (1,) if arguments.walks else (1, 1 << 30)
        cases = itertools.product(shapes[part::parts], walks, (False, True))
        for (dim, heads, windows, length, bias), queries, newest in cases:
            windows = tuple(min(window, length) for window in windows)
            local = (1 if length in windows else 120) if newest else 0
            inputs, grad, expiry, live = problem(length, windows, heads, dim, device, local)
            poison(device)
            name = f"N {length} D {dim} H {heads} G {len(windows)} bias {bias} walk {queries == 1} local {local}"
            with walk_from(queries):
                try:
                    found = run(inputs, grad, expiry, live, bias, backend)
                except Exception as error:
                    report(name, False, f"{type(error).__name__}: {error}"[:300])
                    continue
            if not arguments.prepare:
                off = errors(inputs, grad, expiry, found, bias)
                report(name, all(e < TOLERANCE for e in off), " ".join(f"{e:.4f}" for e in off))
        for length in (n, 2 * n) if arguments.runs else ():
            inputs, grad, expiry, live = problem(length, (1, length, 136, 700), 16, 128, device)
            with deterministic():
                first = run(inputs, grad, expiry, live, True, backend)
                differ = 0
                for _ in range(arguments.runs - 1):
                    again = run(inputs, grad, expiry, live, True, backend)
                    differ += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            if not arguments.prepare:
                off = errors(inputs, grad, expiry, first, True)
                detail = f"{differ} differ, errors " + " ".join(f"{e:.4f}" for e in off)
                good = differ == 0 and all(e < TOLERANCE for e in off)
                report(f"{arguments.runs} deterministic runs, N {length}", good, detail)
    windows, steps = tuple(min(window, n) for window in (n, 16, 136, 700)), 8
    for length in (n, 2 * n) if arguments.runs else ():
        inputs = problem(length, windows, 16, 128, device)[0]
        inputs = [torch.cat([t, t[:, :, :steps].flip(2)], 2) for t in inputs]
        with deterministic():
            first = ragged_steps(inputs, windows, length, 4)
            differ = 0
            for _ in range(arguments.runs - 1):
                again = ragged_steps(inputs, windows, length, 4)
                differ += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        error = ragged_error(inputs, windows, first, 4)
        good, detail = differ == 0 and error < TOLERANCE, f"{differ} differ, error {error:.4f}"
        report(f"{arguments.runs} runs from a ragged cache, {length} and {steps} tokens", good, detail)
    report("kernels that gave way", not dispatch._distrusted, str(dispatch._distrusted or "none"))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
