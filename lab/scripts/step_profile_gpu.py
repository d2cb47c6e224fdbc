"""Where the time of a decoding step and of a training step goes, of a converted model and the dense one beside it.

    PYTHONPATH=.:lab python lab/scripts/step_profile_gpu.py --out OUT [--seconds 100] [--parts decode prefill train ...]

Weights are random, in the shapes of `decode_gpu.py`. `OUT/profile-log.txt` gets one line per step (launches, time on
the host and on the GPU), `OUT/profile-*.txt` the kernels and operators of each.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from decode_gpu import (
    COUNTED,
    DEVICE,
    GPU,
    UNMASKED,
    flash,
    free,
    host_seconds,
    loss_against,
    models,
    seconds_of,
    synchronize,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from dynamask.convert import compiled_layers
from dynamask.convert.teacher import teacher_states
from dynamask.models import cuda_graph
from dynamask.models.cuda_graph import StepGraph
from dynamask.training.loss import use_chunked_loss
from dynamask_lab.benchmarks.model import filled_cache

_BEGAN = time.perf_counter()
_SHOWN = 70


class Log:
    """Lines that go to the output and into a file at once."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.file = (out / "profile-log.txt").open("a")

    def __call__(self, line: str) -> None:
        line = f"[{time.perf_counter() - _BEGAN:5.1f} s] {line}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def kernels(traced: Any) -> list[tuple[str, int, float]]:
    """Name, count and microseconds of what ran on the device, the longest first."""
    count: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for event in traced.events():
        on_device = str(event.device_type).endswith("CUDA") if GPU else event.cpu_parent is None
        if on_device:
            name = re.sub(r"\s+", " ", event.name)[:110]
            count[name] += 1
            taken[name] += event.time_range.elapsed_us()
    return [(name, count[name], us) for name, us in taken.most_common()]


def profiled(log: Log, what: str, step: Callable[[], Any], repeats: int = 3) -> None:
    """Time a step, then write its kernels and the operators' time on the host."""
    taken = seconds_of(step, repeats, warm=2)
    host = host_seconds(step)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if GPU else [ProfilerActivity.CPU]
    with profile(activities=activities) as traced:
        step()
        synchronize()
    rows = kernels(traced)
    averages = traced.key_averages()
    launches = sum(e.count for e in averages if any(part in e.key for part in COUNTED))
    waits = {e.key: e.count for e in averages if "Synchronize" in e.key or "_local_scalar_dense" in e.key}
    busy = sum(us for _, _, us in rows)
    log(
        f"{what}: {1e3 * taken:.3f} ms, host {1e3 * host:.3f} ms, {sum(n for _, n, _ in rows)} on the device in "
        f"{busy / 1e3:.3f} ms, {launches} launches, waits {waits}"
    )
    lines = [f"{us:10.1f} us {count:6d} x {us / count:8.2f}  {name}" for name, count, us in rows[:_SHOWN]]
    text = "\n".join(lines) + "\n" + averages.table(sort_by="self_cpu_time_total", row_limit=40)
    (log.out / f"profile-{re.sub('[^a-z0-9.]+', '-', what.lower())}.txt").write_text(text)


@torch.no_grad()
def decode(log: Log, name: str, batch: int, context: int, budget: int, eager: bool) -> None:
    """A token from a filled cache: by graph, or (`eager`) by the host."""
    dense, sparse = models(name, budget, context)
    dense.config._attn_implementation = "sdpa" if eager else UNMASKED
    sides = [("converted", sparse, "bounded-eager" if eager else "bounded")]
    sides += [("dense", dense, "dynamic" if eager else "fixed")]
    for side, model, kind in sides:
        held = filled_cache(sparse.config, kind, context, batch, 0)
        token = torch.randint(dense.config.vocab_size, (batch, 1), device=DEVICE)
        place = torch.full_like(token, context - 1)

        def own(model: Any = model, held: Any = held, token: Any = token) -> None:
            model(token, past_key_values=held, use_cache=True)

        chosen = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if GPU and side == "dense" else contextlib.nullcontext()
        what = f"decode {'eager' if eager else 'graph'} {name} B{batch} {side}"
        with chosen:
            for _ in range(5):
                own()
            step: Callable[[], Any] = own
            if GPU and not eager:
                graph = cuda_graph._GRAPHS[held] if kind == "bounded" else StepGraph(model, held, token, place)
                step = graph.graph.replay
            profiled(log, what, step, 9)
        del held
        free()


