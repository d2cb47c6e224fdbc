"""What vLLM knows of a step: which sequences it extends, by how many tokens, and in which blocks they live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder


@dataclass
class BoundedMetadata:
    """The sequences of one step.

    Attributes:
        tokens: of all sequences together.
        chunks: of the sequences that get several tokens: block, tokens seen before, first token, number of tokens.
        blocks: (R,) int64, blocks of the R sequences that get one token.
        seen: (R,) int64, tokens that each of them has seen before.
        rows: (R,) int64, their tokens in the batch; None where they are the first R.
        fewest, most: bounds of `seen`.
    """

    tokens: int
    chunks: list[tuple[int, int, int, int]]
    blocks: Tensor
    seen: Tensor
    rows: Tensor | None
    fewest: int
    most: int


class BoundedBackend(AttentionBackend):
    """Attention over live keys, as vLLM lists backends."""

    @staticmethod
    def get_name() -> str:
        """Return the name in vLLM's messages."""
        return "DYNAMASK"

    @staticmethod
    def get_builder_cls() -> type[BoundedMetadataBuilder]:
        """Return the class that makes the metadata of a step."""
        return BoundedMetadataBuilder

    @staticmethod
    def get_impl_cls() -> Any:
        """Refuse: the layers compute attention themselves, see `dynamask.serving.vllm.attention`."""
        raise NotImplementedError("the attention of dynamask models has no implementation class")

    @classmethod
    def is_ssm(cls) -> bool:
        """Whether vLLM hands out states of constant size: it does."""
        return True


class BoundedMetadataBuilder(AttentionMetadataBuilder[BoundedMetadata]):
    """Makes `BoundedMetadata` of what vLLM's model runner knows."""

    reorder_batch_threshold: int = 1
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> BoundedMetadata:
        """Return the sequences of a step."""
        common = common_attn_metadata
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        # Exact: an upper bound it is under speculative decoding alone, which is refused.
        lengths = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
        table = common.block_table_tensor[: common.num_reqs, 0]
        single, chunks, several = [], [], []
        for row, (start, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
            if end - start == 1:
                single.append((row, start, length - 1))
            elif end > start:
                several.append((row, length - (end - start), start, end - start))
        if several:
            where = table.tolist()
            chunks = [(where[row], *rest) for row, *rest in several]
        device = table.device
        seen = [before for _, _, before in single]
        first = [start for _, start, _ in single] == list(range(len(single)))
        in_front = [row for row, _, _ in single] == list(range(len(single)))
        rows = torch.tensor([row for row, _, _ in single], dtype=torch.int64, device=device)
        return BoundedMetadata(
            tokens=starts[-1],
            chunks=chunks,
            blocks=(table[: len(single)] if in_front else table[rows]).long(),
            seen=torch.tensor(seen, dtype=torch.int64, device=device),
            rows=None if first else torch.tensor([start for _, start, _ in single], dtype=torch.int64, device=device),
            fewest=min(seen, default=0),
            most=max(seen, default=0),
        )


__all__ = ["BoundedBackend", "BoundedMetadata", "BoundedMetadataBuilder"]
