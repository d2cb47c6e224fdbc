"""Times of converted models on one GPU: decoding, prefill and training, against the dense model in the same run.

    PYTHONPATH=.:lab python lab/scripts/decode_gpu.py --out OUT [--seconds 150] [--parts eager decode prefill train]
    PYTHONPATH=.:lab python lab/scripts/decode_gpu.py --compile qwen3-0.6b    # fills Triton's cache, beside others

Weights are random, in the shapes of SmolLM2-135M, Qwen3-0.6B and Qwen3-1.7B; caches that long contexts leave are
filled with random keys. Windows per head are drawn log-normally around the budget, the same for every run. A check of
cached against uncached logits, and of a training step against the CPU, comes first: nothing is timed if it fails.
`OUT/decode-rows.jsonl` gets a line per figure as it comes, the output a short table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from model_sizes import SMOLLM2_135M
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from dynamask import BoundedCache, convert
from dynamask.cache import BoundedLayer, cache_bytes
from dynamask.convert import models as converted
from dynamask.convert.distillation_loss import losses_of_hidden
from dynamask.convert.teacher import teacher_states
from dynamask.models import cuda_graph
from dynamask.models.cuda_graph import StepGraph
from dynamask.ops.ragged_decode import ragged_decode_reference
from dynamask.training import AtomicTrainer, recorded_gradients
from dynamask.training.loss import use_chunked_loss
from dynamask.training.recorded_gradients import RecordedGradients
from dynamask_lab.benchmarks.gpu.timing import graph_milliseconds
from dynamask_lab.benchmarks.model import filled_cache

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LOCAL, SINKS = 128, 4
COUNTED = ("LaunchKernel", "MemcpyAsync", "MemsetAsync", "GraphLaunch")
"""Parts of the names of calls that the host makes once per piece of work on the device."""


class Shape(NamedTuple):
    """A named size of a model."""

    family: str
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    dim: int
    vocabulary: int


SHAPES = {
    "smollm2-135m": Shape(
        family="llama",
        hidden=SMOLLM2_135M["hidden_size"],
        inner=SMOLLM2_135M["intermediate_size"],
        layers=SMOLLM2_135M["num_hidden_layers"],
        heads=SMOLLM2_135M["num_attention_heads"],
        groups=SMOLLM2_135M["num_key_value_heads"],
        dim=SMOLLM2_135M["hidden_size"] // SMOLLM2_135M["num_attention_heads"],
        vocabulary=SMOLLM2_135M["vocab_size"],
    ),
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 128, 151936),
    "qwen3-1.7b": Shape("qwen3", 2048, 6144, 28, 16, 8, 128, 151936),
    "tiny": Shape("qwen3", 64, 96, 2, 4, 2, 32, 256),
}


def head_windows(shape: Shape, budget: int, most: int) -> list[list[int]]:
    """Windows of every layer and head, log-normal around the budget, none below local + sinks or above `most`."""
    draw = torch.randn(shape.layers, shape.groups, generator=torch.Generator().manual_seed(0)).exp()
    least = min(LOCAL + SINKS, budget)
    low, high = 0.0, 64.0 * most
    for _ in range(60):  # the factor that meets the budget
        factor = (low + high) / 2
        windows = (draw * factor).round().clamp(least, most)
        low, high = (factor, high) if windows.mean() < budget else (low, factor)
    return windows.int().tolist()  # type: ignore[no-any-return]


def models(name: str, budget: int, most: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """The dense model, and the converted one that shares its weights and has random ranks."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = kinds[shape.family]
    config = config_class(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    with torch.device(DEVICE):
        dense = model_class(config).to(dtype).eval()
    local = min(LOCAL, budget // 4)
    sparse = convert.upcycle(dense, budget, local=local, sinks=SINKS).eval()
    for layer in sparse.model.layers:
        torch.nn.init.normal_(layer.self_attn.rank_predictor.down.weight)
    sparse.config.trained_ranks = True  # random ranks, which spread the kept keys over the text
    convert.set_windows(sparse, head_windows(SHAPES[name], budget, most))
    return dense, sparse


@torch.no_grad()
def narrow_check() -> None:
    """Compare the written-out decoding step with transformers' modules in bfloat16.

    Raises:
        SystemExit: they differ by more than rounding, or the step was not taken.
    """
    _, sparse = models("tiny", 96, 220)
    tokens = torch.randint(sparse.config.vocab_size, (3, 260), device=DEVICE)
    found, served = [], []
    own = converted.decode_step

    def noted(*arguments: Any) -> Any:
        logits = own(*arguments)
        served.append(logits is not None)
        return logits

    try:
        for step in (noted, None):
            converted.decode_step = step  # type: ignore[assignment]
            cache = BoundedCache(sparse.config, graphs=False)
            parts = [sparse(tokens[:, :220], past_key_values=cache).logits]
            parts += [sparse(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(220, 260)]
            found.append(torch.cat(parts[1:], 1).float())
    finally:
        converted.decode_step = own
    error = ((found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)).median().item()
    report({"part": "check", "what": "written-out step, bfloat16", "served": sum(served), "median_error": error})
    if GPU and (not all(served) or not error < 0.03):
        raise SystemExit(f"the written-out step differs by {error:.1%} (served {sum(served)} of {len(served)})")


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], repeats: int, warm: int = 1) -> float:
    """Median wall time of a call, the device's work included."""
    taken = []
    for index in range(warm + repeats):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        if index >= warm:
            taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def seconds_of_step(step: Callable[[], Any], steps: int, bursts: int = 3, warm: int = 0) -> float:
    """Median wall time of a step in bursts of so many, the device idle before and after each burst."""

    def burst() -> None:
        for _ in range(steps):
            step()

    return seconds_of(burst, bursts, warm) / steps


def host_seconds(run: Callable[[], Any]) -> float:
    """How long a call keeps the host, the device idle before it; it waits where the device's queue is full."""
    synchronize()
    began = time.perf_counter()
    run()
    taken = time.perf_counter() - began
    synchronize()
    return taken


def flash() -> Any:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if GPU else contextlib.nullcontext()


def peer_backends() -> list[tuple[str, Any]]:
    """Dense attention of torch: FlashAttention 2, and cuDNN's."""
    return [("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)] if GPU else []


UNMASKED = "dense_unmasked"


def dense_unmasked(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Dense attention of one token to all keys: transformers makes no mask for it, so that it is at its best."""
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return output.transpose(1, 2), None


AttentionInterface.register(UNMASKED, dense_unmasked)


# Correct first.


def check(training: bool) -> None:
    """Compare cached with uncached logits and, with `training`, a training step with the CPU's.

    Raises:
        SystemExit: they differ.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in ("tiny",):
        dense, sparse = models(name, 96, 220, torch.float32)
        tokens = torch.randint(dense.config.vocab_size, (2, 300), device=DEVICE)
        with torch.no_grad():
            whole = sparse(tokens, use_cache=False).logits
            for graphs in (False, True):
                cache = BoundedCache(sparse.config, graphs=graphs)
                parts = [sparse(tokens[:, :220], past_key_values=cache).logits]
                parts += [sparse(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(220, 300)]
                wrong = ((torch.cat(parts, 1) - whole).abs().amax(-1) > 1e-3).float().mean().item()
                # Ranks that tie but for rounding may fall on two sides of a step of their grid.
                recorded = cache in cuda_graph._GRAPHS
                row = {"what": "cached against uncached", "graphs": graphs, "recorded": recorded, "differ": wrong}
                report({"part": "check"} | row)
                if wrong > 0.02:
                    raise SystemExit(f"cached logits differ from uncached ones at {wrong:.1%} of the positions")
                if graphs and GPU and not recorded:
                    raise SystemExit(f"no graph was recorded: {cuda_graph.reason_against(sparse)}")
        narrow_check()
        if not training:
            continue
        found = []
        use_chunked_loss(sparse)
        for place, compiled in ((DEVICE, True), (DEVICE, False), (torch.device("cpu"), False)):
            sparse.to(place).train()
            layers = convert.compiled_layers(sparse) if compiled else None
            loss = sparse(input_ids=tokens.to(place), labels=tokens.to(place), use_cache=False).loss
            loss.backward()
            norm = sum(float(p.grad.double().square().sum()) for p in sparse.parameters() if p.grad is not None) ** 0.5
            found.append((loss.item(), norm))
            sparse.zero_grad()
            if layers is not None:
                report(
                    {"part": "check", "what": "compiled layers", "failure": layers.failure, "kinds": len(layers._kinds)}
                )
                layers.remove()
        row = {"what": "training step", "compiled": found[0], "eager": found[1], "cpu": found[2]}
        report({"part": "check"} | row)
        expected, expected_norm = found[2]
        for loss, norm in found[:2]:
            if abs(loss - expected) > 1e-3 * expected or abs(norm - expected_norm) > 1e-2 * expected_norm:
                raise SystemExit(f"a training step differs from the CPU's: {found}")


# (b) eager decoding.


@torch.no_grad()
def eager(name: str, batch: int, prompt: int, steps: int, budget: int) -> Iterator[dict[str, Any]]:
    """Tokens per second of decoding after a prompt, and the launches of a token."""
    dense, sparse = models(name, budget, prompt)
    tokens = torch.randint(dense.config.vocab_size, (batch, prompt), device=DEVICE)
    forms: list[tuple[str, Any, Callable[[], Any]]] = [
        ("dense, dynamic cache, eager", dense, lambda: DynamicCache(config=dense.config)),
        ("converted, eager", sparse, lambda: BoundedCache(sparse.config, graphs=False)),
        ("converted, graph", sparse, lambda: BoundedCache(sparse.config)),
    ]
    for form, model, make in forms:
        cache = make()
        token = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

        def step(token: Tensor, model: Any = model, cache: Any = cache) -> Tensor:
            return model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)  # type: ignore[no-any-return]

        for _ in range(5):
            token = step(token)
        again = functools.partial(step, token)
        seconds = seconds_of_step(again, steps, bursts=1)
        row = {"part": "eager", "model": name, "B": batch, "prompt": prompt, "budget": budget, "form": form}
        yield row | {"tokens_per_s": batch / seconds, "ms": 1e3 * seconds, "launches": launches(again)}


def launches(run: Callable[[], Any]) -> int | None:
    """How many kernels and copies the host launches in a call; a graph counts as one."""
    if not GPU:
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        synchronize()
    return sum(e.count for e in profiled.key_averages() if any(part in e.key for part in COUNTED))


# (c) decoding from a long context.


@torch.no_grad()
def layer_row(batch: int, context: int, budget: int) -> Iterator[dict[str, Any]]:
    """Insert a key and attend, one layer of Qwen3-0.6B's shape: windows that differ against one of the same sum."""
    shape = SHAPES["qwen3-0.6b" if GPU else "tiny"]
    spread = head_windows(shape, budget, context)
    # The layer whose heads differ most.
    uneven = max(spread, key=lambda windows: max(windows) / sum(windows))
    mean = sum(uneven) // len(uneven)
    row: dict[str, Any] = {"part": "layer", "B": batch, "context": context, "windows": uneven, "mean": mean}
    for form, windows in (("ragged", tuple(uneven)), ("even", (mean,) * len(uneven))):
        layer = BoundedLayer(windows, local=min(LOCAL, min(windows) // 2), sinks=SINKS)
        slots = min(context, max(windows))

        def draw(tokens: int, heads: int) -> Tensor:
            return torch.randn(batch, heads, tokens, shape.dim, device=DEVICE, dtype=torch.bfloat16)

        ranks = torch.randn(batch, shape.groups, slots, device=DEVICE)
        layer.extend(draw(slots, shape.groups), draw(slots, shape.groups), ranks, None)
        layer.skip(context - slots)
        query, key, value = draw(1, shape.heads), draw(1, shape.groups), draw(1, shape.groups)
        rank = torch.randn(batch, shape.groups, 1, device=DEVICE)

        def step(layer: Any = layer, inputs: Any = (query, key, value, rank)) -> Tensor:
            return layer.attend(*inputs)  # type: ignore[no-any-return]

        found = step()
        pools, offsets = (layer.keys.float(), layer.values.float()), layer.offsets
        expected = ragged_decode_reference(query.float(), *pools, layer.positions >= 0, offsets, None, shape.dim**-0.5)
        error = ((found.float() - expected).norm() / expected.norm()).item()
        row[f"{form}_error"] = error
        if not error < 2e-2:
            raise SystemExit(f"attention from the {form} cache is off by {error:.2%}")
        row[form] = graph_milliseconds(step) if GPU else 1e3 * seconds_of(step, 3)
    yield row | {"ragged_over_even": row["ragged"] / row["even"]}


@torch.no_grad()
def decode(
    name: str, batch: int, context: int, budget: int, steps: int, only: tuple[str, ...] = ("",)
) -> Iterator[dict[str, Any]]:
    """Tokens per second at a long context: dense caches, the ragged cache, an even cache of the same bytes.

    `only` names the forms by parts of their names; the dense model's compiled parts run alone by it, because a
    recording that a compilation interrupts leaves the process unable to record.
    """
    dense, sparse = models(name, budget, context)
    uneven = sparse.config.windows
    forms = [
        ("ragged, graph", "bounded", None),
        ("dense, keys in place, graph, flash", "fixed", SDPBackend.FLASH_ATTENTION),
        ("even, graph", "bounded", None),
        ("dense, keys in place, graph, cudnn", "fixed", SDPBackend.CUDNN_ATTENTION),
        ("dense, keys in place, compiled norms and MLP, graph, flash", "fixed-compiled", SDPBackend.FLASH_ATTENTION),
        ("ragged, eager", "bounded-eager", None),
        ("dense, dynamic cache, eager", "dynamic", SDPBackend.FLASH_ATTENTION),
    ]
    for form, kind, backend in forms:
        if not any(part in form for part in only) or ("compiled" in form and "compiled" not in only):
            continue
        windows = budget if form.startswith("even") else uneven
        convert.set_windows(sparse, windows)
        row: dict[str, Any] = {"part": "decode", "model": name, "B": batch, "context": context, "form": form}
        row["budget"] = budget
        dense.config._attn_implementation = UNMASKED if kind.startswith("fixed") else "sdpa"
        chosen = contextlib.nullcontext() if backend is None or not GPU else sdpa_kernel(backend)
        try:
            with chosen, compiled_for_decoding(dense) if kind == "fixed-compiled" else contextlib.nullcontext():
                model = sparse if kind.startswith("bounded") else dense
                figures = decode_form(model, sparse.config, kind.removesuffix("-compiled"), row, steps)
        except Exception as error:  # out of memory, a backend that refuses, whatever a compiler raises
            figures = {"error": f"{type(error).__name__}: {error}"[:120]}
        yield row | figures
        free()
    convert.set_windows(sparse, uneven)


@contextlib.contextmanager
def compiled_for_decoding(model: Any) -> Iterator[None]:
    """Let the norms, the rotary embedding and the MLPs of a dense model run compiled.

    Whole layers would be compiled one by one, because each reads a layer of the cache of its own.
    """
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    layer = model.model.layers[0]
    module = sys.modules[type(layer).__module__]
    compiled = functools.partial(torch.compile, dynamic=False)
    places: list[tuple[Any, str]] = [(type(layer.mlp), "forward"), (type(layer.input_layernorm), "forward")]
    places.append((module, "apply_rotary_pos_emb"))
    before = [getattr(place, name) for place, name in places]
    for (place, name), function in zip(places, before, strict=True):
        setattr(place, name, compiled(function))
    try:
        yield
    finally:
        for (place, name), function in zip(places, before, strict=True):
            setattr(place, name, function)


def decode_form(model: Any, config: Any, kind: str, row: dict[str, Any], steps: int) -> dict[str, Any]:
    """Time `steps` tokens of a model over a cache that is filled with random keys."""
    batch, context = row["B"], row["context"]
    held = filled_cache(config, kind, context, batch, 0)
    token = torch.randint(config.vocab_size, (batch, 1), device=DEVICE)
    place = torch.full_like(token, context - 1)
    graph: StepGraph | None = None

    def step(token: Tensor) -> Tensor:
        if graph is not None:
            return graph.replay(token, place).argmax(-1)
        return model(token, past_key_values=held, use_cache=True).logits.argmax(-1)  # type: ignore[no-any-return]

    for _ in range(5):
        token = step(token)
    if kind == "fixed" and GPU:
        graph = StepGraph(model, held, token, place)
        token = step(token)
    again = functools.partial(step, token)
    seconds = seconds_of_step(again, steps)
    recorded = held in cuda_graph._GRAPHS
    figures = {"tokens_per_s": batch / seconds, "ms": 1e3 * seconds, "cache_mib": cache_bytes(held) / 2**20}
    figures["ms_in_long_bursts"] = 1e3 * seconds_of_step(again, 4 * steps)
    if kind == "bounded" and GPU and not recorded:
        raise RuntimeError("no graph was recorded")
    replayed = graph if graph is not None else cuda_graph._GRAPHS.get(held)
    if replayed is not None:  # without the host
        figures["ms_on_device"] = 1e3 * seconds_of_step(replayed.graph.replay, steps, warm=1)
    return figures


# (d) prefill.


@torch.no_grad()
def prefill(name: str, length: int, budget: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of reading a text into an empty cache."""
    dense, sparse = models(name, budget, length)
    tokens = torch.randint(dense.config.vocab_size, (1, length), device=DEVICE)
    row = {"part": "prefill", "model": name, "N": length, "budget": budget}
    for form, backend in peer_backends():
        with sdpa_kernel(backend):
            try:
                taken = seconds_of(lambda: dense(tokens, use_cache=True, logits_to_keep=1), 2)
            except RuntimeError as error:
                yield row | {"form": f"dense, {form}", "error": str(error)[:80]}
                continue
        yield row | {"form": f"dense, {form}", "ms": 1e3 * taken}
        if form == "cudnn":  # compiled layers do not serve a dynamic cache
            with sdpa_kernel(backend), convert.compiled_layers(dense):
                taken = seconds_of(lambda: dense(tokens, use_cache=False, logits_to_keep=1), 2)
            yield row | {"form": f"dense, {form}, compiled, no cache", "ms": 1e3 * taken}
    expected = sparse(tokens, use_cache=True, logits_to_keep=1).logits.float()
    for form in ("converted, compiled, recorded", "converted, recorded", "converted, compiled", "converted"):
        figures: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            layers = stack.enter_context(convert.compiled_layers(sparse)) if "compiled" in form else None
            prompts = stack.enter_context(convert.recorded_prompts(sparse)) if "recorded" in form else None
            for _ in range(2 if prompts is None else 3):
                found = sparse(tokens, use_cache=True, logits_to_keep=1).logits.float()
            taken = seconds_of(lambda: sparse(tokens, use_cache=True, logits_to_keep=1), 5, warm=0)
            host = host_seconds(lambda: sparse(tokens, use_cache=True, logits_to_keep=1))
            if prompts is not None:
                figures["reason"] = prompts.reason
                graph = next(iter(prompts._graphs.values()), None)
                if graph is not None:
                    figures["ms_on_device"] = 1e3 * seconds_of(graph.graph.replay, 3)
            figures["failure"] = None if layers is None else layers.failure
        apart = float((found - expected).norm() / expected.norm())
        yield row | {"form": form, "ms": 1e3 * taken, "host_ms": 1e3 * host, "error": apart} | figures
        free()


# (e) training.


def loss_against(teacher: Any, dense: Any, forward: Callable[..., Any], model: Any, ids: Tensor) -> Tensor:
    """The loss of distillation of the dense or the converted model, the ranks' included.

    Args:
        teacher: a dense model.
        dense: the dense student.
        forward: of the converted student, as it was before `use_chunked_loss`.
        model: the student of the two whose loss is wanted.
        ids: (B, N) token ids.
    """
    given = teacher_states(teacher, ids, None)
    options: dict[str, Any] = {"temperature": 1.0, "chunk": 2048}

    def loss_of(hidden: Tensor, facts: Any) -> Tensor:
        loss, more = losses_of_hidden(model, teacher, hidden, given, facts and facts.losses, None, **options)
        return loss if more is None else loss + more

    if model is dense:
        return loss_of(dense.get_decoder()(ids, use_cache=False).last_hidden_state, None)
    return forward(input_ids=ids, use_cache=False, loss_of_hidden=loss_of).loss  # type: ignore[no-any-return]


def train(
    name: str,
    length: int,
    budget: int,
    repeats: int,
    distil: bool,
    compiled: bool = True,
    batch: int = 1,
    recorded: bool = False,
) -> Iterator[dict[str, Any]]:
    """Milliseconds of forward and backward; checkpointed layers from 32K on, in every form.

    With `recorded` they run as CUDA graphs instead. With `compiled` the decoder layers of all models, the teacher's
    too, run compiled.
    """
    dense, sparse = models(name, budget, length)
    for model in (dense, sparse):
        model.train()
        if length >= 32768:
            how = {"use_reentrant": False, "preserve_rng_state": not recorded}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    tokens = torch.randint(dense.config.vocab_size, (batch, length), device=DEVICE)
    row = {"part": "train", "model": name, "B": batch, "N": length, "budget": budget}
    row |= {"checkpointed": length >= 32768, "compiled": compiled}
    teacher, _ = models(name, budget, length) if distil else (None, None)
    layers = {id(each): convert.compiled_layers(each) for each in (dense, sparse, teacher) if compiled and each}
    use_chunked_loss(dense)
    plain = sparse.forward
    use_chunked_loss(sparse)

    def step(model: Any, ranks: bool) -> None:
        sparse.config.rank_loss_weight = 1.0 if ranks else 0.0
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def training_loss(model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

    distillation_loss = functools.partial(loss_against, teacher, dense, plain)

    def distillation(model: Any, ranks: bool) -> None:
        sparse.config.rank_loss_weight = 1.0 if ranks else 0.0
        distillation_loss(model, tokens).backward()
        model.zero_grad(set_to_none=True)

    if recorded:
        losses = [("train", training_loss), ("distil", distillation_loss)][: 2 if distil else 1]
        for ranks, (kind, loss_of) in itertools.product((False, True) if repeats else (False,), losses):
            for found in recorded_steps(dense, sparse, tokens, repeats, loss_of, ranks):
                yield row | {"kind": kind} | found
        return
    kinds: list[tuple[str, Callable[[Any, bool], None]]] = [("train", step)]
    if distil:
        kinds.append(("distil", distillation))
    for kind, run in kinds:
        forms = [("dense, flash", dense, False), ("converted", sparse, False)]
        if length <= 32768:
            forms.append(("converted, ranks learn too", sparse, True))
        for form, model, ranks in forms:
            try:
                began = time.perf_counter()
                with flash():
                    run(model, ranks)
                    synchronize()
                    first = time.perf_counter() - began
                    taken = seconds_of(functools.partial(run, model, ranks), repeats)
                    host = host_seconds(functools.partial(run, model, ranks))
                figures: dict[str, Any] = {"ms": 1e3 * taken, "tokens_per_s": batch * length / taken}
                figures |= {"first_s": first, "host_ms": 1e3 * host}
                if compiled and layers[id(model)].failure:
                    figures["failure"] = layers[id(model)].failure
                yield row | {"kind": kind, "form": form} | figures
            except torch.OutOfMemoryError:
                yield row | {"kind": kind, "form": form, "error": "out of memory"}
            free()


def recorded_steps(
    dense: Any, sparse: Any, tokens: Tensor, repeats: int, loss_of: Callable[[Any, Tensor], Tensor], learns: bool
) -> Iterator[dict[str, Any]]:
    """Forward and backward as a CUDA graph, after a comparison with the step as it is; the dense model's first.

    With `learns` the converted model alone, with the loss of its ranks.
    """
    if not GPU:
        return
    forms = [("converted", sparse, 1.0)] if learns else [("dense, flash", dense, 0.0), ("converted", sparse, 0.0)]
    for form, model, ranks in forms:
        sparse.config.rank_loss_weight = ranks
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def norm(parameters: Any = parameters) -> Tensor:
            grads = [p.grad.float().norm() for p in parameters if p.grad is not None]
            return torch.stack(grads).norm()

        name = f"{form}{', ranks learn too' if ranks else ''}, recorded"
        try:
            with flash():
                began = time.perf_counter()
                loss = loss_of(model, tokens)
                loss.backward()
                expected = (loss.item(), norm().item())
                first = time.perf_counter() - began
                model.zero_grad(set_to_none=True)
                del loss

                def own(loss_of: Any = loss_of, model: Any = model) -> None:
                    loss_of(model, tokens).backward()
                    model.zero_grad(set_to_none=True)

                unrecorded = seconds_of(own, 1, warm=0)
                recorded_gradients._WARM_UP = 1  # the passes above have compiled the kernels
                recorded = RecordedGradients(functools.partial(loss_of, model), parameters, tokens)
                found = (recorded(tokens).item(), norm().item())
                model.zero_grad(set_to_none=True)

                def run(recorded: Any = recorded, model: Any = model) -> None:
                    recorded(tokens)
                    model.zero_grad(set_to_none=True)

                taken = seconds_of(run, 2 * repeats + 1, warm=0)
                host = host_seconds(run) if repeats else None
            figures = {"ms": 1e3 * taken, "tokens_per_s": tokens.numel() / taken}
            figures |= {} if host is None else {"host_ms": 1e3 * host}
            figures |= {"ms_unrecorded": 1e3 * unrecorded, "first_s": first}
            yield {"form": name} | figures | {"loss_and_norm": found, "expected": expected}
        except (RuntimeError, ValueError) as error:
            yield {"form": name, "error": f"{type(error).__name__}: {error}"[:400]}
        finally:
            model.zero_grad(set_to_none=True)
        recorded = None  # type: ignore[assignment]
        run = None  # type: ignore[assignment]
        free()


def distillation(
    name: str,
    batch: int,
    length: int,
    budget: int,
    steps: int,
    forms: tuple[bool, ...] = (True, False),
    recorded: bool = False,
) -> Iterator[dict[str, Any]]:
    """Tokens per second of `dynamask.convert.distill`, optimizer included, after the first 5 steps.

    Args:
        name, batch, length, budget: of the model and its blocks.
        steps: at least 12.
        forms: whether layers run compiled, one run each.
        recorded: whether forward and backward are a CUDA graph.
    """
    for compiled in forms:
        _, sparse = models(name, budget, length)
        teacher, _ = models(name, budget, length)
        sparse.requires_grad_(True)
        blocks = [torch.randint(sparse.config.vocab_size, (batch, length)) for _ in range(4)]
        times: list[tuple[int, float]] = []
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            convert.distill(
                sparse,
                teacher,
                blocks,
                steps=steps if compiled else steps // 2,
                compiled=compiled,
                recorded=recorded,
                progress=lambda p, times=times: times.append((p.step, time.perf_counter())),  # type: ignore[misc]
            )
        (first, start), (last, end) = times[1], times[-1]
        row = {"part": "distillation", "model": name, "B": batch, "N": length, "budget": budget, "compiled": compiled}
        row |= {"recorded": True} if recorded else {}
        row |= {"tokens_per_s": (last - first) * batch * length / (end - start), "steps": last - first}
        row |= {"first_steps_s": start - began, "ms": 1e3 * (end - start) / (last - first)}
        yield row | {"said": [str(each.message)[:150] for each in said if "slower" in str(each.message)]}
        free()


class _Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random texts of one length."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        self.tokens = torch.randint(vocabulary, (rows, length))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class _Times(transformers.TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.ends.append(time.perf_counter())


def trainer(name: str, batch: int, length: int, budget: int, steps: int) -> Iterator[dict[str, Any]]:
    """Tokens per second of `AtomicTrainer`, optimizer included: float32 weights, bfloat16 arithmetic, layers compiled.

    The losses of recorded and other steps stand beside each other.
    """
    forms = [("converted, ranks learn too", 1.0), ("dense, flash", 0.0)]
    for form, weight in forms:
        for recorded in (True, False):
            dense, sparse = models(name, budget, length, torch.float32)
            model = dense if form.startswith("dense") else sparse
            model.config.rank_loss_weight = weight if model is sparse else None
            torch.manual_seed(1)
            data, times = _Texts(batch * steps, length, model.config.vocab_size), _Times()
            with tempfile.TemporaryDirectory() as folder:
                arguments = transformers.TrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=batch,
                    max_steps=steps,
                    learning_rate=1e-5,
                    bf16=GPU,
                    use_cpu=not GPU,
                    report_to=[],
                    save_strategy="no",
                    disable_tqdm=True,
                    logging_steps=1,
                )
                fields: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": data}
                run = AtomicTrainer(**fields, callbacks=[times], recorded=recorded)
                began = time.perf_counter()
                with convert.compiled_layers(model), flash():
                    run.train()
            warm = steps // 2
            taken = (times.ends[-1] - times.ends[warm - 1]) / (steps - warm)
            losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
            row = {"part": "trainer", "model": name, "B": batch, "N": length, "budget": budget, "form": form}
            row |= {"recorded": recorded, "reason": run._steps.reason if recorded else None, "ms": 1e3 * taken}
            row |= {"tokens_per_s": batch * length / taken, "first_s": times.ends[0] - began, "losses": losses[-3:]}
            yield row
            del dense, sparse, model, run
            free()


_KERNELS: dict[str, list[float]] = {}
"""Name -> how often a kernel was compiled here, how often it was found compiled, seconds of both."""


def count_kernels() -> None:
    """Let Triton report what it compiles into `_KERNELS`."""
    from triton import knobs

    def listener(*, src: Any, times: Any, cache_hit: bool, **facts: Any) -> None:
        row = _KERNELS.setdefault(getattr(src, "name", "?"), [0, 0, 0.0])
        row[int(cache_hit)] += 1
        row[2] += times.total / 1e6

    knobs.compilation.listener = listener


def free() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


_OUT: list[Path] = []
_BEGAN = time.perf_counter()
_FACTS: dict[str, Any] = {}


def report(row: dict[str, Any]) -> None:
    """Write a row and print it."""
    with (_OUT[0] / "decode-rows.jsonl").open("a") as file:
        file.write(json.dumps(row | {"at_s": round(time.perf_counter() - _BEGAN, 1)} | _FACTS) + "\n")
    shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "part"]
    print(f"{row['part']}: " + " | ".join(shown), flush=True)


PEERS = ("ragged, graph", "graph, flash")
"""The two forms of decoding whose rates the goals compare."""


def jobs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed, in the order of importance within each part."""
    if not GPU:  # every line of code, nothing to learn
        yield "eager", lambda: eager("tiny", 1, 150, 3, 64)
        yield "layer", lambda: layer_row(2, 300, 64)
        yield "decode", lambda: decode("tiny", 2, 300, 64, 3)
        yield "prefill", lambda: prefill("tiny", 300, 64)
        yield "train", lambda: train("tiny", 300, 64, 1, True)
        yield "distillation", lambda: distillation("tiny", 2, 200, 64, 24)
        yield "trainer", lambda: trainer("tiny", 1, 200, 64, 4)
        return
    small, medium, large = list(SHAPES)[:3]
    for name in (small, medium):
        yield "recorded", functools.partial(train, name, 8192, 512, 3, name == small, recorded=True)
        if name == small:
            yield "recorded", functools.partial(distillation, small, 4, 8192, 512, 40, (True,), True)
    yield "decode-graph", functools.partial(decode, small, 32, 32768, 2048, 16, PEERS)
    yield "decode-graph", functools.partial(decode, small, 1, 32768, 2048, 32, PEERS)
    yield "decode-graph", functools.partial(decode, medium, 1, 32768, 2048, 32, PEERS)
    yield "prefill", functools.partial(prefill, small, 32768, 2048)
    yield "prefill-medium", functools.partial(prefill, medium, 32768, 2048)
    yield "recorded-long", functools.partial(train, small, 32768, 2048, 1, True, recorded=True)
    yield "medium", functools.partial(train, medium, 8192, 512, 2, False, recorded=True)
    yield "medium", functools.partial(train, medium, 32768, 2048, 0, False, recorded=True)
    yield "large", functools.partial(train, large, 8192, 512, 1, False, recorded=True)
    yield "large", functools.partial(train, large, 32768, 2048, 0, False, recorded=True)
    yield "long", functools.partial(train, small, 65536, 4096, 0, False, recorded=True)
    yield "recorded-batch", functools.partial(train, small, 8192, 512, 2, False, True, 4, True)
    yield "trainer", functools.partial(trainer, small, 1, 8192, 512, 20)
    yield "long-medium", functools.partial(train, medium, 65536, 4096, 0, False, recorded=True)
    yield "decode", functools.partial(decode, small, 32, 32768, 2048, 16)
    yield "decode", functools.partial(decode, small, 1, 32768, 2048, 32)
    yield "train", functools.partial(train, small, 8192, 512, 2, False, True, 4)
    yield "decode", functools.partial(decode, medium, 1, 32768, 2048, 32)
    yield "train", functools.partial(train, small, 8192, 512, 3, True)
    yield "train", functools.partial(train, medium, 8192, 512, 3, True)
    yield "train", functools.partial(train, large, 8192, 512, 2, True)
    yield "train", functools.partial(train, medium, 8192, 512, 2, False, True, 4)
    yield "train", functools.partial(train, medium, 32768, 2048, 1, True)
    yield "decode-compiled", functools.partial(decode, small, 1, 32768, 2048, 32, ("compiled",))
    yield "decode-compiled", functools.partial(decode, small, 32, 32768, 2048, 16, ("compiled",))
    yield "decode-compiled", functools.partial(decode, medium, 1, 32768, 2048, 32, ("compiled",))
    yield "distillation", functools.partial(distillation, small, 4, 8192, 512, 40)
    yield "batches", functools.partial(distillation, small, 4, 8192, 512, 60, (True,), True)
    yield "batches", functools.partial(distillation, small, 8, 8192, 512, 20, (True,))
    yield "batches", functools.partial(distillation, small, 8, 8192, 512, 30, (True,), True)
    yield "train", functools.partial(train, small, 32768, 2048, 1, True)
    yield "decode", functools.partial(decode, medium, 16, 32768, 2048, 16)
    yield "decode", functools.partial(decode, large, 1, 32768, 2048, 24)
    yield "decode", functools.partial(decode, small, 64, 32768, 2048, 16)
    yield "eager", functools.partial(eager, small, 1, 2048, 24, 512)
    yield "eager", functools.partial(eager, medium, 1, 2048, 24, 512)
    for batch in (1, 4, 16, 64):
        yield "layer", functools.partial(layer_row, batch, 32768, 2048)


def compile_kernels(name: str) -> None:
    """Run everything once on a model of one layer, so that a later process finds the kernels compiled."""
    SHAPES[name] = SHAPES[name]._replace(layers=1)
    length, budget, context = (8192, 512, 32768) if GPU else (300, 64, 300)
    for rows in (
        train(name, length, budget, 1, True),
        prefill(name, length, budget),
        eager(name, 1, length // 4, 2, budget),
        decode(name, 1, context, 4 * budget, 2),
        distillation(name, 4 if GPU else 1, length, budget, 12, (True,)),
    ):
        for _ in rows:
            free()


def main() -> int:
    """Check, then time what fits into the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of decode-rows.jsonl")
    parser.add_argument("--compile", choices=list(SHAPES), help="compile what this shape needs, and time nothing")
    parser.add_argument("--parts", nargs="+", default=["layer", "eager", "decode", "prefill", "train", "distillation"])
    parser.add_argument("--seconds", type=float, default=150.0, help="begin nothing after this long")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many of the first jobs of these parts")
    parser.add_argument("--wait-for", type=Path, help="time nothing before this file exists, for at most 90 s")
    parser.add_argument("--unchecked", action="store_true", help="do not compare cached with uncached first")
    parser.add_argument("--one-layer", action="store_true", help="models of one layer: to fill the compilers' caches")
    parser.add_argument("--kept", type=Path, help="lines of decode_sweep_gpu.py: run with the changes that it kept")
    parser.add_argument("--commit", help="of the code, where there is no repository")
    arguments = parser.parse_args()
    began = time.perf_counter()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="the ranks of this")
    if arguments.compile:
        compile_kernels(arguments.compile)
        return 0
    if arguments.one_layer:
        if GPU:  # what is timed beside it needs the rest
            torch.cuda.set_per_process_memory_fraction(0.2)
        SHAPES.update({name: shape._replace(layers=1) for name, shape in SHAPES.items()})
    arguments.out.mkdir(parents=True, exist_ok=True)
    _OUT.append(arguments.out)
    if arguments.kept and arguments.kept.exists():
        from decode_sweep_gpu import put

        lines = [json.loads(line) for line in arguments.kept.read_text().splitlines()]
        kept = {name: value for line in lines if line.get("kept") for name, value in line["changed"].items()}
        put(kept)
        _FACTS.update(settings=kept)
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if GPU else "cpu"
    _FACTS.update(device=device, torch=torch.__version__, transformers=transformers.__version__)
    _FACTS.update(commit=arguments.commit or found)
    print(_FACTS, flush=True)
    if GPU:
        count_kernels()
    if arguments.parts != ["decode-compiled"] and not arguments.unchecked:
        check(bool({"train", "distillation"} & {*arguments.parts}))
    while arguments.wait_for and not arguments.wait_for.exists() and time.perf_counter() - began < 90:
        time.sleep(0.2)
    print(f"checked and compiled in {time.perf_counter() - began:.0f} s", flush=True)
    left_out = 0
    chosen = [(part, job) for part, job in jobs() if part in arguments.parts]
    for part, job in chosen[arguments.skip :]:
        if time.perf_counter() - began > arguments.seconds:
            left_out += 1
            continue
        try:
            for row in job():
                report(row)
                if time.perf_counter() - began > arguments.seconds:
                    break
        except Exception as error:
            report({"part": part, "error": f"{type(error).__name__}: {error}"[:300]})
        free()
        made, known, seconds = (sum(row[index] for row in _KERNELS.values()) for index in range(3))
        now = time.perf_counter() - began
        print(f"after {now:.0f} s: {made} kernels compiled, {known} found, {seconds:.1f} s", flush=True)
    for name, row in sorted(_KERNELS.items(), key=lambda each: -each[1][2])[:25]:
        print(f"  {name}: {row[0]} compiled, {row[1]} found, {row[2]:.1f} s")
    print(f"{time.perf_counter() - began:.0f} s; {left_out} jobs left out", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
