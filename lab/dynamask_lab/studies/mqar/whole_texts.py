"""PyTorch's attention for texts that the windows hold whole, where no key ever drops: the same result in less time.

Most texts of the task are shorter than the windows, and its models are so small that the kernels of interval attention
take most of a step on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dynamask.mixers import dma, swa
from dynamask.ops.interval.api import attend


def attend_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    max_live: int | tuple[int, ...] = 0,
    **options: Any,
) -> Tensor:
    """Do what `attend` does, for rows of one text each without padding; see there for the arguments."""
    length = key.shape[2]
    limits = max_live if isinstance(max_live, tuple) else (max_live,)
    if bias is None and query.shape[2] == length and min(limits) >= length:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return attend(query, key, value, expiry, bias=bias, scale=scale, max_live=max_live, **options)


@contextlib.contextmanager
def whole_texts() -> Iterator[None]:
    """Let learned ranks and sliding windows attend so, for as long as the context lasts."""
    modules: tuple[Any, ...] = (dma, swa)
    before = [module.attend for module in modules]
    for module in modules:
        module.attend = attend_whole
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.attend = own
