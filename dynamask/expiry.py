"""Scores -> expiry: which queries see which key (design section 2).

A key, once dropped, never returns, because the number of keys of the prefix that outrank it only grows. The
mask of a key is therefore one interval of queries, `j <= i < expiry[j]`, and the whole mask of a head is one
int32 per key. `key_expiry` is the fast path, `key_expiry_by_definition` the definition, for reading and for
tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError

_INT_OF_FLOAT = {torch.float32: torch.int32, torch.float64: torch.int64}


def key_expiry(
    scores: Tensor,
    window: int,
    *,
    local: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """First query that no longer sees each key, under a budget of `window` keys per query.

    Query i keeps the `window` best keys j <= i of its segment that are not padding. Key a outranks key b if
    its score is higher or, on equal scores, its position is later; NaN ranks below every number. With
    `local` > 0 the newest `local` positions are always kept and the older keys contest the other
    `window - local` places.

    Args:
        scores: (B, G, N) float tensor, one score per key and key/value head. Not differentiated.
        window: keys each query keeps, at least 1. With window >= N the mask is dense causal.
        local: how many of them are the newest positions, 0 <= local <= window.
        segment_ids: (B, N) integers, non-decreasing along N: packed documents. A key is seen only inside
            its own segment.
        key_mask: (B, N) bool, True for a real token. A padding key gets expiry == its own position.

    Returns:
        (B, G, N) int32: key j is visible exactly to the queries `j <= i < expiry[j]`. A key that survives has
        expiry == the end of its segment; a key that nobody keeps has expiry == j.

    Raises:
        InvalidInputError: wrong shape, dtype or device, window < 1, local outside [0, window], or
            segment_ids that decrease.

    Cost: O(N log N) time and O(N) memory per head, without a loop over positions. The threshold of query i is
    the `window`-th best rank of its prefix, found for all i at once by descending a wavelet matrix over the
    ranks; the threshold only rises, so a binary search finds where it passes each key. On a GPU the threshold is
    found at every 256th position or so, and a key is resolved in the one stretch in which the threshold passes it
    (`dynamask.ops.triton.expiry`), packed and padded rows included.

    Source: arXiv 2508.02124, section 3 (the top-w mask); the interval form is dynamask's.
    """
    _check_expiry_arguments(scores, window, local, segment_ids, key_mask)
    if scores.shape[-1] == 0:
        return torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
    return _key_expiry_op(scores.detach(), window, local, segment_ids, key_mask)


@torch.library.custom_op("dynamask::key_expiry", mutates_args=())
def _key_expiry_op(
    scores: Tensor, window: int, local: int, segment_ids: Tensor | None, key_mask: Tensor | None
) -> Tensor:
    """`key_expiry` after its checks, as an operator: torch.compile calls it whole, kernels and all."""
    batch, heads, length = scores.shape
    contested = window - local
    if 0 < contested < length:
        fast = _kernel_expiry(scores, contested, local, segment_ids, key_mask)
        if fast is not None:
            return fast
    position = torch.arange(length, device=scores.device)
    start, end = segment_bounds(segment_ids, batch, length, scores.device)
    if contested == 0:
        expiry = position.expand(batch, heads, length)
    elif contested >= length:
        expiry = end[:, None].expand(batch, heads, length)
    else:
        expiry = _contested_expiry(key_rank(scores, key_mask), start, contested)
    expiry = torch.minimum(expiry + local, end[:, None])
    if key_mask is not None:
        expiry = torch.where(key_mask[:, None], expiry, position)
    return expiry.to(torch.int32).contiguous()


@_key_expiry_op.register_fake
def _(scores: Tensor, window: int, local: int, segment_ids: Tensor | None, key_mask: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.int32)


def _kernel_expiry(
    scores: Tensor, count: int, local: int, segment_ids: Tensor | None, key_mask: Tensor | None
) -> Tensor | None:
    """`key_expiry` in Triton; None where that cannot run."""
    if not scores.is_cuda:
        return None
    try:
        from dynamask.ops.triton import expiry
    except ImportError:  # a CUDA build without Triton: the tensor operations give the same, slower
        return None
    if scores.shape[-1] > expiry.LONGEST:
        return None
    if scores.element_size() > 4:  # the kernels compare 32 bits: float64 scores give their ranks instead
        scores = key_rank(scores).to(torch.int32)
    return expiry.contested_expiry(scores, count, local, segment_ids, key_mask)


def key_expiry_by_definition(
    scores: Tensor,
    window: int,
    *,
    local: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """`key_expiry`, spelled out: for every query sort its prefix, keep the best. O(N² log N), for tests.

    Arguments, result and errors are those of `key_expiry`.
    """
    _check_expiry_arguments(scores, window, local, segment_ids, key_mask)
    batch, heads, length = scores.shape
    expiry = torch.arange(length, dtype=torch.int32).repeat(batch, heads, 1)
    for b in range(batch):
        segment = [0] * length if segment_ids is None else segment_ids[b].tolist()
        real = [True] * length if key_mask is None else key_mask[b].tolist()
        for g in range(heads):
            score = scores[b, g].tolist()
            for i in range(length):
                prefix = [j for j in range(i + 1) if segment[j] == segment[i]]
                newest = [j for j in prefix if j > i - local and real[j]]
                contest = [j for j in prefix if j <= i - local and real[j]]
                # NaN != NaN: a NaN score sorts as (False, 0.0, position), below every number.
                contest.sort(key=lambda j: (score[j] == score[j], score[j] if score[j] == score[j] else 0.0, j))
                for j in newest + contest[max(0, len(contest) - (window - local)) :]:
                    expiry[b, g, j] = i + 1
    return expiry.to(scores.device)


def key_rank(scores: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Total order of the keys of each head: a permutation of 0..N-1, the best key having N-1.

    Args:
        scores: (B, G, N) float tensor.
        key_mask: (B, N) bool, True for a real token; padding ranks below everything.

    Returns:
        (B, G, N) int64 ranks. Equal scores rank by position, NaN below every number and above padding.
    """
    order = sortable_scores(scores, key_mask).sort(dim=-1, stable=True).indices
    position = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, position)