def train(
    log: Log,
    name: str,
    length: int,
    budget: int,
    compiled: bool,
    batch: int = 1,
    ranks: bool = False,
    distil: bool = False,
) -> None:
    """Forward and backward of one batch, as `decode_gpu.py` times it; with `ranks` a row more, whose ranks learn."""
    dense, sparse = models(name, budget, length)
    teacher = models(name, budget, length)[0] if distil else None
    tokens = torch.randint(dense.config.vocab_size, (batch, length), device=DEVICE)
    sides = [("converted", sparse, 0.0), *([("converted, ranks learn too", sparse, 1.0)] if ranks else ())]
    for model in (dense, sparse):
        model.train()
        if length >= 32768:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    served = [each for each in (dense, sparse, teacher) if each is not None]
    layers = [compiled_layers(each) for each in served] if compiled else []
    plain = sparse.forward
    for model in (dense, sparse):
        use_chunked_loss(model)
    for side, model, weight in (*sides, ("dense", dense, 0.0)):
        sparse.config.rank_loss_weight = weight

        def step(model: Any = model) -> None:
            if teacher is None:
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            else:
                loss = loss_against(teacher, dense, plain, model, tokens)
            loss.backward()
            model.zero_grad(set_to_none=True)

        kind = "distil" if distil else "train"
        with flash():
            profiled(log, f"{kind} {name} {length} B{batch} {'compiled' if compiled else 'eager'} {side}", step, 2)
        free()
    if teacher is not None:
        with flash():
            profiled(log, f"teacher {name} {length} B{batch}", lambda: teacher_states(teacher, tokens, None), 2)
    log(f"failures {[each.failure for each in layers]}")


@torch.no_grad()
def prefill(log: Log, name: str, length: int, budget: int) -> None:
    """A text read into an empty cache."""
    dense, sparse = models(name, budget, length)
    tokens = torch.randint(dense.config.vocab_size, (1, length), device=DEVICE)
    for side, model in (("converted", sparse), ("dense", dense)):
        chosen = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if GPU and side == "dense" else contextlib.nullcontext()

        def step(model: Any = model) -> None:
            model(tokens, use_cache=True, logits_to_keep=1)

        with chosen:
            profiled(log, f"prefill {name} {length} {side}", step)
        free()


def jobs(log: Log) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is profiled, the most important first."""
    small, medium = "smollm2-135m", "qwen3-0.6b"
    if not GPU:
        for eager in (False, True):
            yield "eager" if eager else "decode", lambda eager=eager: decode(log, "tiny", 2, 300, 64, eager)  # type: ignore[misc]
        yield "train", lambda: train(log, "tiny", 300, 64, False, ranks=True)
        yield "distil", lambda: train(log, "tiny", 300, 64, False, ranks=True, distil=True)
        yield "prefill", lambda: prefill(log, "tiny", 300, 64)
        return
    yield "decode", lambda: decode(log, small, 32, 32768, 2048, False)
    yield "prefill", lambda: prefill(log, small, 32768, 2048)
    yield "train", lambda: train(log, small, 8192, 512, True, 4, True)
    yield "distil", lambda: train(log, small, 32768, 2048, True, 1, True, True)
    yield "decode", lambda: decode(log, medium, 1, 32768, 2048, False)
    yield "eager", lambda: decode(log, medium, 1, 32768, 2048, True)
    yield "train", lambda: train(log, medium, 8192, 512, True, 4, True)


def main() -> int:
    """Profile what fits into the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=100.0, help="begin nothing after this long")
    parser.add_argument("--parts", nargs="+", default=["decode", "prefill", "train", "distil", "eager"])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    log = Log(arguments.out)
    log(f"{torch.cuda.get_device_name() if GPU else 'cpu'}, torch {torch.__version__}")
    for part, job in jobs(log):
        if part not in arguments.parts or time.perf_counter() - _BEGAN > arguments.seconds:
            continue
        try:
            job()
        except Exception as error:
            log(f"{part}: {type(error).__name__}: {str(error)[:300]}")
        free()
    log("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
