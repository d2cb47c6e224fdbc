"""Compile the attention kernels for a Hopper GPU on a machine without one, down to machine code.

    PYTHONPATH=.:lab python lab/scripts/compile_kernels.py [expiry] [lists] [hopper] [step]

The interpreter runs kernels that Triton refuses to compile: this finds them before a GPU has to. Nothing is launched,
and no result is looked at. Machine code with a predicated REDUX fails, too: where both branches of an `if` give numbers
and one of them reduces inside a warp, ptxas 12.8 has predicated the reduction by a register that it had overwritten.
One line per kernel; exit code 1 if any fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dynamask_lab.benchmarks.gpu.constants import constants

TARGET = GPUTarget("cuda", 90, 32)
_done: dict[str, float] = {}
_failed: list[str] = []


def predicated_reductions(cubin: bytes) -> list[str]:
    """Return the machine code's lines that reduce a warp's numbers under a predicate."""
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return [line.strip() for line in code.splitlines() if re.search(r"@!?U?P\d\s+REDUX", line)]


class _NoDevice:
    """What Triton asks a driver for before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_alone() -> None:
    """Make every launch a compilation."""
    driver.set_active(_NoDevice())  # type: ignore[arg-type]
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        began = time.perf_counter()
        name = self.fn.__module__.removeprefix("dynamask.ops.") + "." + self.fn.__name__
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            if kernel is not None and "cubin" not in kernel.asm:
                raise RuntimeError("no machine code")
            if kernel is not None and (found := predicated_reductions(kernel.asm["cubin"])):
                raise RuntimeError(f"predicated reduction, {found[0]}")
        except Exception as error:
            _failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}"[-1500:], flush=True)
            return None
        _done[name] = _done.get(name, 0.0) + time.perf_counter() - began
        return kernel

    JITFunction.run = compiled  # type: ignore[method-assign]


SHORT_TABLES: dict[str, Any] = {
    "triton.expiry._RUNS": ((1 << 22, 64, 1),),
    "triton.expiry._CHUNKS": ((1 << 22, 32, 1),),
    "triton.expiry._FLOORS": (8, 16, 32),
    "triton.expiry._SIFTED": 32,
    "triton.expiry._FILTERED_RUNS": ((1 << 22, 64, 1),),
    "triton.expiry._FILTERED_CHUNKS": ((1 << 22, 32, 1),),
    "triton.expiry._FILTER": (1, 0),
}
"""The tables of the tests: kernels of one warp."""


def expiry() -> None:
    """Expiry in every layout, at lengths of every table's rows."""
    from dynamask.ops.triton.expiry import contested_expiry

    for length, groups in ((4096, 4), (8192, 4), (32768, 4), (131072, 2), (1 << 20, 1)):
        scores = torch.zeros(1, groups, length)
        mask, segments = torch.ones(1, length, dtype=torch.bool), torch.zeros(1, length, dtype=torch.long)
        contested_expiry(scores, [512] * groups, 0, 0)
        if length < 32768:
            with constants(SHORT_TABLES):
                contested_expiry(scores[:, :, :33], [1] * groups, 0, 0)
        if length == 32768:
            contested_expiry(scores, [512, 700, 900, 40000], 8, 4, None, mask)
            contested_expiry(scores, [512] * 4, 8, 4)
            contested_expiry(scores, [512] * 4, 8, 4, segments)
            contested_expiry(scores, [512] * 4, 8, 4, segments, mask)


def lists() -> None:
    """Lists of short rows, of long ones, and with spans."""
    from dynamask.ops.triton.lists import build_lists, build_lists_and_spans

    for length in (4096, 8192, 32768, 131072):
        mask = torch.zeros(1, 4, length, dtype=torch.int32)
        build_lists(mask, length, 48, [512] * 4)
        build_lists_and_spans(mask, length, 32, [512] * 4)


