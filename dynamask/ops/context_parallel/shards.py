"""How a sequence is split over processes: who holds which positions, and where documents begin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.ops.checks import check_segment_ids
from dynamask.ops.positions import segment_bounds

Mesh = Any
"""A one-dimensional `torch.distributed.device_mesh.DeviceMesh`, or a `torch.distributed.ProcessGroup`."""


@dataclass
class Traffic:
    """Bytes that this process has sent to others.

    Attributes:
        forward: keys, values, ranks and positions.
        backward: gradients of borrowed keys and values.
        learning: keys that ranks learn from, where they do.
    """

    forward: int = 0
    backward: int = 0
    learning: int = 0


@dataclass(frozen=True, eq=False)
class ContextShards:
    """One contiguous shard of a sequence per process, in the order of the processes in the group.

    Attributes:
        group: the processes that share the sequence.
        lengths: tokens of every process, at least 1 each.
        segment_ids: (B, n) non-decreasing integers of packed documents in this shard, or None. Only equality inside
            the shard is read.
        document: (B,) int64, position in the whole sequence at which the document of this shard's first token begins;
            None: at 0 in every row.
        traffic: counts what the operators send.
        packed: whether any shard of any process holds more than one document per row, or begins a later one.
    """

    group: Any
    lengths: tuple[int, ...]
    segment_ids: Tensor | None = None
    document: Tensor | None = None
    traffic: Traffic = field(default_factory=Traffic)
    packed: bool = False

    @property
    def rank(self) -> int:
        """Return the place of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Return the number of processes."""
        return len(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """Return the first position of every shard, then the length of the whole sequence."""
        return (0, *accumulate(self.lengths))

    @property
    def start(self) -> int:
        """Return the position of this shard's first token in the whole sequence."""
        return self.starts[self.rank]

    def gather(self, parts: list[Tensor], part: Tensor) -> None:
        """Collect a tensor of every process in `parts`, which hold one of each process's shape; count the bytes sent.

        Shapes may differ between processes, in which case they are padded on the way.
        """
        sizes = [each.numel() for each in parts]
        longest = max(sizes)
        rows = [part.new_empty(longest) for _ in sizes]
        flat = part.new_zeros(longest)
        flat[: part.numel()] = part.flatten()
        dist.all_gather(rows, flat, group=self.group)
        for each, row, size in zip(parts, rows, sizes, strict=True):
            each.copy_(row[:size].view(each.shape))
        self.traffic.learning += (self.size - 1) * longest * part.element_size()

    def first_document(self, batch: int, device: torch.device) -> Tensor:
        """Return `document`, zeros where it is None: (B,) int64."""
        return torch.zeros(batch, dtype=torch.int64, device=device) if self.document is None else self.document

    def last_document(self, batch: int, device: torch.device) -> Tensor:
        """Return where the document of this shard's last token begins in the whole sequence: (B,) int64."""
        first = self.first_document(batch, device)
        if self.segment_ids is None:
            return first
        opened, _ = segment_bounds(self.segment_ids, batch, self.segment_ids.shape[1], device)
        return torch.where(opened[:, -1] > 0, self.start + opened[:, -1], first)

    def positions(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Return the position of each token of this shard inside its document: (B, n) int64."""
        place = self.start + torch.arange(length, device=device).expand(batch, length)
        begin = self.first_document(batch, device)[:, None]
        if self.segment_ids is not None:
            opened, _ = segment_bounds(self.segment_ids, batch, length, device)
            begin = torch.where(opened > 0, self.start + opened, begin)
        return place - begin


def process_group(mesh: Mesh) -> Any:
    """Return the process group of a one-dimensional mesh.

    Raises:
        InvalidInputError: a mesh of several dimensions, or no mesh.
    """
    if hasattr(mesh, "get_group") and hasattr(mesh, "ndim"):
        if mesh.ndim != 1:
            raise InvalidInputError(
                f"context parallelism takes a one-dimensional mesh; got one of {mesh.ndim} dimensions "
                f"{mesh.mesh_dim_names}: pass the dimension that splits the sequence, such as mesh['context']"
            )
        return mesh.get_group()
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    raise InvalidInputError(f"mesh must be a DeviceMesh or a ProcessGroup; got {type(mesh).__name__}")


def context_shards(
    mesh: Mesh,
    batch: int,
    length: int,
    device: torch.device,
    *,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> ContextShards:
    """Learn how the sequence is split. Every process of the group must call it.

    Args:
        mesh: the processes that share the sequence.
        batch: B, the same in every process.
        length: n, tokens of this process's shard.
        device: on which the processes exchange tensors.
        segment_ids: (B, n) integers of packed documents, non-decreasing over the whole sequence: a document that
            crosses a boundary has the same number on both sides.
        position_ids: (B, n) position of each token inside its document, which replaces segment_ids. None with
            segment_ids None: one document per row.

    Returns:
        `ContextShards`; one exchange of a few integers.

    Raises:
        InvalidInputError: in every process, where shards are empty, batches differ or segment_ids decrease.
    """
    group = process_group(mesh)
    if segment_ids is not None:
        check_segment_ids(segment_ids, batch, length, device)
    opens, packs = None, segment_ids is not None
    if not packs and position_ids is not None:
        positions = position_ids.expand(batch, length)
        opens = positions[:, 1:] != positions[:, :-1] + 1
        # A document that a process begins with, but the first, begins at 0.
        packs = bool(opens.any()) or (dist.get_rank(group) > 0 and bool((positions[:, 0] == 0).any()))
    facts = torch.tensor([length, batch, segment_ids is not None, packs], device=device)
    table = _gathered(facts, group)
    lengths = tuple(row[0] for row in table)
    if min(lengths) < 1 or len({tuple(row[1:3]) for row in table}) > 1:
        raise InvalidInputError(
            "every process must hold at least one token of the same rows, and all or none give segment_ids; got "
            + ", ".join(
                f"process {i}: batch {b}, length {n}, segment_ids {bool(s)}" for i, (n, b, s, _) in enumerate(table)
            )
        )
    packed = any(row[3] for row in table)
    shards = ContextShards(group, lengths, packed=packed)
    if segment_ids is not None:
        return ContextShards(group, lengths, segment_ids, _document_of_segments(shards, segment_ids), packed=packed)
    if position_ids is None or opens is None:
        return shards
    first = position_ids[:, 0].to(torch.int64).expand(batch)
    document = shards.start - first
    if bool((document < 0).any()):
        raise InvalidInputError(
            f"position_ids of this shard begin at {int(first.max())}, and only {shards.start} tokens precede it"
        )
    own = torch.nn.functional.pad(opens.long(), (1, 0)).cumsum(-1) if bool(opens.any()) else None
    return ContextShards(group, lengths, own, document if bool((document > 0).any()) else None, packed=packed)


def _gathered(row: Tensor, group: Any) -> list[list[int]]:
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group=group)
    return torch.stack(rows).tolist()  # type: ignore[no-any-return]


def _document_of_segments(shards: ContextShards, segment_ids: Tensor) -> Tensor:
    """Where the document of this shard's first token begins, from the ends of all shards."""
    batch, length = segment_ids.shape
    opened, _ = segment_bounds(segment_ids, batch, length, segment_ids.device)
    ends = torch.stack([segment_ids[:, 0].long(), segment_ids[:, -1].long(), opened[:, -1]], -1)
    table = _gathered(ends.flatten(), shards.group)
    begins: list[int] = []
    for row in range(batch):
        begin, before, of_first = 0, None, 0
        for process, (start, flat) in enumerate(zip(shards.starts, table, strict=False)):
            first, last, tail = flat[3 * row : 3 * row + 3]
            if before is not None and first < before:
                raise InvalidInputError(
                    f"segment_ids must not decrease along the whole sequence: row {row} has {before} before the "
                    f"shard at position {start}, which begins with {first}"
                )
            if first != before:
                begin = start
            if process == shards.rank:
                of_first = begin
            before = last
            if tail > 0:
                begin = start + tail
        begins.append(of_first)
    return torch.tensor(begins, device=segment_ids.device)


_current: Any = None
"""A plain global, which compiled models guard on."""


@contextmanager
def context_parallel(mesh: Mesh) -> Iterator[None]:
    """Let models called inside take their inputs as shards of longer sequences.

    Each process passes its contiguous shard of the tokens; `position_ids` default to the places in the whole sequence.
    Attention of dynamask models and of converted models then sees the keys of the shards before it, exactly as in one
    process. Labels that are shifted inside a model would miss the token after the shard: pass `shift_labels`, and
    `num_items_in_batch` for a loss that sums over the processes (`split_sequence` prepares all of them).

    Args:
        mesh: a one-dimensional DeviceMesh, in the order of the shards.
    """
    global _current
    before, _current = _current, process_group(mesh)
    try:
        yield
    finally:
        _current = before


def current_group() -> Any:
    """Return the process group of the `context_parallel` block that this code runs in; None outside of one."""
    return _current


def split_sequence(
    mesh: Mesh,
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Cut a batch into this process's shard.

    Args:
        mesh: the processes that share the sequence.
        input_ids: (B, N) int64, the whole sequence, the same in every process; N at least the number of processes.
        labels: (B, N) int64 as transformers takes them (not shifted), -100 where none; None: input_ids.
        position_ids: (B, N) position of each token inside its document; positions that start over mark packed
            documents, whose first tokens are no targets. None: one document per row.

    Returns:
        Arguments of a causal LM: `input_ids`, `position_ids`, `labels` and `shift_labels`, (B, n) each, and
        `num_items_in_batch`, (): the targets of all shards, so that the losses of the processes sum to the loss of the
        whole sequence.

    Raises:
        InvalidInputError: fewer tokens than processes.
    """
    group = process_group(mesh)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, length = input_ids.shape
    if length < size:
        raise InvalidInputError(f"a sequence of {length} tokens cannot be split over {size} processes")
    if position_ids is None:
        position_ids = torch.arange(length, device=input_ids.device)[None]
    position_ids = position_ids.expand(batch, length)
    targets = torch.full_like(input_ids, -100)
    targets[:, :-1] = (input_ids if labels is None else labels)[:, 1:]
    targets[:, :-1].masked_fill_(position_ids[:, 1:] != position_ids[:, :-1] + 1, -100)
    bounds = [length * i // size for i in range(size + 1)]
    own = slice(bounds[rank], bounds[rank + 1])
    return {
        "input_ids": input_ids[:, own].contiguous(),
        "position_ids": position_ids[:, own].contiguous(),
        "labels": (input_ids if labels is None else labels)[:, own].contiguous(),
        "shift_labels": targets[:, own].contiguous(),
        "num_items_in_batch": (targets != -100).sum(),
    }
