"""Dynamic mask attention as a layer: what ranks, what learns, and which caches carry it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from dynamask import BoundedCache, DynamaskForCausalLM, InvalidInputError
from dynamask.mixers.rank_loss import rank_target
from dynamask.models import new_cache
from dynamask.models.modeling import AUXILIARY_WEIGHT
from tests.conftest import tiny_config, tiny_model

IDS = torch.randint(0, 50, (5, 30), generator=torch.Generator().manual_seed(0))


def test_ranks_learn_by_a_loss_that_is_part_of_the_loss_and_reaches_nothing_else() -> None:
    model = tiny_model("dma").train()
    output = model(IDS, labels=IDS)
    plain = tiny_model("dma").eval()(IDS, labels=IDS, use_cache=False)
    assert plain.aux_loss is None
    torch.testing.assert_close(output.loss, plain.loss + AUXILIARY_WEIGHT * output.aux_loss.float())
    output.aux_loss.backward()
    for name, parameter in model.named_parameters():
        learned = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert learned == ("rank_predictor" in name), name


def test_the_loss_is_a_mean_of_distances_to_future_attention() -> None:
    model = tiny_model("dma", num_hidden_layers=1, windows=40).train()
    mixer = model.model.layers[0].mixer
    seen = {}
    hook = mixer.register_forward_pre_hook(lambda module, inputs: seen.update(hidden=inputs[0], sequence=inputs[1]))
    aux = model(IDS).aux_loss
    hook.remove()
    query, key, _ = mixer.project(seen["hidden"], seen["sequence"])
    rows = [0, 4]  # one of four
    target, valid = rank_target(query[rows], key[rows], local=mixer.local)
    ranks = mixer.rank_predictor(seen["hidden"])[rows]
    torch.testing.assert_close(aux, (ranks - target)[valid].square().mean())


def test_ranks_learn_what_attention_looks_at() -> None:
    torch.manual_seed(0)
    model = tiny_model("dma", num_hidden_layers=1, windows=8, local=2).float().train()
    predictor = [p for name, p in model.named_parameters() if "rank_predictor" in name]
    optimizer = torch.optim.Adam(predictor, lr=0.01)
    losses = []
    for _ in range(60):
        loss = model(IDS, labels=IDS).aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_auxiliary_loss_scales_with_the_loss_under_gradient_accumulation() -> None:
    model = tiny_model("dma").train()
    whole = model(IDS[:1], labels=IDS[:1]).loss
    items = 29 * 4
    parts = [model(IDS[:1], labels=IDS[:1], num_items_in_batch=items).loss for _ in range(4)]
    torch.testing.assert_close(sum(parts), whole)
    (whole * 0).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_nothing_is_learned_without_gradients_or_in_evaluation() -> None:
    model = tiny_model("dma")
    assert model(IDS, use_cache=False).aux_loss is None
    with torch.no_grad():
        assert model.train()(IDS).aux_loss is None
    assert tiny_model("dma", ranking="paper").train()(IDS, labels=IDS).aux_loss is None


@torch.no_grad()
@pytest.mark.parametrize("ranking", ["learned", "paper"])
def test_a_new_model_is_a_sliding_window(ranking: str) -> None:
    torch.manual_seed(0)
    dma, swa = (DynamaskForCausalLM(tiny_config(name, ranking=ranking)).double().eval() for name in ("dma", "swa"))
    swa.load_state_dict({k: v for k, v in dma.state_dict().items() if ".gate." not in k and ".rank_pred" not in k})
    torch.testing.assert_close(dma(IDS).logits, swa(IDS).logits)


@torch.no_grad()
def test_bounded_layers_of_both_kinds_share_a_bounded_cache() -> None:
    model = tiny_model(["swa", "dma"], windows=[6, [3, 9]], local=2, sinks=1)
    cache = new_cache(model.config)
    assert isinstance(cache, BoundedCache)
    model(IDS, past_key_values=cache)
    assert [layer.keys.shape[1] for layer in cache.layers] == [12, 12]  # flat pools: the sum of the windows
    with pytest.raises(InvalidInputError, match="mha"):
        BoundedCache(tiny_config(["mha", "dma"]))


@torch.no_grad()
def test_a_full_cache_carries_ranks_through_crop_and_reorder() -> None:
    model = tiny_model("dma")
    expected = model(IDS[:2], use_cache=False).logits
    cache = DynamicCache()
    model(IDS[:2, :25], past_key_values=cache)
    cache.crop(-10)
    cache.reorder_cache(torch.tensor([1, 0]))
    logits = model(IDS[[1, 0], 15:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[[1, 0], 15:])


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"local": 1}, {"sinks": 0}, {"windows": 8}, {"windows": [[6, 7], 6]}])
def test_a_cache_of_another_model_is_refused(fields: dict) -> None:
    model = tiny_model("dma")
    cache = BoundedCache(tiny_config("dma", **fields))
    with pytest.raises(InvalidInputError):
        model(IDS, past_key_values=cache)


def test_a_copy_learns_alone() -> None:
    model = tiny_model("dma").train()
    twin = copy.deepcopy(model)
    twin(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_a_score_that_is_not_finite_ranks_and_is_not_added() -> None:
    model = tiny_model("dma", ranking="paper")
    gate = model.model.layers[0].mixer.gate
    forward = gate.forward

    def with_infinities(value: torch.Tensor) -> torch.Tensor:
        scores = forward(value).clone()
        scores[..., 2::7] = float("inf")
        scores[..., 3::7] = float("nan")
        return scores

    gate.forward = with_infinities
    tokens = torch.randint(0, 50, (2, 20))
    logits = model(tokens, use_cache=False).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(model(tokens, use_cache=True).logits, logits)


def test_ranks_with_slopes_agree_with_the_cache_padded_and_packed() -> None:
    config = {"windows": 12, "local": 3, "sinks": 1, "num_hidden_layers": 2}
    model = tiny_model("dma", slopes=[[0.03, 0.25], None], **config).eval()
    with torch.no_grad():
        full = model(IDS, use_cache=False).logits
        flat = tiny_model("dma", **config).eval()
        flat.load_state_dict(model.state_dict())
        assert not torch.allclose(flat(IDS, use_cache=False).logits, full)
        cache = new_cache(model.config)
        parts = [model(IDS[:, a:b], past_key_values=cache).logits for a, b in ((0, 11), (11, 12), (12, 30))]
        torch.testing.assert_close(torch.cat(parts, 1), full)
        mask = torch.ones(5, 34, dtype=torch.long)
        mask[:, :4] = 0
        padded = model(torch.cat([IDS[:, :4], IDS], 1), attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(padded[:, 4:], full)
        packed = model(
            torch.cat([IDS[:1], IDS[1:2]], 1),
            position_ids=torch.cat([torch.arange(30), torch.arange(30)])[None],
            use_cache=False,
        ).logits
        torch.testing.assert_close(packed, torch.cat([full[:1], full[1:2]], 1))


def test_steep_slopes_are_a_sliding_window_with_sinks() -> None:
    steep = tiny_model("dma", windows=8, local=2, sinks=2, slopes=[[100.0, 100.0]] * 2, num_hidden_layers=2).eval()
    sliding = tiny_model("swa", windows=8, sinks=2, num_hidden_layers=2).eval()
    sliding.load_state_dict(steep.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(steep(IDS, use_cache=False).logits, sliding(IDS, use_cache=False).logits)
    with pytest.raises(InvalidInputError, match="slopes"):
        tiny_config("dma", slopes=[[0.1, -1.0]] * 2, num_hidden_layers=2)
    with pytest.raises(InvalidInputError, match="slopes"):
        tiny_config("dma", slopes=[[0.1, 1.0]] * 2, num_hidden_layers=2, ranking="paper")
