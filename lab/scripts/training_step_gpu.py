"""Where the time of a distillation step goes: launches, host time, time on the GPU.

    PYTHONPATH=.:lab python lab/scripts/training_step_gpu.py profile --out OUT [--seconds 85]

Weights are random, in the shapes of `decode_gpu.py`. Files: `host-first-log.txt` (one line per figure),
`host-first-profile-*.txt` (operators by time on the host and on the GPU, and the host's Python functions).
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_gpu import COUNTED, DEVICE, GPU, models, seconds_of, synchronize
from torch.profiler import ProfilerActivity, profile

from dynamask.convert import compiled_layers
from dynamask.convert.distillation_loss import distillation_losses
from dynamask.training.optimizer import adamw

_BEGAN = time.perf_counter()


class Log:
    """Lines that go to the output and into a file at once."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.file = (out / "host-first-log.txt").open("a")

    def __call__(self, line: str) -> None:
        line = f"[{time.perf_counter() - _BEGAN:5.1f} s] {line}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def distillation(name: str, batch: int, length: int, budget: int) -> tuple[Callable[[], None], Any, Any]:
    """One step as `distill` does it: float32 weights under autocast, a bfloat16 teacher, clipping, AdamW."""
    _, student = models(name, budget, length)
    student = student.float().train()
    optimizer = adamw(student, learning_rate=1e-5, weight_decay=0.0, rank_rate=1.0)
    tokens = torch.randint(student.config.vocab_size, (batch, length), device=DEVICE)
    frozen, _ = models(name, budget, length)
    frozen.eval().requires_grad_(False)

    def step() -> None:
        loss, ranks = distillation_losses(student, frozen, tokens)
        (loss if ranks is None else loss + ranks).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, student, frozen


def profiled(log: Log, what: str, step: Callable[[], None], tokens: int) -> None:
    """Time a step, count its launches, and write the tables."""
    taken = seconds_of(step, 3, warm=2)
    log(f"{what}: {1e3 * taken:.1f} ms a step, {tokens / taken:.0f} tokens/s")
    synchronize()
    began = time.perf_counter()
    python = cProfile.Profile()
    step()
    host = time.perf_counter() - began
    synchronize()
    log(f"{what}: host returns after {1e3 * host:.1f} ms, device done after {1e3 * (time.perf_counter() - began):.1f}")
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if GPU else [ProfilerActivity.CPU]
    with profile(activities=activities) as traced:
        step()
        synchronize()
    averages = traced.key_averages()
    launches = sum(e.count for e in averages if any(part in e.key for part in COUNTED))
    waits = {e.key: (e.count, e.cpu_time_total / 1e3) for e in averages if "Synchronize" in e.key or "item" in e.key}
    busy = sum(getattr(e, "self_device_time_total", 0) for e in averages) / 1e3
    log(f"{what}: {launches} launches, {busy:.1f} ms on the device, waits {waits}")
    text = io.StringIO()
    text.write(averages.table(sort_by="self_device_time_total" if GPU else "self_cpu_time_total", row_limit=45))
    text.write(averages.table(sort_by="self_cpu_time_total", row_limit=40))
    python.enable()
    step()
    python.disable()
    synchronize()
    stats = pstats.Stats(python, stream=text)
    stats.sort_stats("tottime").print_stats(45)
    stats.sort_stats("cumtime").print_stats(60)
    (log.out / f"host-first-profile-{what.replace(' ', '-')}.txt").write_text(text.getvalue())


def profile_steps(log: Log, seconds: float) -> None:
    """Profile an eager step, then one with compiled layers in both models."""
    name, length, budget = ("smollm2-135m", 8192, 512) if GPU else ("tiny", 300, 64)
    for batch in (1, 4):
        step, student, teacher = distillation(name, batch, length, budget)
        began = time.perf_counter()
        step()
        synchronize()
        log(f"first step {time.perf_counter() - began:.1f} s")
        profiled(log, f"eager B{batch}", step, batch * length)
    with compiled_layers(student) as own, compiled_layers(teacher):
        began = time.perf_counter()
        step()
        synchronize()
        log(f"compiled in {time.perf_counter() - began:.1f} s; failure {own.failure}")
        if time.perf_counter() - _BEGAN < seconds - 15:
            profiled(log, f"compiled B{batch}", step, batch * length)


def main() -> int:
    """Run the chosen part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["profile"])
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=85.0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    log = Log(arguments.out)
    log(f"{torch.cuda.get_device_name() if GPU else 'cpu'}, torch {torch.__version__}")
    profile_steps(log, arguments.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
