"""Context parallelism on several GPUs: exactness, speed and bytes beside one GPU and torch's ring attention; FSDP2.

    torchrun --standalone --nproc-per-node 2 lab/scripts/context_parallel_gpu.py --out results.jsonl
    torchrun --standalone --nproc-per-node 2 lab/scripts/context_parallel_gpu.py --tiny     # gloo, on a CPU

Every part stands by itself: one that fails prints its error, and the rest go on. The exactness comes first; without it
the times mean nothing. One JSON line per measurement.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dynamask import DynamaskConfig, DynamaskForCausalLM, key_expiry
from dynamask.models import preset
from dynamask.ops.context_parallel import (
    context_parallel,
    context_parallel_attention,
    context_shards,
    split_sequence,
)
from dynamask.ops.interval.api import attend
from dynamask.training.loss import use_chunked_loss
from dynamask.training.optimizer import adamw

TINY = "--tiny" in sys.argv
DEVICE = torch.device("cpu") if TINY else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
DTYPE = torch.float32 if TINY and "--bf16" not in sys.argv else torch.bfloat16
HEADS, GROUPS, DIM = (4, 2, 16) if TINY else (16, 8, 128)
WINDOW, LOCAL, SINKS = (32, 8, 2) if TINY else (2048, 128, 4)
LAYERS = 1 if TINY else 8
LENGTHS = [256, 512] if TINY else [262144]


def uneven_windows() -> list[int]:
    """Windows of the heads from a quarter to a sixteenth more than the mean's double, the mean about `WINDOW`."""
    return [max(LOCAL + SINKS, WINDOW // 4 + 7 * WINDOW * g // (4 * max(1, GROUPS - 1))) for g in range(GROUPS)]


def inputs(length: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    """The same whole sequence in every process."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)

    query, key, value = rows(HEADS, length, DIM), rows(GROUPS, length, DIM), rows(GROUPS, length, DIM)
    ranks = torch.randn(1, GROUPS, length, generator=generator, device=DEVICE)
    return [query, key, value, ranks]


def own(length: int) -> slice:
    size, rank = dist.get_world_size(), dist.get_rank()
    return slice(length * rank // size, length * (rank + 1) // size)


def synchronize() -> None:
    if not TINY:
        torch.cuda.synchronize()


def seconds(run: Callable[[], None], repeats: int, *, together: bool = True) -> list[float]:
    """Wall-clock times; with `together` the processes begin each repeat at once. The slowest process counts."""
    times = []
    for _ in range(repeats):
        synchronize()
        if together:
            dist.barrier()
            synchronize()
        begun = time.perf_counter()
        run()
        synchronize()
        taken = torch.tensor(time.perf_counter() - begun, device=DEVICE, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        times.append(float(taken))
    return times


def spread(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times) * 1e3, "ms_least": min(times) * 1e3, "ms_most": max(times) * 1e3}


class Report:
    """Lines of the first process."""

    def __init__(self, out: Path | None, seconds: float) -> None:
        self.deadline = time.perf_counter() + seconds
        self.first = dist.get_rank() == 0
        self.file = out.open("a", encoding="utf-8") if out is not None and self.first else None
        self.device = "cpu" if TINY else torch.cuda.get_device_name(DEVICE)
        self.failed: list[str] = []

    def line(self, kind: str, **facts: Any) -> None:
        if not self.first:
            return
        facts = {"kind": kind, "device": self.device, "gpus": dist.get_world_size(), "torch": torch.__version__} | facts
        text = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in facts.items()})
        print(text, flush=True)
        if self.file is not None:
            self.file.write(text + "\n")
            self.file.flush()

    def over(self) -> bool:
        """Whether the time is over, the same in all processes."""
        over = torch.tensor(time.perf_counter() > self.deadline, device=DEVICE)
        dist.broadcast(over, 0)
        return bool(over)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        except Exception:
            self.failed.append(name)
            print(f"process {dist.get_rank()}: {name} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        gc.collect()
        if not TINY:
            torch.cuda.empty_cache()
        if self.first:
            print(f"# {name}: {time.perf_counter() - begun:.1f} s", flush=True)


def exactness(report: Report) -> None:
    """Outputs and gradients against the whole sequence on this GPU, in float32 and the training dtype."""
    length = 192 if TINY else 12288
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    for windows, packed, dtype in (
        ([WINDOW] * GROUPS, False, DTYPE),
        (uneven_windows(), False, DTYPE),
        (uneven_windows(), True, DTYPE),
        (uneven_windows(), False, torch.float32),
    ):
        whole = [each.requires_grad_() for each in inputs(length, 1, dtype)[:3]]
        ranks = inputs(length, 1)[3]
        segments = None
        if packed:
            cuts = torch.tensor([length // 7, length // 3, length // 2, length - length // 5], device=DEVICE)
            segments = torch.bucketize(torch.arange(length, device=DEVICE), cuts, right=True)[None]
        expiry = key_expiry(ranks, windows, local=LOCAL, sinks=SINKS, segment_ids=segments)
        expected = attend(*whole, expiry, max_live=tuple(windows))
        grad = torch.randn(expected.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3)).to(dtype)
        expected.backward(grad)
        part = own(length)
        shard = [each.detach()[:, :, part].clone().requires_grad_() for each in whole]
        output = context_parallel_attention(
            *shard,
            ranks[:, :, part],
            windows,
            mesh=mesh,
            local=LOCAL,
            sinks=SINKS,
            segment_ids=None if segments is None else segments[:, part],
        )
        output.backward(grad[:, :, part].contiguous())
        errors = {}
        for name, ours, theirs in (
            ("output", output, expected),
            *((n, a.grad, b.grad) for n, a, b in zip(("dq", "dk", "dv"), shard, whole, strict=True)),
        ):
            theirs = theirs.detach()[:, :, part].float()
            error = (ours.detach().float() - theirs).norm() / theirs.norm()
            dist.all_reduce(error, dist.ReduceOp.MAX)
            errors[name] = float(error)
        allowed = 1e-5 if dtype == torch.float32 else 1e-2
        if not TINY and dtype == torch.float32:
            allowed = 5e-3  # products of float32 on tensor cores
        report.line(
            "context_parallel_exact",
            length=length,
            windows=windows,
            packed=packed,
            dtype=str(dtype).removeprefix("torch."),
            **errors,
            allowed=allowed,
            ok=max(errors.values()) <= allowed,
        )
        if max(errors.values()) > allowed:
            raise AssertionError(f"errors {errors} exceed {allowed}")


def attention_times(report: Report) -> None:
    """Forward and backward of one layer: one GPU, and split."""
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    for windows, name in (([WINDOW] * GROUPS, "even"), (uneven_windows(), "uneven")):
        for length in LENGTHS:
            _attention_times(report, mesh, windows, name, length)


def _attention_times(report: Report, mesh: Any, windows: list[int], name: str, length: int) -> None:
    repeats = 2 if TINY else 5
    query, key, value, ranks = inputs(length)
    whole = [query.requires_grad_(), key.requires_grad_(), value.requires_grad_()]
    grad = torch.randn_like(query)

    def attend_whole() -> Tensor:
        expiry = key_expiry(ranks, windows, local=LOCAL, sinks=SINKS)
        return attend(*whole, expiry, max_live=tuple(windows))

    def layers(attention: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor) -> Callable[[], None]:
        """Layers follow each other as in a model: forward through all, then back through all."""

        def run() -> None:
            outputs = [attention() for _ in range(LAYERS)]
            while outputs:
                torch.autograd.grad(outputs.pop(), leaves, gradient)

        return run

    one_gpu = layers(attend_whole, whole, grad)
    one_gpu()
    alone = [each / LAYERS for each in seconds(one_gpu, repeats, together=False)]
    part = own(length)
    shard = [each.detach()[:, :, part].clone().requires_grad_() for each in whole]
    shard_ranks, shard_grad = ranks[:, :, part].contiguous(), grad[:, :, part].contiguous()
    shards = context_shards(mesh, 1, part.stop - part.start, DEVICE)

    def attend_shard() -> Tensor:
        return context_parallel_attention(*shard, shard_ranks, windows, shards=shards, local=LOCAL, sinks=SINKS)

    split = layers(attend_shard, shard, shard_grad)
    split()
    shards.traffic.forward = shards.traffic.backward = 0
    split()
    sent = torch.tensor([shards.traffic.forward // LAYERS, shards.traffic.backward // LAYERS], device=DEVICE)
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    times = [each / LAYERS for each in seconds(split, repeats)]
    report.line(
        "context_parallel_attention",
        length=length,
        windows=name,
        window=WINDOW,
        layers_in_a_row=LAYERS,
        order="forward through all layers, then backward",
        heads=HEADS,
        groups=GROUPS,
        head_dim=DIM,
        one_gpu=spread(alone),
        split=spread(times),
        speedup=statistics.median(alone) / statistics.median(times),
        bytes_forward=int(sent[0]),
        bytes_backward=int(sent[1]),
    )


def ring_attention(report: Report) -> None:
    """torch's own context parallelism, dense and causal, with its bytes counted at its collectives."""
    if TINY:
        print("# torch's ring attention has no CPU kernel", flush=True)
        return
    size = dist.get_world_size()
    mesh = init_device_mesh(DEVICE.type, (size,))
    counted = {"bytes": 0}

    def counting(original: Callable[..., Any], factor: int) -> Callable[..., Any]:
        def wrapped(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            counted["bytes"] += tensor.numel() * tensor.element_size() * factor
            return original(tensor, *args, **kwargs)

        return wrapped

    originals = {}
    for name, factor in (("permute_tensor", 1), ("all_gather_tensor", size - 1), ("all_gather_single", size - 1)):
        if hasattr(collectives, name):
            originals[name] = getattr(collectives, name)
            setattr(collectives, name, counting(originals[name], factor))
    try:
        for length in LENGTHS:
            _ring_times(report, mesh, length, counted)
    finally:
        for name, original in originals.items():
            setattr(collectives, name, original)


def _ring_times(report: Report, mesh: Any, length: int, counted: dict[str, int]) -> None:
    from torch.distributed.tensor.experimental import context_parallel as torch_context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value, _ = inputs(length)
    # SDPA repeats the key/value heads before the ring sends them.
    buffers = [query.clone(), *(each.repeat_interleave(HEADS // GROUPS, 1) for each in (key, value))]
    del query, key, value
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        torch_context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]),
    ):
        leaves = [each.detach().requires_grad_() for each in buffers]
        grad = torch.randn_like(leaves[0])
        phases: dict[str, int] = {}

        def ring() -> None:
            for each in leaves:
                each.grad = None
            counted["bytes"] = 0
            output = F.scaled_dot_product_attention(*leaves, is_causal=True)
            phases["forward"] = counted["bytes"]
            output.backward(grad)
            phases["backward"] = counted["bytes"] - phases["forward"]

        ring()
        times = seconds(ring, 3)
    ratio = HEADS // GROUPS
    report.line(
        "ring_attention",
        length=length,
        heads=HEADS,
        groups=GROUPS,
        head_dim=DIM,
        split=spread(times),
        bytes_forward=phases["forward"],
        bytes_backward=phases["backward"],
        bytes_forward_without_repeated_heads=phases["forward"] // ratio,
        bytes_backward_without_repeated_heads=phases["backward"] // ratio,
    )


def model_of(context: int) -> Any:
    fields: dict[str, Any] = {"max_position_embeddings": context}
    if TINY:
        fields |= {"windows": 32, "local": 8}
    torch.manual_seed(0)
    config = preset("tiny" if TINY else "1.7b", **fields)
    with DEVICE:
        model = DynamaskForCausalLM(config)
    return model.train()


def sharded(model: Any, mesh: Any, *, checkpointing: bool = False, reduce: torch.dtype = torch.float32) -> Any:
    use_chunked_loss(model)
    policy = MixedPrecisionPolicy(param_dtype=DTYPE, reduce_dtype=reduce, cast_forward_inputs=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def training_speed(report: Report) -> None:
    """Tokens per second and GPU of the 1.7b preset's shape: FSDP2 over all GPUs against each GPU by itself.

    The baseline is the same code over a mesh of one GPU, run by all GPUs at the same time, so that both share the host
    alike. Batches and accumulation are those of a user's step. Gradients are summed in float32, as `dynamask train`
    does, or in bfloat16; the weights of the next layer are gathered ahead, or when its forward begins.
    """
    size = dist.get_world_size()
    grid = init_device_mesh(DEVICE.type, (size, 1), mesh_dim_names=("replicas", "alone"))
    together = init_device_mesh(DEVICE.type, (size,))
    base: dict[tuple[int, ...], float] = {}
    for mesh, reduce, ahead in (
        (grid["alone"], torch.float32, (False,)),
        (together, torch.float32, (True, False)),
        (together, torch.bfloat16, (True,)),
    ):
        model = sharded(model_of(256 if TINY else 32768), mesh, checkpointing=True, reduce=reduce)
        optimizer = adamw(model, learning_rate=1e-4, weight_decay=0.1)
        for prefetch in ahead:
            prefetch_layers(model, prefetch)
            for setting in TRAINING:
                if mesh.size() > 1 and (setting not in base or report.over()):
                    continue
                facts = {"sharded_over": mesh.size(), "reduce": str(reduce)[6:], "prefetch": prefetch}
                speed = _training_step(report, model, optimizer, mesh.size() > 1, setting, facts)
                if mesh.size() == 1:
                    base[setting] = speed
                else:
                    facts |= dict(zip(("batch", "accumulation", "context"), setting, strict=True))
                    report.line("training_scaling", **facts, share_of_one_gpu=speed / base[setting])
        del model, optimizer
        gc.collect()
        if not TINY:
            torch.cuda.empty_cache()


TRAINING = ((2, 1, 128), (1, 2, 256)) if TINY else ((4, 1, 8192), (1, 1, 8192), (1, 1, 32768))
"""Sequences of a GPU in a pass, passes of a step, tokens of a sequence."""


def prefetch_layers(model: Any, ahead: bool) -> None:
    """Let every layer gather the weights of the next one before it computes, or not."""
    layers = [*model.model.layers]
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following] if ahead else [])


def _training_step(
    report: Report, model: Any, optimizer: Any, several: bool, setting: tuple[int, ...], facts: dict[str, Any]
) -> float:
    batch, accumulation, context = setting
    repeats = 2 if TINY or accumulation > 1 else 3
    tokens = torch.randint(model.config.vocab_size, (batch, context), device=DEVICE)
    losses: list[Tensor] = []

    def step() -> None:
        for turn in range(accumulation):
            model.set_requires_gradient_sync(turn == accumulation - 1)
            loss = model(input_ids=tokens, labels=tokens).loss / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach() * accumulation)

    step()
    if not TINY:
        torch.cuda.reset_peak_memory_stats()
    times = seconds(step, repeats, together=several)
    speed = batch * accumulation * context / statistics.median(times)
    report.line(
        "training_step",
        preset="tiny" if TINY else "1.7b",
        parameters=sum(p.numel() for p in model.parameters()),
        **facts,
        context=context,
        batch=batch,
        accumulation=accumulation,
        step=spread(times),
        tokens_per_second_and_gpu=speed,
        peak_bytes=0 if TINY else torch.cuda.max_memory_allocated(),
        recomputes_layers=True,
        loss_first=float(losses[0]),
        loss_last=float(losses[-1]),
    )
    return speed


def split_model(report: Report) -> None:
    """One sequence of the 1.7b preset's shape over all GPUs: context parallelism and FSDP2 on the same processes."""
    size = dist.get_world_size()
    context, repeats = (256, 1) if TINY else (65536, 2)
    mesh = init_device_mesh(DEVICE.type, (size,))
    model = model_of(context)
    reference = copy.deepcopy(model) if TINY else None
    model = sharded(model, mesh, checkpointing=True)
    tokens = torch.randint(model.config.vocab_size, (1, context), device=DEVICE, generator=_seeded())
    batch = split_sequence(mesh, tokens)
    values: list[Tensor] = []

    def step() -> None:
        with context_parallel(mesh):
            output = model(**batch)
        (output.loss * size).backward()  # FSDP averages what the processes must sum
        values.append(output.row_losses.sum() / batch["num_items_in_batch"])
        model.zero_grad()

    step()
    if not TINY:
        torch.cuda.reset_peak_memory_stats()
    times = seconds(step, repeats)
    total = values[-1].clone()
    dist.all_reduce(total)
    expected = None
    if reference is not None:
        use_chunked_loss(reference)
        alone = reference(input_ids=tokens, labels=tokens)
        expected = float(alone.row_losses.sum() / alone.row_counts.sum())
        if abs(expected - float(total)) > (3e-3 if model.dtype == torch.bfloat16 or "--bf16" in sys.argv else 1e-4):
            raise AssertionError(f"loss {float(total)}, in one process {expected}")
    report.line(
        "split_model_step",
        context=context,
        step=spread(times),
        tokens_per_second_and_gpu=context / size / statistics.median(times),
        peak_bytes=0 if TINY else torch.cuda.max_memory_allocated(),
        loss=float(total),
        loss_in_one_process=expected,
        recomputes_layers=True,
    )


def tensor_parallel(report: Report) -> None:
    """A model that transformers splits by its plan against the whole one: logits, steps of AdamW, generated tokens."""
    size = dist.get_world_size()
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 2048}
    length = 96 if TINY else 1024
    torch.manual_seed(0)
    config = DynamaskConfig(**shape, windows=[[length // 8, length // 4] * 2] * 4, local=4, sinks=2)
    alone = DynamaskForCausalLM(config)
    with tempfile.TemporaryDirectory() as own:
        place: list[Any] = [own]
        dist.broadcast_object_list(place, 0)
        if dist.get_rank() == 0:
            alone.save_pretrained(place[0])
        dist.barrier()
        split: Any = DynamaskForCausalLM.from_pretrained(place[0], tp_plan="auto", dtype=torch.float32)
        dist.barrier()
    alone = alone.to(DEVICE)
    tokens = torch.randint(shape["vocab_size"], (2, length), device=DEVICE, generator=_seeded())
    with torch.no_grad():
        error = (split(input_ids=tokens).logits - alone(input_ids=tokens).logits).abs().max()
    asked = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    same = torch.equal(split.generate(tokens, **asked), alone.generate(tokens, **asked))
    split, optimizer, clip = _prepared_for_steps(split, size)
    losses = _losses_of_steps(split, optimizer, tokens, clip)
    plain = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    expected = _losses_of_steps(alone, plain, tokens, torch.nn.utils.clip_grad_norm_)
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    report.line(
        "tensor_parallel",
        length=length,
        logits_error=float(error),
        generated_equal=same,
        losses=losses,
        losses_of_one_process=expected,
        loss_error=worst,
        accelerate=not TINY,
    )


def _prepared_for_steps(model: Any, size: int) -> tuple[Any, Any, Callable[..., Any]]:
    """The model and an optimizer, prepared by accelerate, which splits nothing by tensors on CPUs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if TINY:
        return model, optimizer, lambda *_: None
    from accelerate import Accelerator
    from accelerate.utils import ParallelismConfig

    accelerator = Accelerator(parallelism_config=ParallelismConfig(tp_size=size))
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, accelerator.clip_grad_norm_


def _losses_of_steps(model: Any, optimizer: Any, tokens: Tensor, clip: Callable[..., Any]) -> list[float]:
    model.train()
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if not TINY:
            clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def _seeded() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(7)


PARTS: dict[str, Callable[[Report], None]] = {
    "exactness": exactness,
    "attention": attention_times,
    "ring": ring_attention,
    "training": training_speed,
    "split_model": split_model,
    "tensor_parallel": tensor_parallel,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no measurement after that")
    parser.add_argument("--tiny", action="store_true", help="gloo and small shapes, on a CPU")
    parser.add_argument("--bf16", action="store_true", help="with --tiny: in bfloat16, as on a GPU")
    arguments = parser.parse_args()
    if not TINY:
        torch.cuda.set_device(DEVICE)
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo" if TINY else "nccl", timeout=wait, device_id=None if TINY else DEVICE)
    report = Report(arguments.out, arguments.seconds)
    for name in arguments.parts:
        if report.over():
            print(f"# {name}: no time left", flush=True)
            continue
        with report.part(name):
            PARTS[name](report)
        if name == "exactness" and report.failed:
            break
    dist.destroy_process_group()
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
