"""The device that models are timed on: its memory and peak, dense backends, and models built on it."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamask.errors import UsageError
from dynamask.mixers import RankPredictor
from dynamask.models import DynamaskConfig, DynamaskForCausalLM, preset

# Dense bfloat16 products, without sparsity; NVIDIA's data sheet of the SXM form of H100, and of H200.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


_BACKENDS = {"mha": SDPBackend.FLASH_ATTENTION, "mha-cudnn": SDPBackend.CUDNN_ATTENTION}


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
    with torch.device(current_device()):
        model = DynamaskForCausalLM(config)
    if gates == "scattered" and config.attention == "dma":
        for module in model.modules():
            if isinstance(module, RankPredictor):
                torch.nn.init.normal_(module.down.weight)
    return model


def current_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory() -> int | None:
    """Bytes of the GPU's memory that are free or this process's own; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def weight_count(config: DynamaskConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DynamaskForCausalLM(config).parameters())


def peak_flops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in _PEAK_FLOPS.items() if known in name), None)


def dense_backend(attention: str) -> contextlib.AbstractContextManager[Any]:
    """SDPA's backend for a dense contestant. On a CPU, and for dma, which calls no SDPA, PyTorch's own choice."""
    if not torch.cuda.is_available() or attention not in _BACKENDS:
        return contextlib.nullcontext()
    return sdpa_kernel(_BACKENDS[attention])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error)


def free() -> None:
    """Give back what nothing refers to any more, as far as the GPU still answers."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
