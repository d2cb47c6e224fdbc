"""`attn_implementation="dynamask"`: the attention of models that are not converted, by interval attention.

transformers asks two functions of an implementation. `interval_mask` turns a mask into intervals: a key's expiry, one
integer per key, in place of a (queries x keys) matrix. `interval_attention_forward` attends with them. A causal mask,
a sliding window, packed documents, padding and attention in chunks are intervals; a mask that is not, and attention
that does more than softmax over the visible keys, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from dynamask.errors import InvalidInputError
from dynamask.ops.context_parallel.shards import current_group
from dynamask.ops.interval.api import attend

IMPLEMENTATION = "dynamask"
"""The value of `attn_implementation`."""

_BLOCK = 1 << 24
"""Entries of a mask that are evaluated at once, where its form is not known."""

_ELSE = "Use attn_implementation='sdpa' or 'eager' for this model"


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """Turn a mask function of transformers into expiries, see `AttentionMaskInterface`.

    Args:
        batch_size: B.
        q_length: Nq, queries of this call.
        kv_length: slots that the cache returns, and the new keys.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: whether a query sees a key, by batch, head, query position and key position.
        attention_mask: (B, positions) bool, True for a real token, or None.
        use_vmap: whether `mask_function` takes scalars alone.
        device: of the result.

    Returns:
        (B or 1, 1, 1, N) int32: key j is visible to the queries `j <= i < expiry[j]`, which are the last Nq of N. N is
        less than `kv_length` where a static cache has slots that are not written yet.

    Raises:
        InvalidInputError: a mask that is not an interval: bidirectional, a prefix that sees itself, image blocks.
    """
    before = int(q_offset) - int(kv_offset)  # keys of the past
    length = before + q_length
    if not 0 < length <= kv_length:
        raise InvalidInputError(
            f"attn_implementation={IMPLEMENTATION!r}: the mask has {kv_length} keys for queries that end at position "
            f"{length}, as attention to another sequence has. {_ELSE}"
        )
    window, segments = length, None
    parts = list(_parts(mask_function))
    kinds = {kind for kind, _ in parts}
    known = "causal" in kinds and ("within documents" not in kinds or "packed" in kinds)
    for kind, content in parts:
        if kind == "sliding":
            window = min(window, content)
        elif kind == "packed" and segments is None:
            segments = content
        elif kind not in ("causal", "within documents"):
            known = False
    real = None
    if attention_mask is not None:
        real = attention_mask.to(device=device, dtype=torch.bool)
        real = F.pad(real, (0, max(0, int(kv_offset) + length - real.shape[-1])))
        real = real[:, int(kv_offset) : int(kv_offset) + length]
    if known:
        expiry = (torch.arange(length, device=device) + window).clamp(max=length)[None]
        if segments is not None:
            expiry = torch.minimum(expiry, _ends(segments.to(device)))
        if real is not None:
            expiry = torch.where(real, expiry, 0)
        return expiry.to(torch.int32)[:, None, None]

    def rows(start: int, stop: int) -> Tensor:
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=stop - start,
            kv_length=kv_length,
            q_offset=int(q_offset) + start,
            kv_offset=int(kv_offset),
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )

    return _evaluated(rows, batch_size, q_length, length)


def _parts(function: Any) -> Iterator[tuple[str, Any]]:
    """Take a mask function of transformers apart: its kind and what decides it, for each part of an intersection."""
    if function is causal_mask_function:
        yield "causal", None
        return
    maker, _, inner = getattr(function, "__qualname__", "").partition(".<locals>.")
    module = getattr(function, "__module__", "")
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    held = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    if module != causal_mask_function.__module__ or not inner:
        yield "unknown", function
    elif maker == "and_masks" and "mask_functions" in held:
        for part in held["mask_functions"]:
            yield from _parts(part)
    elif maker == "sliding_window_overlay" and isinstance(held.get("sliding_window"), int):
        yield "sliding", held["sliding_window"]
    elif maker == "packed_sequence_mask_function" and "packed_sequence_mask" in held:
        yield "packed", held["packed_sequence_mask"]
    elif maker == "remap_positions_for_packed_sequence" and "mask_function" in held:  # transformers 5.24
        # Inside a document, positions differ by as much as indices do.
        yield "within documents", None
        yield from _parts(held["mask_function"])
    else:
        yield "unknown", function


def _ends(segments: Tensor) -> Tensor:
    """(B, N) the first position behind the segment of each position; equal numbers are one segment."""
    length = segments.shape[-1]
    last = F.pad(segments[:, 1:] != segments[:, :-1], (0, 1), value=True)
    end = torch.arange(1, length + 1, device=segments.device).where(last, length)
    return end.flip(-1).cummin(-1).values.flip(-1)


def _evaluated(rows: Callable[[int, int], Tensor], batch: int, queries: int, length: int) -> Tensor:
    """The expiries of a mask of any form, by looking at all of it, some queries at a time.

    Args:
        rows: gives the mask of the queries from one number to another, (B, heads, queries, N or more) bool.
        batch, queries, length: B, Nq and N.

    Returns:
        (B, heads, 1, N) int32, see `interval_mask`.

    Raises:
        InvalidInputError: the queries that see a key are not those from its own position to some later one.
    """
    step = max(1, min(queries, _BLOCK // max(1, batch * length)))
    seen: Any = 0
    end: Any = 0
    ahead: Any = False
    for start in range(0, queries, step):
        visible = rows(start, min(start + step, queries))
        # Keys behind the last query: slots of a static cache that nobody sees, or another sequence.
        ahead = ahead | visible[..., length:].any()
        visible = visible[..., :length]
        query = torch.arange(start, start + visible.shape[-2], device=visible.device)[:, None] + length - queries
        key = torch.arange(length, device=visible.device)
        ahead = ahead | (visible & (key > query)).any()
        seen = seen + visible.sum(-2)
        end = torch.maximum(torch.as_tensor(end, device=visible.device), (visible * (query + 1)).amax(-2))
    first = torch.arange(length, device=end.device).clamp(min=length - queries)
    whole = (seen == (end - first)) | (seen == 0)
    if bool(ahead) or not bool(whole.all()):
        what = "lets queries see later keys" if bool(ahead) else "hides a key from a query and shows it to a later one"
        raise InvalidInputError(
            f"attn_implementation={IMPLEMENTATION!r} computes masks in which a key is visible from its own position to "
            f"some later one (causal, sliding, packed, padded, in chunks); this mask {what} (a bidirectional or prefix "
            f"mask, blocks of an image, or a custom pattern). {_ELSE}"
        )
    return end.to(torch.int32)[..., None, :]  # type: ignore[no-any-return]


def _expiry(module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, causal: bool | None) -> Tensor:
    """(B or 1, heads or 1, N) the expiries that a mask means, of whatever form it is."""
    queries, length = query.shape[2], key.shape[2]
    if attention_mask is None:
        if not (getattr(module, "is_causal", False) if causal is None else causal) or queries > length:
            raise InvalidInputError(
                f"attn_implementation={IMPLEMENTATION!r}: {type(module).__name__} is not causal. {_ELSE}"
            )
        return torch.full((1, 1, length), length, dtype=torch.int32, device=key.device)
    if attention_mask.dim() != 4:
        raise InvalidInputError(
            f"attn_implementation={IMPLEMENTATION!r} takes the (batch, positions) mask of a whole model, or a 4-D one; "
            f"{type(module).__name__} was given shape {tuple(attention_mask.shape)}"
        )
    if attention_mask.dtype == torch.int32:  # made by `interval_mask`
        return attention_mask[:, :, 0]
    visible = attention_mask
    if visible.dtype != torch.bool:
        visible = attention_mask == 0
        if not bool((visible | (attention_mask <= torch.finfo(torch.float16).min)).all()):
            raise InvalidInputError(
                f"attn_implementation={IMPLEMENTATION!r}: the 4-D attention mask adds numbers to single logits. {_ELSE}"
            )
    shape = (query.shape[0], visible.shape[1], queries, min(length, visible.shape[-1]))
    visible = visible.expand(shape[0], -1, -1, -1)[..., : shape[-1]]
    if visible.shape != shape:
        raise InvalidInputError(
            f"the 4-D attention mask must be (batch, heads or 1, {queries} queries, {length} keys); got "
            f"{tuple(attention_mask.shape)}"
        )
    return _evaluated(lambda start, stop: visible[:, :, start:stop], shape[0], queries, shape[-1])[:, :, 0]


def interval_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by intervals, see transformers' `AttentionInterface`.

    Args:
        module: the attention module, for messages and for `is_causal` where there is no mask.
        query: (B, H, Nq, D).
        key: (B, G, N, D); value: (B, G, N, Dv).
        attention_mask: from `interval_mask`; or (B, H or 1, Nq, N), bool or added to the logits; or None.
        scaling: factor on the logits; None: D**-0.5.
        dropout: must be 0: attention weights are never materialised.

    Returns:
        (B, Nq, H, Dv), and None for the attention weights. A query that sees nothing (padding) gets zeros.

    Raises:
        InvalidInputError: dropout, capped logits, learned sinks, a bias by position, attention weights that are to be
            returned, or a mask that is not an interval.
    """
    refused = {
        "dropout": (dropout, "attention dropout: set attention_dropout=0.0 in the configuration"),
        "softcap": (kwargs.get("softcap"), "capped attention logits"),
        "s_aux": (kwargs.get("s_aux"), "a learned sink in the softmax"),
        "position_bias": (kwargs.get("position_bias"), "a bias on pairs of positions"),
        "head_mask": (kwargs.get("head_mask"), "a mask of heads"),
        "output_attentions": (kwargs.get("output_attentions"), "attention weights, which are never materialised"),
        "split": (current_group() is not None, "keys of other processes (context_parallel): convert the model"),
    }
    for given, what in refused.values():
        if given is not None and (isinstance(given, Tensor) or given):
            raise InvalidInputError(
                f"attn_implementation={IMPLEMENTATION!r}: {type(module).__name__} wants {what}. {_ELSE}"
            )
    expiry = _expiry(module, query, key, attention_mask, kwargs.get("is_causal"))
    length, groups = expiry.shape[-1], key.shape[1]
    if length < key.shape[2]:  # slots of a static cache that are not written yet
        key, value = key[:, :, :length], value[:, :, :length]
    if length != key.shape[2]:
        raise InvalidInputError(
            f"attn_implementation={IMPLEMENTATION!r}: the mask covers {length} keys and {type(module).__name__} has "
            f"{key.shape[2]}"
        )
    if expiry.shape[1] not in (1, groups):
        if expiry.shape[1] != query.shape[1]:
            raise InvalidInputError(f"the mask has {expiry.shape[1]} heads and the query {query.shape[1]}")
        key, value = (each.repeat_interleave(query.shape[1] // groups, 1) for each in (key, value))
        groups = query.shape[1]
    expiry = expiry.expand(query.shape[0], groups, length).contiguous()
    return attend(query, key, value, expiry, scale=scaling).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, interval_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, interval_mask)
