"""Prefill and decoding of whole models from the caches that are compared."""

from __future__ import annotations

import gc
import statistics
import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.cache import BoundedCache, BoundedLayer, cache_bytes
from dynamask.errors import UsageError
from dynamask.models import DynamaskConfig, DynamaskForCausalLM, preset
from dynamask.models.cuda_graph import StepGraph
from dynamask_lab.benchmarks.model.device import (
    build,
    current_device,
    dense_backend,
    free_memory,
    peak_gib,
    reset_peak,
    synchronize,
    weight_count,
)

CONTEXTS = (32768, 131072, 4096)


CACHES = (
    *(("dma", "bounded"), ("mha", "fixed")),
    *(("mha", "dynamic"), ("dma", "bounded-eager"), ("mha", "static")),
)


_DECODE_WARMUP = 4


_PREFILLS = 3


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
    device = current_device()
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
def decoder(name: str, attention: str, length: int, gates: str) -> DynamaskForCausalLM:
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
    weights = 2 * weight_count(config)
    limit = free_memory() if memory is None else memory
    if limit is not None and need * copies + weights > 0.97 * limit:
        row["skipped"] = f"the cache takes {need / 2**30:.0f} GiB, the device has {limit / 2**30:.0f} GiB"
        return row
    model = decoder(name, attention, max(CONTEXTS) + spare, gates)
    row["window"] = model.config.windows if attention == "dma" else None
    gc.collect()
    reset_peak()  # the float32 weights of the construction are gone
    held = filled_cache(model.config, cache, context, batch, spare)
    token = torch.randint(model.config.vocab_size, (batch, 1), device=current_device())

    graph: StepGraph | None = None

    def step(token: Tensor) -> Tensor:
        if graph is not None:
            return graph.replay(token, place)[:, -1:].argmax(-1)
        logits = model(input_ids=token, past_key_values=held, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    with dense_backend(attention):
        for _ in range(_DECODE_WARMUP):
            token = step(token)
        if cache == "fixed" and torch.cuda.is_available():
            place = torch.full_like(token, context - 1)
            graph = StepGraph(model, held, token, place)
            token = step(token)
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            token = step(token)
        synchronize()
        seconds = (time.perf_counter() - start) / steps
    row |= {"ms_per_token": 1e3 * seconds, "tokens_per_s": batch / seconds, "cache_mib": cache_bytes(held) / 2**20}
    row |= {"peak_gib": peak_gib(), "steps": steps}
    return row


@torch.no_grad()
def time_prefill(name: str, attention: str, length: int, *, gates: str = "scattered") -> dict[str, Any]:
    """Time prefills of `length` tokens, batch 1, into an empty `BoundedCache` (dma) or `DynamicCache` (mha).

    The first one, untimed, compiles and warms up; of the others the median counts.
    """
    model = decoder(name, attention, length, gates)
    gc.collect()
    reset_peak()
    tokens = torch.randint(model.config.vocab_size, (1, length), device=current_device())
    taken = []
    with dense_backend(attention):
        for _ in range(1 + _PREFILLS):
            cache: Cache = BoundedCache(model.config) if attention == "dma" else DynamicCache()
            synchronize()
            start = time.perf_counter()
            model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            synchronize()
            taken.append(time.perf_counter() - start)
    seconds = statistics.median(taken[1:])
    row: dict[str, Any] = {"attention": attention, "cache": "bounded" if attention == "dma" else "dynamic", "N": length}
    row |= {"preset": name, "window": model.config.windows if attention == "dma" else None, "seconds": seconds}
    row |= {"tokens_per_s": length / seconds, "cache_mib": cache_bytes(cache) / 2**20, "peak_gib": peak_gib()}
    return row
