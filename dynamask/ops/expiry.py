"""Scores -> expiry: which queries see which key (design section 2).

A key, once dropped, never returns, because the number of keys of the prefix that outrank it only grows. The
mask of a key is therefore one interval of queries, `j <= i < expiry[j]`, and the whole mask of a head is one
int32 per key. `key_expiry` is the fast path, `key_expiry_by_definition` the definition, for reading and for
tests.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.integers import check_window
from dynamask.ops.checks import Window, check_key_mask, check_segment_ids, check_tensor
from dynamask.ops.positions import later_positions, real_positions, segment_bounds, sink_keys

_INT_OF_FLOAT = {torch.float32: torch.int32, torch.float64: torch.int64}


def key_expiry(
    scores: Tensor,
    window: Window,
    *,
    local: int = 0,
    sinks: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Find the first query that no longer sees each key, under a budget of `window` keys per query.

    Query i of head g sees at most `window[g]` keys of its prefix, which is the keys j <= i of its segment that
    are not padding:

    - the first `sinks` keys of the segment,
    - the newest `local` keys of the prefix,
    - the best-ranked others, until there are `window[g]` keys in all.

    The higher score ranks higher; on equal scores the later position does. A NaN score ranks lowest. Padding
    counts nowhere, wherever it stands in the row: not towards `window`, `local` or `sinks`.

    Args:
        scores: (B, G, N) float tensor, one score per key and key/value head. Not differentiated.
        window: keys each query keeps, at least 1: an integer for all heads, or G integers (a sequence, a 1-D
            integer array or tensor), one per key/value head. A head with window >= N is dense causal.
        local: newest keys that are always kept, at least 0.
        sinks: first keys of each segment that are always kept inside it, at least 0.
            local + sinks <= min(window).
        segment_ids: (B, N) integers, non-decreasing along N: packed documents. A key is seen only inside
            its own segment.
        key_mask: (B, N) bool, True for a real token. A padding key gets expiry == its own position.

    Returns:
        (B, G, N) int32: key j is visible exactly to the queries `j <= i < expiry[j]`. A key that survives has
        expiry == the end of its segment; a key that nobody keeps has expiry == j; every other expiry is the
        position of a real token.

    Raises:
        InvalidInputError: wrong type, shape, dtype or device, a window below 1, a sequence of windows that are
            not G, local + sinks above the smallest window, or segment_ids that decrease.

    Cost: O(N log N) time and O(N) memory per head, without a loop over positions. The threshold of query i is
    the `window`-th best rank of its prefix, found for all i at once by descending a wavelet matrix over the
    ranks; the threshold only rises, so a binary search finds where it passes each key. On a GPU the threshold is
    found at every 256th position or so, and a key is resolved in the one stretch in which the threshold passes it
    (`dynamask.ops.triton.expiry`), packed and padded rows included.

    Source: arXiv 2508.02124, section 3 (the top-w mask); sinks as in arXiv 2309.17453; the interval form is
    dynamask's.
    """
    windows, local, sinks = _check_expiry_arguments(scores, window, local, sinks, segment_ids, key_mask)
    if scores.numel() == 0:
        return torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
    return _key_expiry_op(scores.detach(), windows, local, sinks, segment_ids, key_mask)


