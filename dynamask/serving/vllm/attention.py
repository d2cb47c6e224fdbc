"""The attention of a served model: one state for all layers, and the operator that reads and writes it.

vLLM hands out blocks of one size. A state per layer would have to be as large as the largest layer's, because windows
differ; one state that holds the slots of all layers, one after the other, wastes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from dynamask.serving.state import LayerState, Pools
from dynamask.serving.vllm.backend import BoundedMetadata
from dynamask.serving.vllm.names import BACKEND, STATE


class SequenceState(nn.Module, MambaBase):
    """The live keys of all layers, as a layer of constant state.

    Args:
        layers: what each attention layer does with its slots.
        key_dim, value_dim: D and Dv.
        dtype: of keys and values.
    """

    def __init__(self, layers: list[LayerState], key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers, self.key_dim, self.value_dim, self.dtype = layers, key_dim, value_dim, dtype
        self.kv_cache: tuple[Tensor, ...] = ()

    @property
    def slots(self) -> int:
        """Return how many keys a sequence keeps at most, over all layers and heads."""
        return self.layers[-1].last

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of keys, values, ranks and positions of one sequence."""
        return (self.slots, self.key_dim), (self.slots, self.value_dim), (self.slots,), (self.slots,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of keys, values, ranks and positions."""
        return self.dtype, self.dtype, torch.float32, torch.int32

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Return the backend whose metadata the operator reads."""
        return MambaAttentionBackendEnum[BACKEND]

    def attend(
        self, index: int, metadata: BoundedMetadata, query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None
    ) -> Tensor:
        """Attend from the tokens of a step in layer `index`.

        Args:
            index: of the layer.
            metadata: the sequences of the step.
            query: (T, H, D).
            key, value: (T, G, D) and (T, G, Dv).
            ranks: (T, G) float32, or None: the newest are kept.

        Returns:
            (T, H, Dv).
        """
        layer, pools = self.layers[index], Pools(*self.kv_cache)
        output = query.new_empty(*query.shape[:2], self.value_dim)
        if metadata.blocks.numel():
            rows: Any = slice(0, len(metadata.blocks)) if metadata.rows is None else metadata.rows
            output[rows] = layer.step(
                pools,
                metadata.blocks,
                metadata.seen,
                query[rows],
                key[rows],
                value[rows],
                None if ranks is None else ranks[rows],
                fewest=metadata.fewest,
                most=metadata.most,
            )
        for block, seen, start, count in metadata.chunks:
            part = slice(start, start + count)
            heads, keys, values = (each[part].transpose(0, 1) for each in (query, key, value))
            given = None if ranks is None else ranks[part].transpose(0, 1)
            output[part] = layer.extend(pools, block, seen, heads, keys, values, given).transpose(0, 1)
        return output


class BoundedAttention(nn.Module):
    """Stands in a vLLM model where its `Attention` was: same call, other keys.

    Args:
        state: of all layers.
        index: of this layer in the state.
        heads: H, query heads.
        groups: G, key/value heads.
    """

    def __init__(self, state: SequenceState, index: int, heads: int, groups: int) -> None:
        super().__init__()
        self.index, self.heads, self.groups = index, heads, groups
        self.key_dim, self.value_dim = state.key_dim, state.value_dim
        self.ranks: Tensor | None = None  # of the call, set by the module around this one
        # Ranks keys by their values, in the paper's form. In a tuple: it is the outer module's, under its name there.
        self.gate: tuple[nn.Module, ...] = ()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """(T, H·D), (T, G·D) and (T, G·Dv) -> (T, H·Dv)."""
        query = query.view(-1, self.heads, self.key_dim)
        key = key.reshape(-1, self.groups, self.key_dim)
        value = value.reshape(-1, self.groups, self.value_dim)
        ranks = self.ranks
        for gate in self.gate:
            ranks = gate(value.transpose(0, 1)[None])[0].transpose(0, 1)
        output = query.new_empty(query.shape[0], self.heads, self.value_dim)
        torch.ops.vllm.dynamask_bounded_attention(query, key, value, ranks, output, self.index)
        return output.flatten(1)


def bounded_attention(
    query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None, output: Tensor, index: int
) -> None:
    """Write the attention of layer `index` to `output` (T, H, Dv)."""
    context = get_forward_context()
    metadata = context.attn_metadata
    if metadata is None:  # vLLM measures its memory
        output.zero_()
        return
    mine = metadata[STATE]
    count = mine.tokens
    state: SequenceState = context.no_compile_layers[STATE]
    given = None if ranks is None else ranks[:count]
    output[:count] = state.attend(index, mine, query[:count], key[:count], value[:count], given)
    output[count:] = 0


def _bounded_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, ranks: Tensor | None, output: Tensor, index: int
) -> None:
    return None


direct_register_custom_op(
    op_name="dynamask_bounded_attention",
    op_func=bounded_attention,
    mutates_args=["output"],
    fake_impl=_bounded_attention_fake,
)


__all__ = ["BoundedAttention", "SequenceState"]
