"""Training steps of whole models, and the longest text that trains."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dynamask.models import DynamaskConfig, DynamaskForCausalLM
from dynamask.models.modeling import AUXILIARY_WEIGHT
from dynamask_lab.benchmarks.model.device import (
    build,
    current_device,
    dense_backend,
    free_memory,
    peak_flops,
    peak_gib,
    reset_peak,
    synchronize,
)

_CHUNK = 2048  # positions whose logits exist at a time: 1.2 GB of float32 at 152K tokens


def training_flops(config: DynamaskConfig, parameters: int, length: int) -> dict[str, float]:
    """Useful floating-point operations of one training step over one sequence; recomputation is not among them.

    Args:
        config: of the model.
        parameters: its weights without the embedding.
        length: N.

    Returns:
        "weights" (6 per weight and token), "output" (the same of the output layer) and "attention" (4 per query-key
        pair and head dimension forward, twice that backward, over the pairs the mixer's mask lets through).
    """
    groups = config.num_key_value_heads
    windows = config.head_windows if config.attention == "dma" else ((length,) * groups,) * config.num_hidden_layers
    kept = [min(window, length) for layer in windows for window in layer]
    pairs = sum(seen * (seen + 1) / 2 + (length - seen) * seen for seen in kept) * config.num_attention_heads // groups
    attention = 3 * 4.0 * config.head_dim * pairs
    output = 6.0 * config.hidden_size * config.vocab_size * length
    return {"weights": 6.0 * parameters * length, "output": output, "attention": attention}


def chunked_loss(model: DynamaskForCausalLM, tokens: Tensor, chunk: int = _CHUNK) -> Tensor:
    """The model's causal loss, with the logits of `chunk` positions at a time, recomputed in the backward pass.

    Args:
        model: in training mode.
        tokens: (1, N) int64, input and target.
        chunk: positions.
    """
    outputs = model.model(input_ids=tokens, use_cache=False)
    hidden = outputs.last_hidden_state[:, :-1]
    targets = tokens[:, 1:]
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, targets.shape[1], chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(
            _loss_of_chunk, model.lm_head, hidden[:, part], targets[:, part], use_reentrant=False
        )
    loss = total / targets.numel()
    return loss if outputs.aux_loss is None else loss + AUXILIARY_WEIGHT * outputs.aux_loss


def _loss_of_chunk(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).flatten(0, 1).float(), targets.flatten(), reduction="sum")


def time_training(
    name: str,
    attention: str,
    length: int,
    *,
    warmup: int | None = None,
    steps: int = 3,
    gates: str = "scattered",
    weights: str = "auto",
    compile: bool = False,
) -> dict[str, Any]:
    """Time training steps: forward, backward with gradient checkpointing, clipping, AdamW; batch 1.

    Args:
        name: the preset.
        attention: "dma", "mha" or "mha-cudnn".
        length: tokens per step.
        warmup, steps: untimed and timed steps, the median of which counts. None: two, or one where N > 32768.
        gates: see `build`.
        weights: "float32" (bf16 autocast over them, as the trainer does), "bfloat16", or "auto": float32 where
            weights, gradients and moments take at most half of the memory.
        compile: compile every decoder layer; one graph serves them all.

    Returns:
        A row: step seconds, tokens/s, peak memory, MFU and what it was measured with.
    """
    model = build(name, attention, length, gates=gates).train()
    config = model.config
    if warmup is None:
        warmup = 2 if length <= 32768 else 1
    everything = sum(p.numel() for p in model.parameters())
    parameters = everything - model.model.embed_tokens.weight.numel()
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        parameters -= model.lm_head.weight.numel()  # counted apart, as "output"
    if weights == "auto":
        memory = free_memory()
        weights = "float32" if memory is None or 16 * everything <= memory / 2 else "bfloat16"
    if weights == "bfloat16":
        model = model.to(torch.bfloat16)
    device = current_device()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compile:
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=device == "cuda")
    tokens = torch.randint(config.vocab_size, (1, length), device=device)
    row: dict[str, Any] = {
        "attention": attention,
        "N": length,
        "window": config.windows if "dma" in attention else None,
    }
    row |= {"compiled": compile}
    row |= {"preset": name, "weights": weights, "parameters_m": everything / 1e6, "steps": steps, "warmup": warmup}
    if attention == "dma":
        row["gates"] = gates

    def step() -> Tensor:
        # Backward inside too: gradient checkpointing calls SDPA again there.
        with dense_backend(attention):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=weights == "float32"):
                loss = chunked_loss(model, tokens)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    reset_peak()
    for _ in range(warmup):
        step()
    taken = []
    for _ in range(steps):
        synchronize()
        start = time.perf_counter()
        loss = step()
        synchronize()
        taken.append(time.perf_counter() - start)
    seconds, value = statistics.median(taken), loss.item()
    if not value == value:
        raise AssertionError("the loss is NaN, so no time is worth anything")
    row["steps_s"] = taken
    flops = training_flops(config, parameters, length)
    row |= {"step_s": seconds, "tokens_per_s": length / seconds, "peak_gib": peak_gib(), "loss": value}
    row["useful_tflops"] = (flops["weights"] + flops["attention"]) / seconds / 1e12
    peak = peak_flops()
    if peak is not None:
        row["mfu"] = (flops["weights"] + flops["attention"]) / seconds / peak
        row["mfu_with_output"] = sum(flops.values()) / seconds / peak
    return row


def longest_trainable(
    measure: Callable[[int], dict[str, Any]], start: int, budget_seconds: float, *, cap: int = 1 << 20
) -> Iterator[dict[str, Any]]:
    """Search for the longest length that trains: doubling from `start`, then once half-way to what failed.

    Args:
        measure: row of a length, as `time_training` gives it; with "error" where it failed.
        start: first length tried.
        budget_seconds: of the whole search. A step whose dense attention would not fit in what is left is not begun.
        cap: longest length tried.

    Yields:
        The row of every length tried, then {"longest": N or None, "ended": why}.
    """
    began = time.perf_counter()
    longest, failed, took, ended = None, None, 0.0, ""
    length = start
    while True:
        left = budget_seconds - (time.perf_counter() - began)
        # Attention's work grows with the square, so one attempt is at most four times the one at half its length.
        if left <= 0 or took * (length / (longest or length)) ** 2 > left:
            ended = f"the budget of {budget_seconds:.0f} s; {length} not tried"
            break
        before = time.perf_counter()
        row = measure(length)
        yield row
        if "error" not in row:
            longest, took = length, time.perf_counter() - before
            if failed is not None:
                ended = f"{failed} does not fit"
                break
            if 2 * length > cap:
                ended = f"the search's end at {cap}"
                break
            length *= 2
            continue
        if not row.get("out_of_memory"):
            ended = f"{length} failed: {row['error']}"
            break
        if failed is not None or longest is None:
            ended = f"{length} does not fit"
            break
        failed, length = length, longest * 3 // 2
    yield {"longest": longest, "ended": ended}