def hopper() -> None:
    """Forward and backward pass of Hopper, with and without a bias."""
    from dynamask.ops.hopper import backward_dkv, backward_dq, forward
    from dynamask.ops.hopper.row_sums import RowSums
    from dynamask.ops.triton.inputs import AttentionInputs
    from dynamask.ops.triton.lists import build_lists, build_lists_and_spans

    torch.cuda.get_device_properties = lambda _device: SimpleNamespace(multi_processor_count=132)  # type: ignore[assignment, misc]
    for dim, ratio in ((128, 4), (128, 1), (64, 3)):
        for biased in (False, True):
            length = 4096
            query = torch.zeros(1, 2 * ratio, length, dim, dtype=torch.bfloat16)
            key, bias = torch.zeros(1, 2, length, dim, dtype=torch.bfloat16), torch.zeros(1, 2, length)
            mask = torch.zeros(1, 2, length, dtype=torch.int32)
            inputs = AttentionInputs(query, key, key, mask, bias if biased else None, 0.1)
            forward.forward_kernel_launch(inputs, build_lists(mask, length, forward.block_of(ratio), [512] * 2))
            sums = torch.zeros(1, 2 * ratio, length)
            rows = RowSums(sums, sums if biased else None, sums)
            found, spans = build_lists_and_spans(mask, length, backward_dq.block_of(ratio, dim), [512] * 2)
            backward_dq.query_kernel_launch(inputs, query, rows, (sums, sums), found)
            backward_dkv.walk_kernel_launch(inputs, query, rows, spans)


def step() -> None:
    """The launches of a decoding step, at two shapes of models and batches."""
    from dynamask.ops.triton import decode_step
    from dynamask.ops.triton.cache_keep import keep_launch
    from dynamask.ops.triton.predict_ranks import rms_epsilon
    from dynamask.ops.triton.ragged_decode import ragged_decode_launch

    rms_epsilon(torch.bfloat16, torch.device("cpu"))
    for batch, hidden, heads, groups, dim, biased in ((1, 1024, 16, 8, 128, False), (32, 576, 9, 3, 64, True)):
        narrow = torch.bfloat16

        def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype)

        x, norm, width = weight(batch, hidden), weight(hidden), hidden // 4
        parts = [weight(heads * dim, hidden), weight(groups * dim, hidden), weight(groups * dim, hidden)]
        biases = tuple(weight(part.shape[0]) for part in parts) if biased else None
        up = weight(width, hidden, dtype=torch.float32 if biased else narrow)
        projections = decode_step.Projections(*parts, biases, up)  # type: ignore[arg-type]
        slots = groups * 2048
        state = [weight(batch, slots, dim), weight(batch, slots, dim), torch.zeros(batch, slots)]
        state += [torch.zeros(batch, slots, dtype=torch.int32), torch.zeros(batch, groups, dtype=torch.int64)]
        offsets = tuple(range(0, slots + 1, 2048))
        pools = decode_step.Pools(*state, offsets, 128, 4)
        residual = decode_step.begin(x)
        projected, active, contest = decode_step.norm_and_project(residual, norm, 1e-6, projections, pools)
        decode_step.norm_and_gate(residual, norm, 1e-6, weight(3 * hidden, hidden), weight(3 * hidden, hidden))
        decode_step.project_and_add(weight(batch, 3 * hidden), weight(hidden, 3 * hidden), None, residual)
        lift = torch.zeros(batch, groups) if biased else None
        ranks = decode_step.RankHeadWeights(active, weight(groups, width), weight(groups), lift, 64.0)  # type: ignore[arg-type]
        norms = None if biased else (weight(dim), weight(dim))
        decode_step.rotate_and_insert(projected, weight(1, dim), weight(1, dim), norms, 1e-6, ranks, pools, contest)
        ragged_decode_launch(weight(batch, heads, 1, dim), *state[:2], None, offsets, None, 0.1)
        key, found = weight(batch, groups, 32, dim), torch.zeros(batch, groups, 32, dtype=torch.int32)
        table = torch.zeros(groups + 1, dtype=torch.int32)
        keep_launch(key, key, torch.zeros(batch, groups, 32), found.long(), found, table, slots)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=["expiry", "lists", "hopper", "step"])
    compile_alone()
    for family in parser.parse_args().families:
        {"expiry": expiry, "lists": lists, "hopper": hopper, "step": step}[family]()
    for name, seconds in _done.items():
        print(f"{seconds:6.1f} s  {name}")
    print(f"Triton {triton.__version__}: {len(_done)} kernels compile, failed: {sorted(set(_failed)) or 'none'}")
    return int(bool(_failed))


if __name__ == "__main__":
    sys.exit(main())
