"""Options of dma's gate and the rivals' distance penalty: what each does, beside what every mixer promises."""

from __future__ import annotations

import pytest
import torch

from dynamask import BoundedCache
from dynamask.errors import InvalidInputError
from dynamask.models import DynamaskForCausalLM, new_cache
from dynamask.ops.expiry import key_expiry
from dynamask_lab.legacy import OldGate
from dynamask_lab.legacy.alibi import DistancePenalty, slopes
from lab.tests.old_models import tiny_config, tiny_model


def tokens(rows: int = 2, length: int = 30) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(0))


def test_slopes_spread_geometrically() -> None:
    assert slopes(3, 0.5, 4.0).tolist() == pytest.approx([2.0, 0.5, 0.125])
    assert slopes(1, 0.5, 4.0).tolist() == [0.5]
    assert slopes(4, 0.25, 1.0).tolist() == [0.25] * 4


@torch.no_grad()
@pytest.mark.parametrize("zero", ["gate", "delta"])
def test_an_untrained_gate_is_a_sliding_window_whichever_factor_is_zero(zero: str) -> None:
    torch.manual_seed(0)
    dma = DynamaskForCausalLM(tiny_config("dma", gate_init=zero, recency=0.0, local=0)).double().eval()
    swa = DynamaskForCausalLM(tiny_config("swa")).double().eval()
    swa.load_state_dict({name: tensor for name, tensor in dma.state_dict().items() if ".gate." not in name})
    torch.testing.assert_close(dma(tokens()).logits, swa(tokens()).logits)


def test_delta_at_zero_learns_contents_from_the_first_step_and_the_gate_at_zero_does_not() -> None:
    gradients = {}
    for zero in ("gate", "delta"):
        torch.manual_seed(0)
        model = DynamaskForCausalLM(tiny_config("dma", gate_init=zero, local=0))
        model(tokens(), labels=tokens()).loss.backward()
        gradients[zero] = [layer.mixer.gate.delta.weight.grad.abs().max().item() for layer in model.model.layers]
    assert gradients["gate"] == [0.0, 0.0]
    assert min(gradients["delta"]) > 0


def test_noise_is_for_training_ranks_alone() -> None:
    gate = OldGate(2, 8, rank_noise=1.0)
    scores = torch.randn(3, 2, 40, requires_grad=True)
    assert torch.equal(gate.eval().ranks(scores), scores)
    noisy = gate.train().ranks(scores)
    assert not noisy.requires_grad
    assert not torch.equal(noisy, scores)
    assert torch.equal(OldGate(2, 8).train().ranks(scores), scores)


def test_noise_of_scale_one_samples_in_proportion_to_exp_score() -> None:
    torch.manual_seed(0)
    gate = OldGate(1, 8, rank_noise=1.0).train()
    scores = torch.tensor([0.0, 1.0, 2.0]).log1p().expand(20_000, 1, 3).contiguous()  # weights 1, 2, 3
    best = gate.ranks(scores).argmax(-1).flatten()
    shares = torch.bincount(best, minlength=3) / len(best)
    torch.testing.assert_close(shares, torch.tensor([1.0, 2.0, 3.0]) / 6, atol=0.02, rtol=0)
    # And all three in the end: a window of two keeps two of them, never more.
    expiry = key_expiry(gate.ranks(scores), 2)
    assert ((expiry > 2).sum(-1) == 2).all()


def test_training_with_noise_is_still_causal() -> None:
    model = tiny_model("dma", rank_noise=1.0).train()
    before, after = tokens(), tokens()
    after[:, 20:] = (after[:, 20:] + 7) % 50
    outputs = []
    for ids in (before, after):
        torch.manual_seed(1)
        outputs.append(model(ids).logits[:, :20])
    torch.testing.assert_close(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["mha", "swa"])
def test_the_penalty_is_one_per_position_of_distance(attention: str) -> None:
    model = tiny_model(attention, distance_penalty=0.3, recency_spread=2.0)
    mixer = model.model.layers[0].mixer
    hidden = torch.randn(1, 12, 32).double()
    from dynamask.mixers import SequenceInfo

    sequence = SequenceInfo(torch.arange(12)[None])
    query, key, value = mixer.project(hidden, sequence)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    slope = torch.tensor([0.6, 0.15]).double().repeat_interleave(2)[:, None, None]
    logits = query @ key.repeat_interleave(2, 1).mT / 8**0.5 - slope * distance
    hidden_keys = (distance < 0) | ((distance >= 6) if attention == "swa" else False)
    expected = logits.masked_fill(hidden_keys, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(mixer(hidden, sequence), mixer.merge_heads(expected), rtol=1e-5, atol=1e-6)


def test_a_penalty_learns() -> None:
    penalty = DistancePenalty(2, 0.1)
    penalty(torch.arange(5)[None]).sum().backward()
    assert (penalty.log_slope.grad > 0).all()


@torch.no_grad()
def test_layers_of_both_bounded_kinds_share_a_bounded_cache() -> None:
    model = tiny_model("dma", layer_attention=["swa", "dma"], local=2)
    cache = new_cache(model.config)
    assert isinstance(cache, BoundedCache)
    model(tokens(), past_key_values=cache)
    assert [(set(layer.windows), layer.local) for layer in cache.layers] == [({6}, 6), ({6}, 2)]
    with pytest.raises(InvalidInputError, match="mha"):
        BoundedCache(tiny_config("dma", layer_attention=["mha", "dma"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_attention": ["dma"]}, "each of the 2 layers; got 1"),
        ({"layer_attention": ["dma", "dna"]}, "attention must be one of"),
        ({"gate_init": "both"}, "gate_init must be one of gate, delta"),
        ({"recency_spread": 0.5}, "at least 1"),
        ({"rank_power": 0.0}, "rank_power is a power above 0"),
        ({"rank_noise": -1.0}, "rank_noise cannot be negative"),
        ({"distance_penalty": -1.0}, "distance_penalty cannot be negative"),
    ],
)
def test_options_without_meaning_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tiny_config("dma", **fields)
