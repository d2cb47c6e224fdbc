"""Training speed and memory of the five mixers at a size of the scaling experiment, as that experiment trains them.

    python lab/scripts/rivals.py                        # every mixer at 4M parameters, N = 4096
    python lab/scripts/rivals.py --size 20M --only nsa  # one mixer, another size
    python lab/scripts/rivals.py --eager --only nsa     # without torch.compile

Random tokens, whole steps (forward, backward, clipping, AdamW) in bf16 autocast at the experiment's batch; memory is
the most that was allocated during the timed steps. One JSON line per mixer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynamask.training.loss import plain_losses, training_loss
from dynamask_lab.language.engine import LanguageConfig, build_model, compile_training
from dynamask_lab.studies.scaling.study import PLANS, SHAPES
from dynamask_lab.sweeps import provenance

MIXERS = ("dma", "swa", "mha", "mla", "nsa")
VOCABULARY = 8192


def measure(settings: LanguageConfig, *, warmup: int, steps: int) -> dict[str, Any]:
    """One row: tokens/s, seconds a step, seconds until the first steps were done (compilation, tuning), peak memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    model = build_model(settings, VOCABULARY).to(device).train()
    token_losses = compile_training(model) if settings.compile else plain_losses
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=cuda)
    rows = settings.batch_tokens // settings.length
    tokens = torch.randint(VOCABULARY, (rows, settings.length + 1), device=device)
    synchronize = torch.cuda.synchronize if cuda else lambda: None

    def step() -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            loss = training_loss(model, tokens, token_losses)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    began = time.perf_counter()
    losses = [step() for _ in range(warmup)]
    synchronize()
    start = time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses += [step() for _ in range(steps)]
    synchronize()
    seconds = (time.perf_counter() - start) / steps
    if not torch.isfinite(torch.stack(losses)).all():
        raise AssertionError("the loss is not finite, so no time is worth anything")
    return {
        "attention": settings.attention,
        "tokens_per_s": round(settings.batch_tokens / seconds),
        "step_s": round(seconds, 5),
        "startup_s": round(start - began, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "first_loss": round(float(losses[0]), 4),
        "last_loss": round(float(losses[-1]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="4M")
    parser.add_argument("--only", choices=MIXERS, action="append", help="only this mixer; repeatable")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--batch-tokens", type=int, help="tokens per step; default: the experiment's")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument("--tf32", action="store_true", help="TF32 where float32 is multiplied: nsa's block scores")
    parser.add_argument("--output", type=Path, help="also append the lines to this file")
    arguments = parser.parse_args()
    if arguments.tf32:
        torch.set_float32_matmul_precision("high")
    compiled = torch.cuda.is_available() and not arguments.eager
    origin = {"device": provenance.device_name(), "versions": provenance.versions(), "commit": provenance.commit()}
    for name in arguments.only or MIXERS:
        config = PLANS["paper"].config({"attention": name}, arguments.size, seed=0, rate=2e-3)
        config |= {"length": arguments.length, "compile": compiled}
        if arguments.batch_tokens:
            config["batch_tokens"] = arguments.batch_tokens
        row: dict[str, Any] = {
            "size": arguments.size,
            "length": arguments.length,
            "compiled": compiled,
            "tf32": arguments.tf32,
        }
        try:
            row |= measure(LanguageConfig.of(config), warmup=max(1, arguments.warmup), steps=arguments.steps)
        except Exception:  # out of memory, say: the other mixers are still worth a row
            row |= {"attention": name, "error": traceback.format_exc(limit=-6)[-3000:]}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        line = json.dumps(row | origin)
        print(line, flush=True)
        if arguments.output:
            with contextlib.closing(open(arguments.output, "a")) as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
