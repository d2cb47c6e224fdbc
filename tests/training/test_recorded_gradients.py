"""A recorded step gives the loss and the gradients of the step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from dynamask import convert
from dynamask.convert.attention import call_facts
from dynamask.convert.learn_ranks import run_decoder
from dynamask.errors import InvalidInputError
from dynamask.training import RecordedGradients
from dynamask.training.recorded_gradients import _renew

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 512}


def converted() -> nn.Module:
    torch.manual_seed(0)
    model = convert.upcycle(LlamaForCausalLM(LlamaConfig(**SHAPE)), 32, local=8, sinks=2)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.rank_predictor.down.weight)
    return model.train()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("ranks_learn", [False, True])
def test_same_gradients_as_the_step(ranks_learn: bool) -> None:
    model = converted().cuda()
    model.config.rank_loss_weight = float(ranks_learn)  # type: ignore[union-attr]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

    first, second = (torch.randint(0, 64, (1, 300), device="cuda") for _ in range(2))
    step = RecordedGradients(loss_of, model.parameters(), first)
    for ids in (second, first):
        loss = step(ids)
        found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        expected = loss_of(ids)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        for gradient, parameter in zip(found, model.parameters(), strict=True):
            assert (gradient is None) == (parameter.grad is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)
        model.zero_grad(set_to_none=True)
    with pytest.raises(InvalidInputError, match="another step"):
        step(first[:, :200])
    step(first)
    with pytest.raises(InvalidInputError, match="does not accumulate"):
        step(first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_recordings_of_several_shapes_share_their_memory() -> None:
    model = converted().cuda()

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

    pool = torch.cuda.graph_pool_handle()
    texts = [torch.randint(0, 64, (1, length), device="cuda") for length in (300, 500, 120)]
    steps = [RecordedGradients(loss_of, model.parameters(), ids, pool=pool) for ids in texts]
    for number in (0, 1, 2, 1, 0, 2):
        ids = torch.randint_like(texts[number], 64)
        loss = steps[number](ids)
        found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
        expected = loss_of(ids)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        own = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-5)
        model.zero_grad(set_to_none=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_a_loss_that_is_held_does_not_end_the_recording() -> None:
    layer = nn.Linear(8, 8, device="cuda")
    inputs = torch.randn(4, 8, device="cuda")
    held = layer(inputs).square().mean()
    held.backward(retain_graph=True)
    expected = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
    layer.zero_grad(set_to_none=True)
    step = RecordedGradients(lambda x: layer(x).square().mean(), layer.parameters(), inputs)
    torch.testing.assert_close(step(inputs), held.detach())
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_a_process_goes_on_after_a_recording_that_failed() -> None:
    layer = nn.Linear(8, 8, device="cuda")
    inputs = torch.randn(4, 8, device="cuda")

    def waits(x: torch.Tensor) -> torch.Tensor:
        loss = layer(x).square().mean() + torch.rand((), device="cuda") * 0
        return loss * float(loss.detach() > -1)

    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="captur"):
        RecordedGradients(waits, layer.parameters(), inputs)
    assert torch.cuda.current_stream() == stream
    assert all(parameter.grad is None for parameter in layer.parameters())
    drawn = torch.rand(1000, device="cuda")
    assert 0.4 < drawn.mean().item() < 0.6
    state = torch.cuda.get_rng_state()
    assert not torch.equal(torch.rand(1000, device="cuda"), drawn)
    torch.cuda.set_rng_state(state)
    expected = layer(inputs).square().mean()

    def draws(x: torch.Tensor) -> torch.Tensor:
        return layer(x).square().mean() + torch.rand_like(x).sum() * 0  # type: ignore[no-any-return]

    step = RecordedGradients(draws, layer.parameters(), inputs)
    torch.testing.assert_close(step(inputs), expected.detach())


def test_renewed_nodes_leave_the_parameter_as_it_is() -> None:
    layer = nn.Linear(3, 2)
    held = layer(torch.ones(1, 3)).sum()
    held.backward(retain_graph=True)
    node = torch.autograd.graph.get_gradient_edge(layer.weight).node
    places = [parameter.data_ptr() for parameter in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    _renew(list(layer.parameters()))
    assert torch.autograd.graph.get_gradient_edge(layer.weight).node is not node
    assert [parameter.data_ptr() for parameter in layer.parameters()] == places
    layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(2, 3))  # type: ignore[arg-type]


def test_recorded_steps_are_refused_without_a_gpu() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(InvalidInputError, match="lie on"):
        RecordedGradients(lambda x: layer(x).sum(), layer.parameters(), torch.zeros(1, 2))
    with pytest.raises(InvalidInputError, match="needs inputs"):
        RecordedGradients(lambda: layer.weight.sum(), layer.parameters())


def test_a_training_step_does_not_look_for_packed_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' search waits for the device, once per call and once more where layers are recomputed."""
    model = converted()
    ids = torch.randint(0, 64, (2, 48))
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    def looked(*arguments: object) -> None:
        raise AssertionError("transformers looked for packed documents")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked)
    loss = model(input_ids=ids, labels=ids, use_cache=False)
    loss.loss.backward()
    assert torch.equal(loss.logits, expected)
    facts = call_facts(2, 48, None, None, 0, ids.device)
    run_decoder(model, ids, facts).sum().backward()
