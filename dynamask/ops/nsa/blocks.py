"""Native sparse attention (NSA, arXiv 2502.11089): compressed, selected and sliding branches.

Works in document coordinates: every document starts a block of its own, so packing and padding change nothing.
The parameterisation is that of flash-linear-attention (mean-pooled blocks; the first, the current and the
previous block always selected), with which `tests/ops/test_nsa.py` compares it.

The sliding branch is interval attention. The selected branch runs in fla's kernels where `nsa_selected` takes it, on a
GPU without them under a mask where that is small enough, else it gathers keys. The compressed branch, which ranks the
blocks, is plain torch in float32 on every device: for heads of 64 and blocks of 64 it is N/64 keys wide, and fla's own
backward pass of it would leave most of a GPU idle at N = 4096, where one program walks 64 blocks through all queries,
one query at a time. All plain branches are computed again in the backward pass, the compressed and the gathered one
tile by tile, so that training keeps no tile and no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dynamask.errors import InvalidInputError
from dynamask.ops.autocast import autocast_dtype, without_autocast
from dynamask.ops.interval.api import attend
from dynamask.ops.nsa.masked import mask_fits, masked_attention
from dynamask.ops.nsa.selected import kernels_take, selected_attention

TILE_ELEMENTS = 1 << 25
"""Numbers in the largest tensors of a tile of queries (block logits, or gathered keys): 128 MiB in float32."""

_ROUNDS = 8
"""Up to so many blocks are picked by as many maxima: `topk` gives each of millions of short rows a GPU block."""


@dataclass(frozen=True)
class BlockLayout:
    """Where the keys lie once every document has been padded to whole blocks.

    Attributes:
        slot: (B, N) int64, place of each key in the padded layout; padding keys point past its end.
        rows: (B, T) int64, the key at each place, or N where there is none; T a multiple of the block.
        block_start: (B, C) int64, first block of the document that block c belongs to, -1 for a block no
            document owns.
        left: (B, N) int64, real keys behind each key in its document.
        end: (B, N) int64, one past the last real key of each key's document.
        block_size: keys per block.
        plain: neither packed nor padded: every key lies at its own position. B is 1 then, for any batch.
    """

    slot: Tensor
    rows: Tensor
    block_start: Tensor
    left: Tensor
    end: Tensor
    block_size: int
    plain: bool

    def sliding_expiry(self, window: int) -> Tensor:
        """Return the first query past each key's window of `window` positions, (B, N) int32."""
        places = self.rows.shape[1]
        later = self.rows.gather(-1, (self.slot + window).clamp(max=places - 1))
        expiry = torch.where(self.left >= window, later, self.end)
        position = torch.arange(self.slot.shape[1], device=self.slot.device)
        return torch.where(self.slot < places, expiry, position).to(torch.int32)


