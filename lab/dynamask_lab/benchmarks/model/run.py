"""The measurements in order of importance, each saved as it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from dynamask.models import preset
from dynamask_lab.benchmarks.gpu import check
from dynamask_lab.benchmarks.gpu.apart import Task, run_apart
from dynamask_lab.benchmarks.gpu.measure import whole
from dynamask_lab.benchmarks.model.device import free, is_out_of_memory
from dynamask_lab.benchmarks.model.generation import CACHES, CONTEXTS, decoder, time_generation, time_prefill
from dynamask_lab.benchmarks.model.report import cell
from dynamask_lab.benchmarks.model.training import longest_trainable, time_training
from dynamask_lab.sweeps import provenance

# In order of importance: a budget that ends early cuts from the end.
LENGTHS = (32768, 8192, 65536)


BATCHES = (1, 8, 32)


PREFILL = 32768


NOTES = (
    "dma: gates drawn at random without recency term, so kept keys are scattered but for the newest ones that are "
    "always kept (the preset's `local`, half of the window); an untrained gate would be a sliding window.",
    "mha: SDPA, flash backend; mha-cudnn: SDPA, cuDNN backend.",
    "Training: batch 1, gradient checkpointing of every layer, AdamW (fused on a GPU), clipping at 1, bf16, "
    "the median of the timed steps. Weights are float32, cast by autocast as the trainer does it ('float32' under "
    "weights), or bfloat16 where float32 weights, gradients and moments would take more than half of the memory. "
    "Output layer and loss run over 2048 positions at a time, recomputed backward, for every contestant alike: the "
    "model's own loss would materialise (N, vocab) float32.",
    "mfu: (6 · non-embedding parameters · N + attention over the keys a query sees, forward and twice that backward) "
    "over the device's dense bfloat16 peak (989 TFLOP/s). Recomputation is not counted. mfu_with_output counts the "
    "output layer's product too.",
    "Generation: bfloat16 weights, greedy; caches hold random keys and values put there directly. 'bounded' and "
    "'fixed' replay the step as a CUDA graph, the others run eagerly. 'fixed' is dense attention at its best: the new "
    "key overwrites the last of `context` slots, so that nothing grows, is copied or masked; no real cache does less. "
    "'dynamic' and 'static' are transformers' caches.",
    "With compile, every decoder layer of every contestant is compiled by torch.compile (inductor), in the search for "
    "the longest length too; a contestant that cannot be compiled runs eagerly, and its row says so.",
    "On a GPU dma's kernels are first compared with float64 at the model's heads (errors, in the JSON).",
)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        preset: model size, see `dynamask.models.PRESETS`.
        lengths: tokens of a training step, the most important first.
        contexts, batches: of generation, the most important first.
        prefill: tokens of the timed prefill; 0 leaves it out.
        steps: decoding steps timed.
        only: "training", "generation" or None for both.
        budget_seconds: nothing starts after it.
        longest: search for the longest trainable length.
        longest_cap: where that search ends even if memory is left.
        gates: "scattered" or "initial", see `build`.
        compile: train with compiled layers.
        checks: on a GPU, compare dma's kernels with float64 first.
    """

    preset: str = "1.7b"
    lengths: Sequence[int] = LENGTHS
    contexts: Sequence[int] = CONTEXTS
    batches: Sequence[int] = BATCHES
    prefill: int = PREFILL
    steps: int = 32
    only: str | None = None
    budget_seconds: float = 450.0
    longest: bool = True
    longest_cap: int = 1 << 20
    gates: str = "scattered"
    compile: bool = True
    checks: bool = True


def environment(commit: str | None = None) -> dict[str, Any]:
    """Device, versions and commit.

    Args:
        commit: of the code; default: asked of git, None outside a checkout.
    """
    import transformers

    if torch.cuda.is_available():
        from dynamask_lab.benchmarks.gpu import run

        found = run.environment(commit) | {"memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1)}
        del found["peers"]
    else:
        from dynamask_lab.benchmarks import cpu

        found = cpu.environment()
    return found | {"transformers": transformers.__version__, "commit": commit or provenance.commit()}


def attempt(measure: Callable[[], dict[str, Any]], identity: dict[str, Any]) -> dict[str, Any]:
    """The row of a measurement, or its identity with "error" (and "out_of_memory"); memory is freed either way."""
    began = time.perf_counter()
    try:
        row = measure()
    except Exception as error:  # one that cannot run here is reported, not fatal
        text = (str(error).splitlines() or [""])[0][:200]
        full = is_out_of_memory(error)
        row = identity | {"error": "out of memory" if full else f"{type(error).__name__}: {text}"}
        row |= {"out_of_memory": True} if full else {"traceback": whole(error)}
    # Only here, after the except block, is the traceback gone that held the model's tensors.
    free()
    row["took_s"] = time.perf_counter() - began
    return row


def train_as_set(settings: Settings, attention: str, length: int, **options: Any) -> dict[str, Any]:
    """`time_training`, compiled where the settings say so, or eagerly where that fails ("compile_error")."""
    run = partial(time_training, settings.preset, attention, length, gates=settings.gates, **options)
    if not settings.compile:
        return run()
    try:
        return run(compile=True)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, AssertionError):
            raise
        failure = whole(error)
    free()
    return run() | {"compile_error": failure}