@torch.library.custom_op("dynamask::key_expiry", mutates_args=())
def _key_expiry_op(
    scores: Tensor,
    windows: Sequence[int],
    local: int,
    sinks: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """Run `key_expiry` after its checks, as an operator: torch.compile calls it whole, kernels and all."""
    return run_key_expiry(scores, windows, local, sinks, segment_ids, key_mask)


def run_key_expiry(
    scores: Tensor,
    windows: Sequence[int],
    local: int,
    sinks: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """Do what `key_expiry` does after its checks, for operators that contain it."""
    batch, heads, length = scores.shape
    # The older keys contest the places that the newest `local` leave. A sink is a key that wins every contest.
    counts = [min(window - local, length) for window in windows]
    contested = any(0 < count < length for count in counts)
    if contested:
        fast = _kernel_expiry(scores, counts, local, sinks, segment_ids, key_mask)
        if fast is not None:
            return fast
    position = torch.arange(length, device=scores.device)
    start, end = segment_bounds(segment_ids, batch, length, scores.device)
    before, nth = real_positions(key_mask, batch, length, scores.device)
    if len(set(counts)) == 1:  # without a copy to the device, which a stream that is captured does not allow
        count = torch.full((1, 1), counts[0], device=scores.device)
    else:
        count = torch.tensor(counts, device=scores.device)[:, None]
    if contested:
        sink = sink_keys(min(sinks, length), before, nth, segment_ids)
        expiry = _contested_expiry(key_rank(scores, key_mask, sink), start, count)
    else:
        expiry = torch.where(count == 0, position, end[:, None]).expand(batch, heads, length)
    if local:
        # The expiry may be the row's end, which stays.
        later = torch.nn.functional.pad(later_positions(local, before, nth), (0, 1), value=length)
        expiry = later[:, None].expand(-1, heads, -1).gather(-1, expiry)
    expiry = torch.minimum(expiry, end[:, None])
    if key_mask is not None:
        expiry = torch.where(key_mask[:, None], expiry, position)
    return expiry.to(torch.int32).contiguous()


@_key_expiry_op.register_fake
def _(
    scores: Tensor,
    windows: Sequence[int],
    local: int,
    sinks: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.int32)


def _kernel_expiry(
    scores: Tensor,
    counts: list[int],
    local: int,
    sinks: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
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
    return expiry.contested_expiry(scores, counts, local, sinks, segment_ids, key_mask)


def key_expiry_by_definition(
    scores: Tensor,
    window: Window,
    *,
    local: int = 0,
    sinks: int = 0,
    segment_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Spell `key_expiry` out: for every query sort its prefix, keep the best. O(N² log N), for tests.

    Arguments, result and errors are those of `key_expiry`.
    """
    windows, local, sinks = _check_expiry_arguments(scores, window, local, sinks, segment_ids, key_mask)
    batch, heads, length = scores.shape
    expiry = torch.arange(length, dtype=torch.int32).repeat(batch, heads, 1)
    for b in range(batch):
        segment = [0] * length if segment_ids is None else segment_ids[b].tolist()
        real = [True] * length if key_mask is None else key_mask[b].tolist()
        for g in range(heads):
            score = scores[b, g].tolist()
            for i in range(length):
                if not real[i]:
                    continue
                prefix = [j for j in range(i + 1) if segment[j] == segment[i] and real[j]]
                kept = set(prefix[:sinks] + prefix[max(0, len(prefix) - local) :])
                others = [j for j in prefix if j not in kept]
                # NaN != NaN: a NaN score sorts as (False, 0.0, position), below every number.
                others.sort(key=lambda j: (score[j] == score[j], score[j] if score[j] == score[j] else 0.0, j))
                kept.update(others[max(0, len(others) - (windows[g] - len(kept))) :])
                after = [j for j in range(i + 1, length) if segment[j] == segment[i]]
                until = next((j for j in after if real[j]), after[-1] + 1 if after else i + 1)
                for j in kept:
                    expiry[b, g, j] = until
    return expiry.to(scores.device)


def key_rank(scores: Tensor, key_mask: Tensor | None = None, sink: Tensor | None = None) -> Tensor:
    """Rank the keys of each head: a permutation of 0..N-1, the best key having N-1.

    Args:
        scores: (B, G, N) float tensor.
        key_mask: (B, N) bool, True for a real token; padding ranks below everything.
        sink: (B, N) bool, True for keys that rank above everything (`sink_keys`).

    Returns:
        (B, G, N) int64 ranks. Equal scores rank by position, NaN below every number and above padding.
    """
    order = sortable_scores(scores, key_mask, sink).sort(dim=-1, stable=True).indices
    position = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, position)


def sortable_scores(scores: Tensor, key_mask: Tensor | None = None, sink: Tensor | None = None) -> Tensor:
    """Map scores to integers of the same order: padding < NaN < -inf < ... < +inf < sinks, and -0.0 == 0.0.

    Args:
        scores: (..., N) float tensor; with `key_mask` or `sink`, (B, G, N).
        key_mask: (B, N) bool, True for a real token.
        sink: (B, N) bool, True for keys that rank above everything (`sink_keys`).

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
    if sink is not None:
        ordered = torch.where(sink[:, None], info.max - 1, ordered)
    if key_mask is not None:
        ordered = torch.where(key_mask[:, None], ordered, info.min)
    return ordered


def _contested_expiry(rank: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Where `count` keys of the segment's prefix first outrank each key: (B, G, N), never before the key itself.

    Args:
        rank: (B, G, N) int64 permutation of 0..N-1.
        start: (B, N) int64 first position of each position's segment.
        count: (G, 1) or (1, 1) int64 places in the contest of each head, 0 to N.
    """
    threshold = _prefix_threshold(rank, start, count)
    # Within a segment the threshold only rises; offsetting each segment by more than any rank makes one
    # increasing sequence per row, and a search in it stops at the segment's end by itself.
    offset = (start * (rank.shape[-1] + 2)).unsqueeze(1)
    expiry = torch.searchsorted(threshold + offset, rank + offset, right=True)
    return torch.maximum(expiry, torch.arange(rank.shape[-1], device=rank.device))


def _prefix_threshold(rank: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """The `count`-th best rank among positions start[i]..i for every i; -1 where there are fewer, N for count 0.

    Wavelet-matrix descent: one level per bit of the rank, from the highest. At each level the sequence is
    stably partitioned by the bit; prefix counts of ones say how many of a range carry a one, hence in which
    half the wanted rank lies, and where the range goes.

    Args:
        rank: (B, G, N) int64 permutation of 0..N-1.
        start: (B, N) int64 first position of each position's segment.
        count: (G, 1) or (1, 1) int64.

    Returns:
        (B, G, N) int64.
    """
    batch, heads, length = rank.shape
    position = torch.arange(length, device=rank.device)
    low = start[:, None].expand(batch, heads, length).contiguous()
    high = (position + 1).expand(batch, heads, length).contiguous()
    wanted = count.expand_as(low)  # the wanted-th largest inside [low, high)
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
    return torch.where(enough, torch.where(count == 0, length, threshold), -1)


def _check_expiry_arguments(
    scores: Tensor,
    window: Window,
    local: int,
    sinks: int,
    segment_ids: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[tuple[int, ...], int, int]:
    """Check all arguments of `key_expiry`; return the window of each head, local and sinks as Python integers."""
    check_tensor("scores", scores, "(batch, num_key_value_heads, length)")
    if scores.dim() != 3 or not scores.is_floating_point():
        raise InvalidInputError(
            f"scores must be a float tensor of shape (batch, num_key_value_heads, length); "
            f"got {scores.dtype} of shape {tuple(scores.shape)}"
        )
    batch, groups, length = scores.shape
    windows = check_window(window, local, sinks, groups=groups)
    check_segment_ids(segment_ids, batch, length, scores.device)
    check_key_mask(key_mask, batch, length, scores.device)
    return windows, operator.index(local), operator.index(sinks)
