"""One self-contained HTML page that shows an `Inspection`."""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.inspect.inspection import AttentionView, Inspection

_NARROW = 1 << 16
"""Texts of fewer tokens are written in 16 bits per key."""


def inspection_page(inspection: Inspection, tokens: Sequence[str], model_name: str) -> str:
    """Write an inspection as one HTML page, which loads nothing.

    Args:
        inspection: what `inspect_text` found.
        tokens: the text of each token (`token_texts`).
        model_name: as the page shows it.

    Returns:
        The page. It unpacks its numbers with the browser's `DecompressionStream`.

    Raises:
        InvalidInputError: another number of tokens than the inspection has.
    """
    if len(tokens) != len(inspection.input_ids):
        raise InvalidInputError(f"the inspection is of {len(inspection.input_ids)} tokens; got {len(tokens)} texts")
    folder = files("dynamask.inspect") / "page"
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    # No tag and no comment can begin inside of the data.
    data = json.dumps(page_data(inspection, tokens, model_name), ensure_ascii=False, separators=(",", ":"))
    return Template(parts["html"]).substitute(
        title=html.escape(f"What {model_name} keeps"),
        style=parts["css"],
        data=data.replace("<", "\\u003c"),
        script=parts["js"],
    )


def page_data(inspection: Inspection, tokens: Sequence[str], model_name: str) -> dict[str, Any]:
    """Return what the page's script reads, see `page.js`; arrays are compressed and in base 64."""
    length = len(tokens)
    wide = length >= _NARROW
    integers = torch.int32 if wide else torch.int16
    position = torch.arange(length)
    expiry = torch.stack([layer.expiry for layer in inspection.layers])
    described = [
        {"kind": each.kind, "windows": each.windows, "local": each.local, "sinks": each.sinks}
        for each in inspection.layers
    ]
    ranks = None
    if any(each.ranks is not None for each in inspection.layers):
        empty = torch.zeros(inspection.heads, length)
        ranks = torch.stack([empty if each.ranks is None else rank_levels(each.ranks) for each in inspection.layers])
    return {
        "model": model_name,
        "tokens": list(tokens),
        "prompt": inspection.prompt,
        "heads": inspection.heads,
        "layers": described,
        "wide": wide,
        "lifetimes": _packed((expiry - position).clamp(min=0), integers),
        "ranks": None if ranks is None else _packed(ranks, torch.uint8),
        "attention": None if inspection.attention is None else _attention(inspection.attention, integers),
    }


def rank_levels(ranks: Tensor) -> Tensor:
    """Return the place of each rank among its head's, from 0 for the lowest to 255: (G, N) of (G, N)."""
    order = ranks.nan_to_num(-torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    return (order * 255).div(max(1, ranks.shape[-1] - 1), rounding_mode="floor")


def _attention(view: AttentionView, integers: torch.dtype) -> dict[str, Any]:
    return {
        "first": view.first_query,
        "queries": view.mean.shape[0],
        "top": view.top_keys.shape[-1],
        "mean": _packed(_byte_roots(view.mean), torch.uint8),
        "keys": _packed(view.top_keys, integers),
        "weights": _packed(_byte_roots(view.top_weights), torch.uint8),
    }


def _byte_roots(weights: Tensor) -> Tensor:
    """Weights from 0 to 1 as bytes of their square roots, which keep small ones apart."""
    return (weights.clamp(0, 1).sqrt() * 255).round()


def _packed(tensor: Tensor, dtype: torch.dtype) -> str:
    # Little-endian whatever this machine is, as typed arrays are read. int16 wraps to what Uint16Array reads.
    array = tensor.to(torch.int64).to(dtype).contiguous().numpy()
    raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return base64.b64encode(zlib.compress(raw, 9)).decode("ascii")