def block_layout(
    batch: int,
    length: int,
    block_size: int,
    device: torch.device,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> BlockLayout:
    """Lay documents out in whole blocks. Only for packed documents it looks at the data, and makes a GPU wait.

    Args:
        batch, length: B and N.
        block_size: keys per block.
        segment_ids: (B, N) non-decreasing, or None for one document per row.
        key_mask: (B, N) bool, True for a real token, or None.

    Returns:
        The layout of the real tokens of each document, in order, each document starting a block.

    Raises:
        InvalidInputError: block_size < 1.
    """
    if block_size < 1:
        raise InvalidInputError(f"block_size must be at least 1; got {block_size}")
    position = torch.arange(length, device=device)
    total = max(1, -(-length // block_size))
    if segment_ids is None and key_mask is None:
        rows = torch.arange(total * block_size, device=device).clamp(max=length)
        start = torch.zeros(1, total, dtype=torch.long, device=device)
        left, end = length - 1 - position, torch.full_like(position, length)
        return BlockLayout(position[None], rows[None], start, left[None], end[None], block_size, plain=True)
    if key_mask is None:
        key_mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    document = torch.zeros(batch, length, dtype=torch.long, device=device)
    if segment_ids is not None:
        document[:, 1:] = (segment_ids[:, 1:] != segment_ids[:, :-1]).long().cumsum(-1)
    count = torch.zeros_like(document).scatter_add_(-1, document, key_mask.long())
    blocks = (count + block_size - 1) // block_size
    first_block = blocks.cumsum(-1) - blocks
    before = (count.cumsum(-1) - count).gather(-1, document)
    offset = key_mask.long().cumsum(-1) - 1 - before
    if segment_ids is not None:  # documents add incomplete blocks; without, `total` is enough for the longest row
        total = max(1, int(blocks.sum(-1).max()))
    slot = first_block.gather(-1, document) * block_size + offset
    slot = torch.where(key_mask, slot, total * block_size)
    rows = torch.full((batch, total * block_size + 1), length, dtype=torch.long, device=device)
    rows.scatter_(-1, slot, position.expand(batch, length))
    rows = rows[:, :-1]
    # Block c belongs to the last document that starts at or before it.
    block = torch.arange(total, device=device)
    owner = torch.searchsorted(first_block.contiguous(), block.expand(batch, total).contiguous(), right=True) - 1
    block_start = first_block.gather(-1, owner)
    used = rows.view(batch, total, block_size)[..., 0] < length
    last = torch.where(key_mask, position + 1, 0)
    end = torch.zeros_like(document).scatter_reduce_(-1, document, last, "amax").gather(-1, document)
    left = count.gather(-1, document) - 1 - offset
    return BlockLayout(slot, rows, torch.where(used, block_start, -1), left, end, block_size, plain=False)


def nsa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    *,
    block_counts: int,
    window: int,
    layout: BlockLayout,
    scale: float | None = None,
    kernels: bool = True,
) -> Tensor:
    """Compute the gated sum of attention to compressed blocks, to selected blocks and to the newest keys.

    Args:
        query: (B, H, Nq, D), the last Nq positions; key (B, G, N, D); value (B, G, N, Dv).
        gates: (B, H, Nq, 3), weights of the compressed, selected and sliding branch.
        block_counts: blocks a query selects, the first, current and previous one of its document included.
        window: newest keys the sliding branch sees.
        layout: from `block_layout`, over all N positions; it says how many keys a block has.
        scale: default D**-0.5.
        kernels: let fla's kernels run the selected branch where they can.

    Returns:
        (B, H, Nq, Dv) in the query's dtype (under autocast in autocast's); zeros for padding queries.

    Raises:
        InvalidInputError: block_counts < 1 or window < 0.

    Source: arXiv 2502.11089, equations 5 to 12; `fla.ops.nsa.naive.naive_nsa`.
    """
    if block_counts < 1 or window < 0:
        raise InvalidInputError(f"block_counts must be >= 1 and window >= 0; got {block_counts} and {window}")
    options: dict[str, Any] = {"block_counts": block_counts, "window": window, "layout": layout, "scale": scale}
    narrow = autocast_dtype(query)
    if narrow is not None:
        # As `attend`: inputs narrow, sums and the ranking of blocks in float32.
        attend_so = partial(nsa_attention, gates=gates, kernels=kernels, **options)
        return without_autocast(attend_so, query, key, value, dtype=narrow)
    batch, heads, num_queries, dim = query.shape
    groups, length = key.shape[1], key.shape[2]
    size = layout.block_size
    scale = dim**-0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    slots = layout.slot[:, length - num_queries :]
    grouped = query.to(wide).view(batch, groups, heads // groups, num_queries, dim) * scale
    laid_key, laid_value = _laid_out(key.to(wide), layout), _laid_out(value.to(wide), layout)
    # Only whole blocks are ever seen compressed, so the mean over block_size is the mean over their keys.
    mean_key, mean_value = (laid.unflatten(2, (-1, size)).mean(3) for laid in (laid_key, laid_value))
    blocks = mean_key.shape[2]
    compressed, chosen = zip(
        *(
            _recomputed(_compressed, grouped[:, :, :, part], slots[:, part], mean_key, mean_value, layout, block_counts)
            for part in _tiles(num_queries, batch * heads * blocks)
        ),
        strict=True,
    )
    branches = [torch.cat(compressed, dim=3).reshape(batch, heads, num_queries, value.shape[3])]
    choice = torch.cat(chosen, dim=2)
    if kernels and layout.plain and kernels_take(query, key, value, size):
        branches.append(selected_attention(query, key, value, choice, block_size=size, scale=scale))
    elif layout.plain and mask_fits(query, key):
        under_mask = partial(masked_attention, block_size=size, scale=scale)
        branches.append(_recomputed(under_mask, query, key, value, choice).to(wide))
    else:
        gathered = batch * groups * choice.shape[-1] * size * max(dim, value.shape[-1])
        tiles = [
            _recomputed(
                _selected, grouped[:, :, :, part], slots[:, part], choice[:, :, part], laid_key, laid_value, size
            )
            for part in _tiles(num_queries, gathered)
        ]
        branches.append(torch.cat(tiles, dim=3).reshape(batch, heads, num_queries, -1))
    if window:
        expiry = layout.sliding_expiry(window)[:, None].expand(batch, groups, length).contiguous()
        branches.append(attend(query, key, value, expiry, scale=scale, max_live=window))
    gate = gates.to(wide)
    output = sum(gate[..., i : i + 1] * branch for i, branch in enumerate(branches))
    assert isinstance(output, Tensor)
    if not layout.plain:
        output = output.masked_fill((slots >= layout.rows.shape[1])[:, None, :, None], 0.0)
    return output.to(query.dtype)


def _laid_out(tensor: Tensor, layout: BlockLayout) -> Tensor:
    """(B, G, N, D) -> (B, G, T, D), zeros where the layout has no key."""
    if layout.plain:
        return F.pad(tensor, (0, 0, 0, layout.rows.shape[1] - tensor.shape[2]))
    rows = layout.rows[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return F.pad(tensor, (0, 0, 0, 1)).gather(2, rows)


def _tiles(queries: int, elements: int) -> list[slice]:
    """The queries in tiles whose largest tensors, of `elements` numbers a query, keep to TILE_ELEMENTS."""
    size = max(1, TILE_ELEMENTS // max(1, elements))
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, of which the backward pass recomputes all but the arguments."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _compressed(
    query: Tensor, slot: Tensor, mean_key: Tensor, mean_value: Tensor, layout: BlockLayout, block_counts: int
) -> tuple[Tensor, Tensor]:
    """Attention of queries (B, G, R, M, D) at places `slot` (B, M) to block means, and the blocks they choose.

    Returns:
        (B, G, R, M, Dv), and (B, G, M, S) int32, -1 for no block.
    """
    size = layout.block_size
    slot = slot.clamp(max=layout.rows.shape[1] - 1)
    block = torch.arange(mean_key.shape[2], device=slot.device)
    own = slot // size
    start = layout.block_start.expand(len(slot), -1).gather(-1, own)
    in_document = (block >= start[..., None]) & (layout.block_start >= 0)[:, None]
    whole = in_document & ((block + 1) * size - 1 <= slot[..., None])  # (B, M, C)
    weights = _softmax(torch.einsum("bgrmd,bgcd->bgrmc", query, mean_key), whole[:, None, None])
    output = torch.einsum("bgrmc,bgcd->bgrmd", weights, mean_value)

    # Selection: the probabilities above, averaged over the query heads that share the keys.
    with torch.no_grad():
        importance = weights.mean(2)
        forced = (block == own[..., None]) | (block == own[..., None] - 1) | (block == start[..., None])
        forced &= in_document & (block <= own[..., None])
        importance = torch.where(forced[:, None], 1.0, importance)
        importance = importance.masked_fill(~(whole | forced)[:, None], -1.0)
        chosen = _best(importance, min(block_counts, len(block)))
    return output, chosen


def _best(importance: Tensor, count: int) -> Tensor:
    """(..., C) -> (..., count) int32, the most important blocks in any order, -1 where only negative ones are left."""
    if not 3 <= count <= _ROUNDS:  # of fewer than 3, forced blocks compete for places, all alike: `topk` decides
        best = importance.topk(count, dim=-1, sorted=False)
        return torch.where(best.values >= 0, best.indices, -1).to(torch.int32)
    block = torch.arange(importance.shape[-1], device=importance.device)
    chosen = []
    for _ in range(count):
        value, index = importance.max(-1, keepdim=True)
        chosen.append(torch.where(value >= 0, index, -1))
        importance = importance.masked_fill(block == index, -1.0)
    return torch.cat(chosen, dim=-1).to(torch.int32)


def _selected(query: Tensor, slot: Tensor, chosen: Tensor, key: Tensor, value: Tensor, size: int) -> Tensor:
    """Attention of queries (B, G, R, M, D) at places `slot` (B, M) to the keys of blocks `chosen` (B, G, M, S)."""
    within = torch.arange(size, device=slot.device)
    place = (chosen.long().clamp(min=0).unsqueeze(-1) * size + within).flatten(-2)  # (B, G, M, S·size)
    known = (chosen >= 0).unsqueeze(-1).expand(*chosen.shape, size).flatten(-2)
    seen = known & (place <= slot[:, None, :, None])
    logits = torch.einsum("bgrmd,bgmld->bgrml", query, _rows(key, place))
    return torch.einsum("bgrml,bgmld->bgrmd", _softmax(logits, seen[:, :, None]), _rows(value, place))


def _rows(tensor: Tensor, place: Tensor) -> Tensor:
    """(B, G, T, D) at places (B, G, M, L) -> (B, G, M, L, D)."""
    index = place.flatten(2).unsqueeze(-1).expand(-1, -1, -1, tensor.shape[-1])
    return tensor.gather(2, index).unflatten(2, place.shape[2:])


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen; zeros, and zero gradients, where nothing is."""
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    return logits.softmax(-1).masked_fill(~seen, 0.0)
