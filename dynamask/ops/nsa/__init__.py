"""Native Sparse Attention (arXiv 2502.11089), a rival: compressed blocks, selected blocks, sliding window."""

from dynamask.ops.nsa.blocks import BlockLayout, block_layout, nsa_attention

__all__ = ["BlockLayout", "block_layout", "nsa_attention"]
