"""Native sparse attention (NSA, arXiv 2502.11089): compressed, selected and sliding branches, learned gates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from dynamask.errors import InvalidInputError
from dynamask.mixers.base import GroupedQueryMixer, SequenceInfo
from dynamask.mixers.head_shard import HeadShard
from dynamask.ops.nsa.blocks import BlockLayout, block_layout, nsa_attention


class NativeSparseAttention(GroupedQueryMixer):
    """Grouped-query attention whose queries see block means, the best blocks, and a sliding window.

    On a GPU, flash-linear-attention's kernels run the selected branch where they are installed and take it: float16 or
    bfloat16, blocks of a power of two from 16 on, no padding, no packing, as many queries as keys. See
    `dynamask.ops.nsa.blocks` for the rest.
    """

    sub_configuration: ClassVar[str | None] = "nsa"

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.block_size, self.block_counts = config.nsa["block_size"], config.nsa["block_counts"]
        self.window = config.nsa["window"]
        self.g_proj = nn.Linear(config.hidden_size, self.num_heads * 3, bias=False)

    def hold_heads(self, shard: HeadShard, group: Any) -> None:
        """Refuse tensor parallelism: gates and blocks are not split."""
        raise InvalidInputError("nsa cannot be split over processes by heads (tp_plan); use FSDP")

    @classmethod
    def default_dimensions(cls, config: Any, given: dict[str, Any]) -> dict[str, int | None]:
        """Choose blocks, selection and window so that a query sees about as many keys in the last two branches as
        `config.windows` gives on average."""
        windows = [window for layer in config.head_windows for window in layer]
        budget = sum(windows) // len(windows)
        block = given.get("block_size") or max(4, min(64, budget // 8))
        return {
            "block_size": block,
            # The first, current and previous block are always among them.
            "block_counts": given.get("block_counts") or max(4, budget // 2 // block),
            "window": given.get("window") or max(1, budget // 2),
        }

    @classmethod
    def cache_layer(cls, config: Any, layer_idx: int) -> CacheLayerMixin:
        """Make transformers' growing layer: any block may be selected again, so every key is kept."""
        return DynamicLayer()

    def forward(self, hidden_states: Tensor, sequence: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        query, key, value = self.project(hidden_states, sequence)
        if cache is not None:
            key, value = self.remember(cache, key, value, sequence)
        gates = self.g_proj(hidden_states).sigmoid().unflatten(-1, (self.num_heads, 3)).transpose(1, 2)
        layout = sequence.blocks
        if layout is None:
            layout = self.layout(sequence, key.shape[2])
        output = nsa_attention(
            *(query, key, value, gates),
            block_counts=self.block_counts,
            window=self.window,
            layout=layout,
        )
        return self.merge_heads(output)

    def layout(self, sequence: SequenceInfo, length: int) -> BlockLayout:
        """Lay out the `length` keys of the batch in blocks."""
        ids = sequence.position_ids
        return block_layout(*(len(ids), length, self.block_size, ids.device, sequence.segment_ids, sequence.key_mask))

    def prepared(self, sequence: SequenceInfo) -> SequenceInfo:
        """See `Mixer.prepared`: blocks, which packed documents need a look at the data for."""
        if sequence.plain:  # counted, not looked up: compiled layers had better do it themselves
            return sequence
        length = sequence.position_ids.shape[1] if sequence.length is None else sequence.length
        return replace(sequence, blocks=self.layout(sequence, length))