def check_kernels(name: str, deadline: float) -> list[dict[str, Any]]:
    """Errors of dma's kernels against float64 at a preset's heads, in a process of its own, which compiles them too.

    Args:
        name: the preset.
        deadline: seconds after which it is given up.

    Returns:
        Rows as `check.check_case` gives them, or one with "error".

    Raises:
        AssertionError: the kernels are wrong.
    """
    config = preset(name)
    case = {"dtype": "bfloat16", "dim": config.head_dim, "groups": config.num_key_value_heads}
    case |= {"heads": config.num_attention_heads, "length": 16384, "window": config.windows}
    (found,) = run_apart([Task("check", case)], deadline=deadline, timeout=deadline)
    if "error" in found:
        return [case | {"error": found["error"]}]
    if wrong := check.failures(found["result"]):
        raise AssertionError(f"wrong results, so no time is worth anything: {json.dumps(wrong)}")
    return found["result"]


def benchmark_model(
    settings: Settings,
    *,
    commit: str | None = None,
    save: Callable[[dict[str, Any]], None] = lambda results: None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Every measurement of `settings`, the most important first.

    Args:
        settings: what to measure.
        commit: recorded with the environment.
        save: called with all results so far after every measurement.
        progress: called with a line about every measurement.

    Returns:
        "environment", "settings", "notes"; rows of "errors" (see `check_kernels`), "training", "generation",
        "prefill", "longest"; "not_measured".

    Raises:
        AssertionError: dma's kernels give wrong results.
    """
    preset(settings.preset)  # names an unknown one before anything runs
    began = time.perf_counter()
    results: dict[str, Any] = {
        "environment": environment(commit),
        "settings": dict(vars(settings)),
        "notes": list(NOTES),
        **{part: [] for part in ("errors", "training", "generation", "prefill", "longest", "not_measured")},
    }

    def left() -> float:
        return settings.budget_seconds - (time.perf_counter() - began)

    def keep(part: str, row: dict[str, Any], identity: dict[str, Any]) -> None:
        results[part].append(row)
        results["seconds"] = time.perf_counter() - began
        progress(f"{results['seconds']:6.1f} s  {part}  {_told(identity)}  {_told(row, _FIGURES)}")
        save(results)

    save(results)
    if settings.checks and torch.cuda.is_available():
        for row in check_kernels(settings.preset, settings.budget_seconds / 3):
            keep("errors", row, {"preset": settings.preset})
    for part, identity, measure in _plan(settings):
        if left() <= 0:
            results["not_measured"].append({"part": part, **identity})
            continue
        keep(part, attempt(measure, identity), identity)
    if settings.longest and settings.only != "generation":
        rivals = ("dma", "mha")
        for number, attention in enumerate(rivals):
            fits = [row["N"] for row in results["training"] if row["attention"] == attention and "error" not in row]
            if left() <= 0:
                results["not_measured"].append({"part": "longest", "attention": attention})
                continue
            measure_length = partial(_one_step, settings, attention)
            share = left() / (len(rivals) - number)
            first = 2 * max(fits, default=min(settings.lengths) // 2)
            for row in longest_trainable(measure_length, first, share, cap=settings.longest_cap):
                if "ended" in row and row["longest"] is None:
                    row["longest"] = max(fits, default=None)
                keep("longest", {"attention": attention, **row}, {"attention": attention})
    results["seconds"] = time.perf_counter() - began
    save(results)
    return results


_FIGURES = ("step_s", "tokens_per_s", "peak_gib", "worst", "longest", "ended", "skipped", "error")


def _told(row: dict[str, Any], names: Iterable[str] | None = None) -> str:
    return ", ".join(f"{name} {cell(row[name])}" for name in names or row if row.get(name) is not None)


def _one_step(settings: Settings, attention: str, length: int) -> dict[str, Any]:
    # Without a warm-up: the question is whether it fits, and a long dense step takes half a minute.
    measure = partial(train_as_set, settings, attention, length, warmup=0, steps=1)
    return attempt(measure, {"attention": attention, "N": length})


def _plan(settings: Settings) -> Iterable[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """(part, identity, measurement), the most important first."""

    def training(attention: str, length: int) -> tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]:
        return "training", {"attention": attention, "N": length}, partial(train_as_set, settings, attention, length)

    cudnn = settings.only != "generation" and torch.cuda.is_available()
    if settings.only != "generation":
        for length in settings.lengths:
            for attention in ("dma", "mha"):
                yield training(attention, length)
    if settings.only != "training":
        for number, batch in enumerate(settings.batches):
            if number == 1 and cudnn:
                decoder.cache_clear()
                yield training("mha-cudnn", settings.lengths[0])
            # One attention after the other, so that its model is built once.
            for attention in ("dma", "mha"):
                for context, cache in product(settings.contexts, [c for a, c in CACHES if a == attention]):
                    run = partial(time_generation, settings.preset, attention, cache, context, batch)
                    identity = {"attention": attention, "cache": cache, "context": context, "batch": batch}
                    yield "generation", identity, partial(run, steps=settings.steps, gates=settings.gates)
            if number == 0 and settings.prefill:
                for attention in ("dma", "mha"):
                    identity = {"attention": attention, "N": settings.prefill}
                    fill = partial(time_prefill, settings.preset, attention, settings.prefill, gates=settings.gates)
                    yield "prefill", identity, fill
    decoder.cache_clear()
    if cudnn:
        between = settings.only is None and len(settings.batches) > 1  # then the first was measured above
        for length in settings.lengths[1 if between else 0 :]:
            yield training("mha-cudnn", length)
