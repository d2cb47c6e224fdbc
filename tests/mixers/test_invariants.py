"""What every mixer promises (design section 1), tested through the whole model with hypothesis."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from dynamask import DynamaskForCausalLM
from dynamask.models import new_cache
from tests.conftest import tiny_model

LENGTH = 30
few = settings(settings.get_profile("models"), suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**16)


def tokens(seed: int, rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@st.composite
def splits(draw: st.DrawFn) -> list[int]:
    """Lengths of the chunks a text is fed in: single tokens, pieces and a prefill in any order."""
    pieces, left = [], LENGTH
    while left:
        pieces.append(draw(st.sampled_from([1, 1, 1, 2, 5, 13]).map(lambda n, left=left: min(n, left))))
        left -= pieces[-1]
    return pieces


def fed_in_chunks(model, ids, pieces, cache, mask=None):
    done, logits = 0, []
    for piece in pieces:
        stop = done + piece
        seen = None if mask is None else mask[:, :stop]
        logits.append(model(ids[:, done:stop], attention_mask=seen, past_key_values=cache, use_cache=True).logits)
        done = stop
    return torch.cat(logits, dim=1)


@few
@given(seed=seeds, cut=st.integers(1, LENGTH - 1))
@torch.no_grad()
def test_causal(model: DynamaskForCausalLM, seed: int, cut: int) -> None:
    before, after = tokens(seed), tokens(seed)
    after[:, cut:] = tokens(seed + 1)[:, cut:]
    first, second = (model(ids, use_cache=False).logits for ids in (before, after))
    torch.testing.assert_close(first[:, :cut], second[:, :cut])


@few
@given(seed=seeds, pieces=splits())
@torch.no_grad()
def test_cached_is_uncached(model: DynamaskForCausalLM, seed: int, pieces: list[int]) -> None:
    ids = tokens(seed)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(fed_in_chunks(model, ids, pieces, new_cache(model.config)), expected)


@few
@given(seed=seeds, pieces=splits())
@torch.no_grad()
def test_a_cache_that_keeps_everything_serves_too(model: DynamaskForCausalLM, seed: int, pieces: list[int]) -> None:
    ids = tokens(seed)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(fed_in_chunks(model, ids, pieces, DynamicCache()), expected)


@few
@given(seed=seeds, cuts=st.lists(st.integers(1, LENGTH - 1), max_size=3, unique=True))
@torch.no_grad()
def test_packed_is_separate(model: DynamaskForCausalLM, seed: int, cuts: list[int]) -> None:
    ids = tokens(seed, rows=1)
    edges = [0, *sorted(cuts), LENGTH]
    parts = [ids[:, a:b] for a, b in itertools.pairwise(edges)]
    expected = torch.cat([model(part, use_cache=False).logits for part in parts], dim=1)
    lengths = torch.tensor([part.shape[1] for part in parts])
    segment_ids = torch.repeat_interleave(torch.arange(len(parts)), lengths)[None]
    torch.testing.assert_close(model(ids, segment_ids=segment_ids, use_cache=False).logits, expected)
    position_ids = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
    torch.testing.assert_close(model(ids, position_ids=position_ids, use_cache=False).logits, expected)


@few
@given(seed=seeds, padding=st.integers(1, LENGTH - 1), pieces=splits())
@torch.no_grad()
def test_left_padded_is_unpadded(model: DynamaskForCausalLM, seed: int, padding: int, pieces: list[int]) -> None:
    ids = tokens(seed)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    full = model(ids[:1], use_cache=False).logits[0]
    short = model(ids[1:, padding:], use_cache=False).logits[0]
    at_once = model(ids, attention_mask=mask, use_cache=False).logits
    chunked = fed_in_chunks(model, ids, pieces, new_cache(model.config), mask)
    for logits in (at_once, chunked):
        assert not logits.isnan().any()
        torch.testing.assert_close(logits[0], full)
        torch.testing.assert_close(logits[1, padding:], short)


@few
@given(seed=seeds, data=st.data())
@torch.no_grad()
def test_masks_with_holes_are_unpadded(model: DynamaskForCausalLM, seed: int, data: st.DataObject) -> None:
    ids = tokens(seed, rows=1)
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH))])
    mask[0, data.draw(st.integers(0, LENGTH - 1))] = True
    expected = model(ids[mask][None], use_cache=False).logits[0]
    at_once = model(ids, attention_mask=mask.long(), use_cache=False).logits
    pieces = data.draw(splits())
    for cache in (new_cache(model.config), DynamicCache()):
        chunked = fed_in_chunks(model, ids, pieces, cache, mask.long())
        assert not chunked.isnan().any()
        torch.testing.assert_close(chunked[mask], expected)
    torch.testing.assert_close(at_once[mask], expected)


def test_every_parameter_trains(model: DynamaskForCausalLM) -> None:
    ids = tokens(0)
    model.zero_grad()
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    model.eval()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # At window 1 the softmax has one term, so logits do not matter: so it should be.
    expected = ("q_proj", "k_proj", "q_norm", "k_norm") if model.config.windows == 1 else ()
    assert all(any(part in name for part in expected) for name in without), without


@pytest.mark.parametrize("ranking", ["learned", "paper"])
@torch.no_grad()
def test_untrained_dma_is_sliding_window_and_wide_dma_is_dense(ranking: str) -> None:
    ids = tokens(3)
    dma, swa, mha = (tiny_model(name, ranking=ranking) for name in ("dma", "swa", "mha"))
    for layer in dma.model.layers:
        torch.nn.init.zeros_(layer.mixer.gate.gate if ranking == "paper" else layer.mixer.rank_predictor.down.weight)
    shared = {name: t for name, t in dma.state_dict().items() if ".gate." not in name and ".rank_pred" not in name}
    swa.load_state_dict(shared)
    mha.load_state_dict(shared)
    torch.testing.assert_close(dma(ids).logits, swa(ids).logits)
    assert (dma(ids).logits - mha(ids).logits).abs().max() > 1e-3
    wide = tiny_model("dma", windows=LENGTH, ranking=ranking)
    wide.load_state_dict(dma.state_dict())
    torch.testing.assert_close(wide(ids).logits, mha(ids).logits)


@pytest.mark.parametrize("window", [6, 40])
@torch.no_grad()
def test_mla_absorbed_is_expanded(window: int) -> None:
    model = tiny_model("mla", windows=window, mla={"q_lora_rank": 12})
    mixer = model.model.layers[0].mixer
    heads = mixer.num_heads
    q_nope, q_rope = (
        torch.randn(2, heads, 1, mixer.nope_dim).double(),
        torch.randn(2, heads, 1, mixer.rope_dim).double(),
    )
    latent, k_rope = torch.randn(2, 1, 9, mixer.rank).double(), torch.randn(2, 1, 9, mixer.rope_dim).double()
    from dynamask.mixers import SequenceInfo

    sequence = SequenceInfo(torch.full((2, 1), 8))
    arguments = (q_nope, q_rope, latent, k_rope, sequence)
    torch.testing.assert_close(mixer._absorbed(*arguments), mixer._expanded(*arguments))
