"""Borrowing live keys from the shards before, and returning their gradients: an exclusive scan of top-w merges.

Process r needs the live keys of everything before its shard. It first gets the live keys of the shard before it, then,
in steps of 1, 2, 4, ... processes, those that the process so many before it has collected, and merges them:
1 + ceil(log2(P - 1)) messages of at most `sum(window)` keys each. Gathering the sets of all shards would take one step
and P - 1 such messages per process, most of them of keys that lost their contest already. With two processes both are
one message.

Gradients travel the same way in reverse: a step that merged two sets divides the gradient between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dynamask.ops.context_parallel.live_keys import LiveKeys, choose_live, joined, occupied_places, take
from dynamask.ops.context_parallel.shards import ContextShards

Rows = tuple[Tensor, ...]


@dataclass
class _Step:
    """One step of the scan, as its reverse needs it.

    Attributes:
        distance: processes between sender and receiver.
        held: places of the set that this process held before the step, 0 for none.
        sent: whether it sent that set on.
        got: places of the set that it received, 0 for none.
        index, kept: of the merged set into the received set and the held one side by side.
    """

    distance: int
    held: int = 0
    sent: bool = False
    got: int = 0
    index: Tensor | None = None
    kept: Tensor | None = None


@dataclass
class Loan:
    """What a process has lent and borrowed, for the way back.

    Attributes:
        windows: keys that each head keeps.
        lent, kept: (B, G, W) index of the keys lent to the next process, and whether there is one; None: nothing lent.
        steps: of the scan.
    """

    windows: tuple[int, ...]
    lent: Tensor | None = None
    kept: Tensor | None = None
    steps: list[_Step] = field(default_factory=list)


def borrow_keys(
    key: Tensor,
    value: Tensor,
    rank: Tensor,
    shards: ContextShards,
    windows: tuple[int, ...],
    *,
    local: int,
    sinks: int,
) -> tuple[LiveKeys | None, Loan]:
    """Collect the live keys of all shards before this one.

    Args:
        key: (B, G, n, D); value: (B, G, n, Dv); rank: (B, G, n): this shard's.
        shards: how the sequence is split.
        windows, local, sinks: as in `key_expiry`.

    Returns:
        The keys that this shard's first query may see, in the order of the sequence, None in the first process; and
        what `return_gradients` needs.
    """
    me, size, starts = shards.rank, shards.size, shards.starts
    batch, groups, length = key.shape[:3]
    loan, widest = Loan(windows), max(windows)
    sample = LiveKeys(key, value, rank, rank)
    own = None
    if me + 1 < size:
        position = torch.arange(starts[me], starts[me + 1], device=key.device).expand(batch, groups, length)
        begin = shards.last_document(batch, key.device)
        width = min(widest, length)
        loan.lent, loan.kept = choose_live(
            rank, position, begin, starts[me + 1], windows, width, local=local, sinks=sinks
        )
        own = take(LiveKeys(key, value, rank, position), loan.lent, loan.kept)
    width = min(widest, shards.lengths[me - 1]) if me else 0
    held = _pass_on(own, width, 1, shards, windows, sample)
    begin, reach = shards.first_document(batch, key.device), 1
    while reach < size - 1:
        step = _Step(reach, held=0 if held is None else held.position.shape[-1])
        step.sent = held is not None and me + reach < size
        source = me - reach
        if source >= 1:
            step.got = min(widest, starts[source] - starts[max(0, source - reach)])
        got = _pass_on(held if step.sent else None, step.got, reach, shards, windows, sample)
        if got is not None:
            assert held is not None
            both = joined(got, held)
            width = min(widest, starts[me] - starts[max(0, source - reach)])
            step.index, step.kept = choose_live(
                both.rank, both.position, begin, starts[me], windows, width, local=local, sinks=sinks
            )
            held = take(both, step.index, step.kept)
        loan.steps.append(step)
        reach *= 2
    if held is not None and shards.document is not None:
        # The document of the shard's first token may begin after that of the last token before it.
        begin = begin[:, None, None]
        order = torch.where(held.position >= begin, held.position, 1 << 62).argsort(dim=-1, stable=True)
        moved = take(held, order, (held.position >= begin).gather(-1, order))
        loan.steps.append(_Step(0, index=order, kept=moved.position >= 0))
        held = moved
    return held, loan


def return_gradients(gradients: Sequence[Tensor] | None, loan: Loan, shards: ContextShards, like: Rows) -> Rows | None:
    """Send the gradients of borrowed keys back to their owners.

    Args:
        gradients: of what was borrowed, (B, G, W, ·) each, in the order of the set; None: nothing was.
        loan: as `borrow_keys` returned it.
        shards: how the sequence is split.
        like: empty tensors (B, G, 0, ·) of the dtypes in which gradients travel.

    Returns:
        Gradients of the keys lent, (B, G, W, ·) each in float32 (float64), at `loan.lent`; None where none were lent.
    """
    held = None if gradients is None else tuple(_wide(each) for each in gradients)
    for step in reversed(loan.steps):
        back = None
        if step.index is not None:
            assert held is not None
            index, kept = step.index, step.kept
            assert kept is not None
            places = step.got + step.held if step.distance else index.shape[-1]
            spread = []
            for each in held:
                wide = kept[..., None].expand_as(each)
                total = each.new_zeros(*each.shape[:2], places, each.shape[3])
                total.scatter_add_(2, index[..., None].expand_as(each), each.masked_fill(~wide, 0.0))
                spread.append(total)
            if not step.distance:
                held = tuple(spread)
                continue
            back = tuple(each[:, :, : step.got] for each in spread)
            held = tuple(each[:, :, step.got :] for each in spread)
        returned = _pass_back(back, step.held if step.sent else 0, step.distance, loan.windows, shards, like)
        if returned is not None:
            assert held is not None
            held = tuple(own + other for own, other in zip(held, returned, strict=True))
    width = 0 if loan.lent is None else loan.lent.shape[-1]
    returned = _pass_back(held, width, 1, loan.windows, shards, like)
    if returned is None or loan.kept is None:
        return None
    return tuple(each.masked_fill(~loan.kept[..., None], 0.0) for each in returned)


def _pass_on(
    keys: LiveKeys | None, width: int, distance: int, shards: ContextShards, windows: tuple[int, ...], sample: LiveKeys
) -> LiveKeys | None:
    """Send a set `distance` processes on, and receive one of `width` places from as far before."""
    out = None if keys is None else (*keys[:3], keys.position.to(torch.int32))
    like = (*(each[:, :, :0] for each in sample[:3]), sample.rank[:, :, :0].to(torch.int32))
    got, sent = _swap(out, width, distance, windows, shards, like)
    shards.traffic.forward += sent
    if got is None:
        return None
    key, value, rank, position = got
    return LiveKeys(key, value, rank, position.long())


def _pass_back(
    gradients: Rows | None, width: int, distance: int, windows: tuple[int, ...], shards: ContextShards, like: Rows
) -> Rows | None:
    out = None if gradients is None else tuple(g.to(e.dtype) for g, e in zip(gradients, like, strict=True))
    got, sent = _swap(out, width, -distance, windows, shards, like)
    shards.traffic.backward += sent
    return None if got is None else tuple(_wide(each) for each in got)


def _swap(
    out: Rows | None, width: int, distance: int, windows: tuple[int, ...], shards: ContextShards, like: Rows
) -> tuple[Rows | None, int]:
    """Send tensors (B, G, W, ...) `distance` processes on, and receive such of `width` places from the other side.

    Only the places that can hold a key travel: of head g the first `windows[g]`. One message of bytes.

    Returns:
        What was received, zeros in places that cannot hold a key, or None; and the bytes sent.
    """
    me, work, sent = shards.rank, [], 0
    device = like[0].device
    wide_first = sorted(range(len(like)), key=lambda i: -like[i].element_size())  # so that every part is aligned
    incoming = None
    if out is not None:
        every = min(windows) >= out[0].shape[2]  # all heads have all places
        flat = [out[i].flatten(1, 2) for i in wide_first]
        if not every:
            places = occupied_places(windows, out[0].shape[2], device)
            flat = [part[:, places] for part in flat]
        parts = [part.contiguous() for part in flat]
        message = torch.cat([part.view(torch.uint8).flatten() for part in parts])
        sent = message.numel()
        work.append(dist.P2POp(dist.isend, message, _global(shards, me + distance), shards.group))
    if width:
        batch, count = like[0].shape[0], sum(min(window, width) for window in windows)
        shapes = [(batch, count, *like[i].shape[3:]) for i in wide_first]
        sizes = [torch.Size(s).numel() * like[i].element_size() for s, i in zip(shapes, wide_first, strict=True)]
        incoming = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        work.append(dist.P2POp(dist.irecv, incoming, _global(shards, me - distance), shards.group))
    if work:
        for each in dist.batch_isend_irecv(work):
            each.wait()
    if incoming is None:
        return None, sent
    got: list[Tensor] = list(like)
    for i, shape, part in zip(wide_first, shapes, incoming.split(sizes), strict=True):
        rows = part.view(like[i].dtype).view(shape)
        if min(windows) >= width:
            got[i] = rows.unflatten(1, (like[i].shape[1], width))
            continue
        places = occupied_places(windows, width, device)
        whole = rows.new_full((batch, like[i].shape[1] * width, *shape[2:]), 0 if rows.is_floating_point() else -1)
        got[i] = whole.index_copy_(1, places, rows).unflatten(1, (like[i].shape[1], width))
    return tuple(got), sent


def _global(shards: ContextShards, peer: int) -> int:
    return dist.get_global_rank(shards.group, peer)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
