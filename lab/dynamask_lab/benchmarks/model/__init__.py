"""Whole models: training steps and decoding of dynamic mask attention against dense attention, in one process.

Dense attention is SDPA with its flash backend everywhere ("mha"); "mha-cudnn" trains with cuDNN's.
Every contestant gets the same model shape, random token ids, the same loss and the same optimizer.
"""

from __future__ import annotations

from dynamask_lab.benchmarks.model.device import build
from dynamask_lab.benchmarks.model.generation import (
    CACHES,
    CONTEXTS,
    FixedLayer,
    cache_size,
    filled_cache,
    time_generation,
    time_prefill,
)
from dynamask_lab.benchmarks.model.report import TABLES, draw, markdown, table_rows, write
from dynamask_lab.benchmarks.model.run import (
    BATCHES,
    LENGTHS,
    NOTES,
    PREFILL,
    Settings,
    attempt,
    benchmark_model,
    check_kernels,
    environment,
    train_as_set,
)
from dynamask_lab.benchmarks.model.training import chunked_loss, longest_trainable, time_training, training_flops

__all__ = [
    "BATCHES",
    "CACHES",
    "CONTEXTS",
    "LENGTHS",
    "NOTES",
    "PREFILL",
    "TABLES",
    "FixedLayer",
    "Settings",
    "attempt",
    "benchmark_model",
    "build",
    "cache_size",
    "check_kernels",
    "chunked_loss",
    "draw",
    "environment",
    "filled_cache",
    "longest_trainable",
    "markdown",
    "table_rows",
    "time_generation",
    "time_prefill",
    "time_training",
    "train_as_set",
    "training_flops",
    "write",
]
