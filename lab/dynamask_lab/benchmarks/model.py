"""Whole models: training steps and decoding of dynamic mask attention against dense attention, in one process.

Dense attention is SDPA with its flash backend everywhere ("mha"); "mha-cudnn" trains with cuDNN's.
Every contestant gets the same model shape, random token ids, the same loss and the same optimizer.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.cache import BoundedCache, BoundedLayer, cache_bytes
from dynamask.errors import UsageError
from dynamask.mixers import RankPredictor
from dynamask.models import DynamaskConfig, DynamaskForCausalLM, preset
from dynamask.models.cuda_graph import StepGraph
from dynamask.models.modeling import AUXILIARY_WEIGHT
from dynamask_lab.benchmarks.gpu import check
from dynamask_lab.benchmarks.gpu.apart import Task, run_apart
from dynamask_lab.benchmarks.gpu.measure import whole
from dynamask_lab.benchmarks.gpu.run import write_rendered
from dynamask_lab.sweeps import provenance

# In order of importance: a budget that ends early cuts from the end.
LENGTHS = (32768, 8192, 65536)
CONTEXTS = (32768, 131072, 4096)
BATCHES = (1, 8, 32)
PREFILL = 32768
CACHES = (
    *(("dma", "bounded"), ("mha", "fixed")),
    *(("mha", "dynamic"), ("dma", "bounded-eager"), ("mha", "static")),
)

# Dense bfloat16 products, without sparsity; NVIDIA's data sheet of the SXM form of H100, and of H200.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
_BACKENDS = {"mha": SDPBackend.FLASH_ATTENTION, "mha-cudnn": SDPBackend.CUDNN_ATTENTION}
_CHUNK = 2048  # positions whose logits exist at a time: 1.2 GB of float32 at 152K tokens
_DECODE_WARMUP = 4
_PREFILLS = 3

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


def build(name: str, attention: str, length: int, *, gates: str = "scattered") -> DynamaskForCausalLM:
    """A model of a preset on the GPU (or the CPU where there is none), float32, randomly initialised.

    Args:
        name: the preset.
        attention: "dma", "mha" or "mha-cudnn".
        length: positions the model must be meant for.
        gates: "scattered": with rank predictors drawn from a normal distribution, so that random tokens keep random
            keys. "initial": dma as it starts training, which is a sliding window.
    """
    if gates not in ("scattered", "initial"):
        raise UsageError(f"gates must be scattered or initial; got {gates!r}")
    config = preset(name, attention=attention.partition("-")[0])
    config.max_position_embeddings = max(config.max_position_embeddings, length)
    torch.manual_seed(0)
    with torch.device(_device()):
        model = DynamaskForCausalLM(config)
    if gates == "scattered" and config.attention == "dma":
        for module in model.modules():
            if isinstance(module, RankPredictor):
                torch.nn.init.normal_(module.down.weight)
    return model


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
        memory = _memory()
        weights = "float32" if memory is None or 16 * everything <= memory / 2 else "bfloat16"
    if weights == "bfloat16":
        model = model.to(torch.bfloat16)
    device = _device()
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
        with _dense_backend(attention):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=weights == "float32"):
                loss = chunked_loss(model, tokens)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    _reset_peak()
    for _ in range(warmup):
        step()
    taken = []
    for _ in range(steps):
        _synchronize()
        start = time.perf_counter()
        loss = step()
        _synchronize()
        taken.append(time.perf_counter() - start)
    seconds, value = statistics.median(taken), loss.item()
    if not value == value:
        raise AssertionError("the loss is NaN, so no time is worth anything")
    row["steps_s"] = taken
    flops = training_flops(config, parameters, length)
    row |= {"step_s": seconds, "tokens_per_s": length / seconds, "peak_gib": _peak_gib(), "loss": value}
    row["useful_tflops"] = (flops["weights"] + flops["attention"]) / seconds / 1e12
    peak = _peak_flops()
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


def cache_size(config: DynamaskConfig, cache: str, context: int, batch: int) -> int:
    """Bytes of keys and values (and scores and positions, bounded) in bfloat16 after `context` tokens."""
    bounded = cache.startswith("bounded")
    heads = [window if bounded else context for windows in config.head_windows for window in windows]
    per_slot = 2 * 2 * config.head_dim + (8 if bounded else 0)
    return batch * per_slot * sum(min(context, window) for window in heads)


def filled_cache(config: DynamaskConfig, cache: str, context: int, batch: int, spare: int) -> Cache:
    """A cache as `context` tokens leave it, with random keys and values in bfloat16.

    Prefilling would take minutes at long contexts and change nothing about the time of a step, which depends on the
    shapes alone.

    Args:
        config: of the model.
        cache: "bounded", "bounded-eager", "dynamic", "static" or "fixed", see `NOTES`.
        context: positions seen.
        batch: sequences.
        spare: further tokens a static cache must hold.
    """
    made: Cache
    bounded = cache.startswith("bounded")
    if bounded:
        made = BoundedCache(config, graphs=cache == "bounded")
    elif cache == "fixed":
        made = Cache(layers=[FixedLayer() for _ in range(config.num_hidden_layers)])
    elif cache == "dynamic":
        made = DynamicCache()
    elif cache == "static":
        made = StaticCache(config=config, max_cache_len=context + spare)
    else:
        raise UsageError(f"cache must be bounded, bounded-eager, dynamic, static or fixed; got {cache!r}")
    device = _device()
    for index, windows in enumerate(config.head_windows):
        slots = min(context, max(windows)) if bounded else context
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        if not bounded:
            made.update(key, value, index)
            continue
        layer = made.layers[index]
        assert isinstance(layer, BoundedLayer)
        with torch.no_grad():
            layer.extend(key, value, torch.randn(shape[:3], device=device), None)
        # As if these were what `context` tokens left: the layer's cost knows positions only by comparison.
        layer.skip(context - slots)
    return made


class FixedLayer(CacheLayerMixin):
    """Keys and values at constant length: the first call fills it, every later token overwrites the last slot."""

    is_compileable = False
    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold the first keys and values."""
        self.keys, self.values = key_states, value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the newest among them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        else:
            self.keys[:, :, -1:] = key_states
            self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions a query sees, its own included: the next token takes the last one's place."""
        return self.keys.shape[2] - 1 if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all slots."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """The length it was filled to."""
        return self.keys.shape[2] if self.is_initialized else -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16


@lru_cache(maxsize=1)
def _decoder(name: str, attention: str, length: int, gates: str) -> DynamaskForCausalLM:
    """The last model built for decoding: building one takes longer than timing it."""
    return build(name, attention, length, gates=gates).to(torch.bfloat16).eval()


@torch.no_grad()
def time_generation(
    name: str,
    attention: str,
    cache: str,
    context: int,
    batch: int,
    *,
    steps: int = 32,
    gates: str = "scattered",
    memory: int | None = None,
) -> dict[str, Any]:
    """Time greedy decoding by the real model from a cache filled with random keys (`filled_cache`).

    Args:
        name: the preset.
        attention: "dma" or "mha".
        cache: "bounded" or "bounded-eager" (dma), "dynamic", "static" or "fixed".
        context: tokens in the cache before the first step.
        batch: sequences.
        steps: decoding steps timed, after a few of warm-up.
        gates: see `build`.
        memory: bytes that may be used; default: those of the GPU.

    Returns:
        A row: ms per step, tokens/s over the batch, bytes of the cache, peak memory; or "skipped" and why.
    """
    spare = steps + _DECODE_WARMUP
    row: dict[str, Any] = {"attention": attention, "cache": cache, "context": context, "batch": batch, "preset": name}
    config = preset(name, attention=attention)
    need = cache_size(config, cache, context + spare, batch)
    # A dynamic layer is copied to grow; the model's weights come on top.
    copies = 1 + (1 / config.num_hidden_layers if cache == "dynamic" else 0)
    weights = 2 * _weight_count(config)
    limit = _memory() if memory is None else memory
    if limit is not None and need * copies + weights > 0.97 * limit:
        row["skipped"] = f"the cache takes {need / 2**30:.0f} GiB, the device has {limit / 2**30:.0f} GiB"
        return row
    model = _decoder(name, attention, max(CONTEXTS) + spare, gates)
    row["window"] = model.config.windows if attention == "dma" else None
    gc.collect()
    _reset_peak()  # the float32 weights of the construction are gone
    held = filled_cache(model.config, cache, context, batch, spare)
    token = torch.randint(model.config.vocab_size, (batch, 1), device=_device())

    graph: StepGraph | None = None

    def step(token: Tensor) -> Tensor:
        if graph is not None:
            return graph.replay(token, place)[:, -1:].argmax(-1)
        logits = model(input_ids=token, past_key_values=held, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    with _dense_backend(attention):
        for _ in range(_DECODE_WARMUP):
            token = step(token)
        if cache == "fixed" and torch.cuda.is_available():
            place = torch.full_like(token, context - 1)
            graph = StepGraph(model, held, token, place)
            token = step(token)
        _synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            token = step(token)
        _synchronize()
        seconds = (time.perf_counter() - start) / steps
    row |= {"ms_per_token": 1e3 * seconds, "tokens_per_s": batch / seconds, "cache_mib": cache_bytes(held) / 2**20}
    row |= {"peak_gib": _peak_gib(), "steps": steps}
    return row


@torch.no_grad()
def time_prefill(name: str, attention: str, length: int, *, gates: str = "scattered") -> dict[str, Any]:
    """Time prefills of `length` tokens, batch 1, into an empty `BoundedCache` (dma) or `DynamicCache` (mha).

    The first one, untimed, compiles and warms up; of the others the median counts.
    """
    model = _decoder(name, attention, length, gates)
    gc.collect()
    _reset_peak()
    tokens = torch.randint(model.config.vocab_size, (1, length), device=_device())
    taken = []
    with _dense_backend(attention):
        for _ in range(1 + _PREFILLS):
            cache: Cache = BoundedCache(model.config) if attention == "dma" else DynamicCache()
            _synchronize()
            start = time.perf_counter()
            model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            _synchronize()
            taken.append(time.perf_counter() - start)
    seconds = statistics.median(taken[1:])
    row: dict[str, Any] = {"attention": attention, "cache": "bounded" if attention == "dma" else "dynamic", "N": length}
    row |= {"preset": name, "window": model.config.windows if attention == "dma" else None, "seconds": seconds}
    row |= {"tokens_per_s": length / seconds, "cache_mib": cache_bytes(cache) / 2**20, "peak_gib": _peak_gib()}
    return row


def attempt(measure: Callable[[], dict[str, Any]], identity: dict[str, Any]) -> dict[str, Any]:
    """The row of a measurement, or its identity with "error" (and "out_of_memory"); memory is freed either way."""
    began = time.perf_counter()
    try:
        row = measure()
    except Exception as error:  # one that cannot run here is reported, not fatal
        text = (str(error).splitlines() or [""])[0][:200]
        full = _out_of_memory(error)
        row = identity | {"error": "out of memory" if full else f"{type(error).__name__}: {text}"}
        row |= {"out_of_memory": True} if full else {"traceback": whole(error)}
    # Only here, after the except block, is the traceback gone that held the model's tensors.
    _free()
    row["took_s"] = time.perf_counter() - began
    return row


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error)


def _free() -> None:
    """Give back what nothing refers to any more, as far as the GPU still answers."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def train_as_set(settings: Settings, attention: str, length: int, **options: Any) -> dict[str, Any]:
    """`time_training`, compiled where the settings say so, or eagerly where that fails ("compile_error")."""
    run = partial(time_training, settings.preset, attention, length, gates=settings.gates, **options)
    if not settings.compile:
        return run()
    try:
        return run(compile=True)
    except Exception as error:
        if _out_of_memory(error) or isinstance(error, AssertionError):
            raise
        failure = whole(error)
    _free()
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
    return ", ".join(f"{name} {_cell(row[name])}" for name in names or row if row.get(name) is not None)


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
                _decoder.cache_clear()
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
    _decoder.cache_clear()
    if cudnn:
        between = settings.only is None and len(settings.batches) > 1  # then the first was measured above
        for length in settings.lengths[1 if between else 0 :]:
            yield training("mha-cudnn", length)


TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "training": (
        "Training step",
        (
            "attention",
            "N",
            "weights",
            "compiled",
            "step_s",
            "tokens_per_s",
            "peak_gib",
            "useful_tflops",
            "mfu",
            "mfu_with_output",
        ),
    ),
    "generation": (
        "Decoding",
        ("attention", "cache", "batch", "context", "ms_per_token", "tokens_per_s", "cache_mib", "peak_gib"),
    ),
    "prefill": ("Prefill", ("attention", "cache", "N", "seconds", "tokens_per_s", "cache_mib", "peak_gib")),
    "longest": ("Longest trainable length (one step, untimed)", ("attention", "N", "step_s", "peak_gib", "longest")),
}


def table_rows(results: dict[str, Any], part: str) -> list[list[str]]:
    """The cells of a table of `TABLES`; the last one says why a row has no figures."""
    columns = TABLES[part][1]
    rows = []
    for row in results[part]:
        remark = row.get("error") or row.get("skipped") or (f"ended by: {row['ended']}" if "ended" in row else "")
        if "compile_error" in row:
            remark = f"not compiled: {row['compile_error'].splitlines()[-1][:200]}"
        rows.append([*(_cell(row.get(column)) for column in columns), remark])
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The results as tables for people."""
    settings = results["settings"]
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    window = preset(settings["preset"]).windows
    lines = [environment, "", f"Preset {settings['preset']}, dma's window {window}, gates {settings['gates']}.", ""]
    lines += [f"- {note}" for note in results["notes"]]
    for part, (title, columns) in TABLES.items():
        if not results[part]:
            continue
        lines += ["", f"## {title}", ""]
        header = [*columns, "remark"]
        for cells in (header, ["---"] * len(header), *table_rows(results, part)):
            lines.append("| " + " | ".join(cells) + " |")
    if results["not_measured"]:
        lines += ["", f"Not measured within {settings['budget_seconds']:g} s:", ""]
        lines += ["- " + ", ".join(str(value) for value in row.values()) for row in results["not_measured"]]
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], folder: Path) -> None:
    """model.json and model.md in `folder`, each replaced whole, so that a killed run leaves its last results."""
    write_rendered(results, folder / "model.json", folder / "model.md", markdown)


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """training.png (tokens/s against length) and generation.png (tokens/s against context), where there are rows."""
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {"training": {}, "generation": {}}
    for row in results["training"]:
        if "tokens_per_s" in row:
            curves["training"].setdefault(row["attention"], []).append((row["N"], row["tokens_per_s"]))
    for row in results["generation"]:
        if "tokens_per_s" in row:
            label = f"{row['attention']}, {row['cache']} cache, batch {row['batch']}"
            curves["generation"].setdefault(label, []).append((row["context"], row["tokens_per_s"]))
    written = []
    for part, axis in (("training", "tokens per sequence"), ("generation", "tokens of context")):
        if not curves[part]:
            continue
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for label, points in curves[part].items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axes.set_xscale("log", base=2)
        if part == "generation":
            axes.set_yscale("log")
        axes.set(xlabel=axis, ylabel="tokens/s", title=f"{results['settings']['preset']}, {part}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        path = folder / f"{part}.png"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory() -> int | None:
    """Bytes of the GPU's memory that are free or this process's own; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def _weight_count(config: DynamaskConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DynamaskForCausalLM(config).parameters())


def _peak_flops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in _PEAK_FLOPS.items() if known in name), None)


def _dense_backend(attention: str) -> contextlib.AbstractContextManager[Any]:
    """SDPA's backend for a dense contestant. On a CPU, and for dma, which calls no SDPA, PyTorch's own choice."""
    if not torch.cuda.is_available() or attention not in _BACKENDS:
        return contextlib.nullcontext()
    return sdpa_kernel(_BACKENDS[attention])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