def sortable_scores(scores: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Integers that compare as the scores rank: padding < NaN < -inf < ... < +inf, and -0.0 == 0.0.

    Args:
        scores: (..., N) float tensor; with `key_mask`, (B, G, N).
        key_mask: (B, N) bool, True for a real token.

    Returns:
        int32 for scores of up to 32 bits, int64 for float64, in the shape of `scores`.
    """
    # + 0.0 turns -0.0 into 0.0, which must tie with it.
    wide = (scores.detach().to(torch.promote_types(scores.dtype, torch.float32)) + 0.0).contiguous()
    bits = wide.view(_INT_OF_FLOAT[wide.dtype])
    info = torch.iinfo(bits.dtype)
    # IEEE floats compare as sign-magnitude integers: flip the magnitude bits of the negatives.
    ordered = bits ^ ((bits >> (info.bits - 1)) & info.max)
    ordered = torch.where(wide.isnan(), info.min + 1, ordered)
    if key_mask is not None:
        ordered = torch.where(key_mask[:, None], ordered, info.min)
    return ordered


def segment_bounds(segment_ids: Tensor | None, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First position and one past the last position of each position's segment.

    Args:
        segment_ids: (B, N) non-decreasing integers, or None for one segment.
        batch, length, device: shape and place of the result.

    Returns:
        Two (B, N) int64 tensors.
    """
    position = torch.arange(length, device=device)
    if segment_ids is None:
        return position.new_zeros(batch, length), position.new_full((batch, length), length)
    opens = torch.ones_like(segment_ids, dtype=torch.bool)
    opens[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = torch.where(opens, position, 0).cummax(-1).values
    closes = torch.ones_like(opens)
    closes[:, :-1] = opens[:, 1:]
    end = torch.where(closes, position + 1, length).flip(-1).cummin(-1).values.flip(-1)
    return start, end


def _contested_expiry(rank: Tensor, start: Tensor, count: int) -> Tensor:
    """Where `count` keys of the segment's prefix first outrank each key: (B, G, N), never before the key itself.

    Args:
        rank: (B, G, N) int64 permutation of 0..N-1.
        start: (B, N) int64 first position of each position's segment.
        count: places in the contest.
    """
    threshold = _prefix_threshold(rank, start, count)
    # Within a segment the threshold only rises; offsetting each segment by more than any rank makes one
    # increasing sequence per row, and a search in it stops at the segment's end by itself.
    offset = (start * (rank.shape[-1] + 1)).unsqueeze(1)
    expiry = torch.searchsorted(threshold + offset, rank + offset, right=True)
    return torch.maximum(expiry, torch.arange(rank.shape[-1], device=rank.device))


def _prefix_threshold(rank: Tensor, start: Tensor, count: int) -> Tensor:
    """The `count`-th best rank among positions start[i]..i for every i; -1 where there are fewer.

    Wavelet-matrix descent: one level per bit of the rank, from the highest. At each level the sequence is
    stably partitioned by the bit; prefix counts of ones say how many of a range carry a one, hence in which
    half the wanted rank lies, and where the range goes.

    Args:
        rank: (B, G, N) int64 permutation of 0..N-1.
        start: (B, N) int64 first position of each position's segment.

    Returns:
        (B, G, N) int64.
    """
    batch, heads, length = rank.shape
    position = torch.arange(length, device=rank.device)
    low = start[:, None].expand(batch, heads, length).contiguous()
    high = (position + 1).expand(batch, heads, length).contiguous()
    wanted = torch.full_like(low, count)  # the wanted-th largest inside [low, high)
    enough = high - low >= count
    threshold = torch.zeros_like(low)
    sequence = rank
    for level in range(max(length - 1, 1).bit_length() - 1, -1, -1):
        bit = (sequence >> level) & 1
        ones = torch.nn.functional.pad(bit.cumsum(-1), (1, 0))
        zeros_total = length - ones[..., -1:]
        low_ones, high_ones = ones.gather(-1, low), ones.gather(-1, high)
        inside = high_ones - low_ones
        take = inside >= wanted
        threshold |= take.long() << level
        wanted = torch.where(take, wanted, wanted - inside)
        low = torch.where(take, zeros_total + low_ones, low - low_ones)
        high = torch.where(take, zeros_total + high_ones, high - high_ones)
        if level:
            target = torch.where(bit.bool(), zeros_total + ones[..., :-1], position - ones[..., :-1])
            sequence = torch.empty_like(sequence).scatter_(-1, target, sequence)
    return torch.where(enough, threshold, -1)


def _check_expiry_arguments(
    scores: Tensor, window: int, local: int, segment_ids: Tensor | None, key_mask: Tensor | None
) -> None:
    if scores.dim() != 3 or not scores.is_floating_point():
        raise InvalidInputError(
            f"scores must be a float tensor of shape (batch, num_key_value_heads, length); "
            f"got {scores.dtype} of shape {tuple(scores.shape)}"
        )
    check_window(window, local)
    batch, _, length = scores.shape
    check_segment_ids(segment_ids, batch, length, scores.device)
    check_key_mask(key_mask, batch, length, scores.device)


def check_window(window: int, local: int) -> None:
    """Raise `InvalidInputError` unless 1 <= window and 0 <= local <= window."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise InvalidInputError(f"window must be an integer of at least 1 (keys kept per query); got {window!r}")
    if isinstance(local, bool) or not isinstance(local, int) or not 0 <= local <= window:
        raise InvalidInputError(f"local must be an integer from 0 to window = {window}; got {local!r}")


def check_segment_ids(segment_ids: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """Raise `InvalidInputError` unless segment_ids is None or (B, N) non-decreasing integers on `device`."""
    if segment_ids is None:
        return
    if segment_ids.shape != (batch, length) or segment_ids.is_floating_point():
        raise InvalidInputError(
            f"segment_ids must be integers of shape {(batch, length)}; "
            f"got {segment_ids.dtype} of shape {tuple(segment_ids.shape)}"
        )
    if segment_ids.device != device:
        raise InvalidInputError(f"segment_ids is on {segment_ids.device}, the scores on {device}: move one of them")
    # On a GPU the look at the data would stall the stream; there the caller's word is taken while compiling
    # or capturing, and checked otherwise.
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    if length > 1 and bool((segment_ids[:, 1:] < segment_ids[:, :-1]).any()):
        row = int((segment_ids[:, 1:] < segment_ids[:, :-1]).any(-1).nonzero()[0])
        raise InvalidInputError(
            f"segment_ids must not decrease along the sequence (row {row} does): number the packed documents "
            "in the order in which they stand"
        )


def check_key_mask(key_mask: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """Raise `InvalidInputError` unless key_mask is None or a (B, N) bool tensor on `device`."""
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or key_mask.shape != (batch, length):
        raise InvalidInputError(
            f"key_mask must be a bool tensor of shape {(batch, length)}, True for a real token; "
            f"got {key_mask.dtype} of shape {tuple(key_mask.shape)} (an attention_mask becomes one with .bool())"
        )
    if key_mask.device != device:
        raise InvalidInputError(f"key_mask is on {key_mask.device}, the scores on {device}: move one of them")
