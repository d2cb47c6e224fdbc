"""Blocks of live keys against attention over the whole text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynamask.ops import interval_attention, key_expiry
from dynamask.serving.state import LayerState, Pools

HEADS, GROUPS, DIM, BLOCKS = 4, 2, 8, 7


def garbage(slots: int) -> Pools:
    """Blocks as their last owners left them, or worse."""
    keys = torch.full((BLOCKS, slots, DIM), float("nan"))
    positions = torch.randint(0, 1 << 20, (BLOCKS, slots), dtype=torch.int32)
    return Pools(keys, keys.clone(), torch.full((BLOCKS, slots), float("inf")), positions)


class Sequence:
    """A text's tensors, and the attention over all of it."""

    def __init__(self, length: int, layer: LayerState, seed: int, *, ties: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.query = torch.randn(HEADS, length, DIM, generator=generator)
        self.key = torch.randn(GROUPS, length, DIM, generator=generator)
        self.value = torch.randn(GROUPS, length, DIM, generator=generator)
        self.ranks = torch.randn(GROUPS, length, generator=generator)
        if ties:
            self.ranks = self.ranks.round()
        expiry = key_expiry(self.ranks[None], layer.windows, local=layer.local, sinks=layer.sinks)
        bias = self.ranks[None] if layer.bias_is_rank else None
        self.expected = interval_attention(
            self.query[None],
            self.key[None],
            self.value[None],
            expiry,
            bias=bias,
            scale=layer.scale,
            backend="reference",
        )[0]
        self.seen = 0
        self.outputs: list[Tensor] = []

    @property
    def left(self) -> int:
        return self.query.shape[1] - self.seen


def extend(layer: LayerState, pools: Pools, block: int, text: Sequence, count: int) -> None:
    part = slice(text.seen, text.seen + count)
    parts = (each[:, part] for each in (text.query, text.key, text.value, text.ranks))
    text.outputs.append(layer.extend(pools, block, text.seen, *parts))
    text.seen += count


def step(layer: LayerState, pools: Pools, blocks: list[int], texts: list[Sequence]) -> None:
    seen = [text.seen for text in texts]
    tokens = [
        torch.stack([getattr(text, name)[:, text.seen] for text in texts])
        for name in ("query", "key", "value", "ranks")
    ]
    output = layer.step(pools, torch.tensor(blocks), torch.tensor(seen), *tokens, fewest=min(seen), most=max(seen))
    for text, row in zip(texts, output, strict=True):
        text.outputs.append(row[:, None])
        text.seen += 1


@settings(max_examples=25, deadline=None)
@given(
    windows=st.sampled_from([(6, 6), (3, 9), (12, 4), (70, 5)]),
    kept=st.sampled_from([(0, 0), (1, 1), (2, 1), (3, 0)]),
    paper=st.booleans(),
    chunks=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
def test_any_chunks_and_steps_equal_attention_over_the_whole_text(
    windows: tuple[int, int], kept: tuple[int, int], paper: bool, chunks: list[tuple[int, int]], seed: int
) -> None:
    layer = LayerState(windows, local=kept[0], sinks=kept[1], first=3, scale=0.3, bias_is_rank=paper)
    texts = [Sequence(90, layer, seed + i, ties=bool(seed % 2)) for i in range(3)]
    pools, blocks = garbage(layer.last + 2), [4, 1, 6]
    for which, count in chunks:  # chunks of one text, and between them a token of each of the others
        if count <= texts[which].left:
            extend(layer, pools, blocks[which], texts[which], count)
        others = [i for i in range(3) if i != which and texts[i].left]
        step(layer, pools, [blocks[i] for i in others], [texts[i] for i in others])
    for text in texts:
        if text.outputs:
            torch.testing.assert_close(torch.cat(text.outputs, 1), text.expected[:, : text.seen], atol=1e-5, rtol=1e-5)


def test_a_block_serves_the_next_sequence_without_being_cleared() -> None:
    layer = LayerState((5, 9), local=2, sinks=1, first=0, scale=0.5)
    pools = garbage(layer.last)
    for seed, chunk in ((0, 30), (1, 1), (2, 7)):
        text = Sequence(40, layer, seed)
        extend(layer, pools, 2, text, chunk)
        while text.left:
            step(layer, pools, [2], [text])
        torch.testing.assert_close(torch.cat(text.outputs, 1), text.expected, atol=1e-5, rtol=1e-5)


def test_other_blocks_and_other_layers_slots_stay_as_they_are() -> None:
    layer = LayerState((5, 9), local=2, sinks=1, first=3, scale=0.5)
    pools = Pools(*(torch.zeros_like(pool) for pool in garbage(layer.last + 4)))
    text = Sequence(40, layer, 0)
    extend(layer, pools, 2, text, 30)
    step(layer, pools, [2], [text])
    for pool in pools:
        touched = pool.flatten(2).any(-1) if pool.dim() == 3 else pool != 0
        outside = touched.clone()
        outside[2, layer.first : layer.last] = False
        assert touched[2, layer.first : layer.last].any()
        assert not outside.any()


@pytest.mark.parametrize("kept", [(4, 2), (6, 0)])
def test_windows_too_small_for_what_is_always_kept_are_refused(kept: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="local"):
        LayerState((5, 9), local=kept[0], sinks=kept[1], first=0, scale=1.0)
