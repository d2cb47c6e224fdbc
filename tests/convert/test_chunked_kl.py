"""The divergence in chunks equals the divergence of all logits, gradients included."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from dynamask import InvalidInputError
from dynamask.convert.chunked_kl import chunked_kl
from dynamask.training.loss import output_head


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_the_divergence_of_all_logits(masked: bool, temperature: float) -> None:
    hidden = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 7, 4, dtype=torch.float64)
    student, teacher = torch.nn.Linear(5, 11).double(), torch.nn.Linear(4, 11).double()
    mask = torch.rand(2, 7) > 0.4 if masked else None
    parameters = list(student.parameters())
    loss = chunked_kl(hidden, other, student, teacher, parameters, mask=mask, temperature=temperature, chunk=3)
    given = (student(hidden) / temperature).log_softmax(-1)
    target = (teacher(other) / temperature).log_softmax(-1)
    each = F.kl_div(given, target, log_target=True, reduction="none").sum(-1) * temperature**2
    expected = each.mean() if mask is None else each[mask].mean()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    wanted = torch.autograd.grad(3 * expected, [hidden, *parameters])
    found = torch.autograd.grad(3 * loss, [hidden, *parameters])
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_labels_take_a_share_of_the_loss(share: float) -> None:
    hidden = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    other, head = torch.randn(2, 7, 5, dtype=torch.float64), torch.nn.Linear(5, 11).double()
    mask, labels = torch.rand(2, 7) > 0.3, torch.randint(-1, 11, (2, 7))
    parameters = list(head.parameters())
    options: dict[str, Any] = {"mask": mask, "temperature": 2.0, "chunk": 3}
    divergence = chunked_kl(hidden, other, head, head, parameters, **options)
    counted = labels.masked_fill(~mask, -100).masked_fill(labels < 0, -100)
    entropy = F.cross_entropy(head(hidden).flatten(0, 1), counted.flatten())
    expected = (1 - share) * divergence + share * entropy
    loss = chunked_kl(hidden, other, head, head, parameters, **options, labels=labels, label_share=share)
    torch.testing.assert_close(loss.double(), expected.double(), atol=1e-6, rtol=1e-6)
    wanted = torch.autograd.grad(expected, [hidden, *parameters], allow_unused=True)
    for one, two in zip(torch.autograd.grad(loss, [hidden, *parameters]), wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    with pytest.raises(InvalidInputError, match="needs labels"):
        chunked_kl(hidden, other, head, head, parameters, label_share=share)


@pytest.mark.parametrize("broken", ["nothing", "compiler", "result"])
def test_what_is_compiled_is_checked(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["dynamask.convert.chunked_kl"]
    calls: list[int] = []

    def compile_(function: Any) -> Any:
        if broken == "compiler":
            raise RuntimeError("no compiler")

        def compiled(*args: Any) -> Any:
            calls.append(1)
            total, slope = function(*args)
            return total, slope * (1.1 if broken == "result" else 1.0)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module, "_WORTH_COMPILING", 1)
    given = torch.randn(4, 9), torch.randn(4, 9), torch.rand(4), 1.0
    expected = module.divergence_and_slope(*given)
    with nullcontext() if broken == "nothing" else pytest.warns(UserWarning, match="runs uncompiled"):
        found = module._divergence_on_gpu(*given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(module._divergence_on_gpu(*given), expected)
    assert len(calls) == {"nothing": 3, "compiler": 0, "result": 1}[broken]


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    head = torch.nn.Linear(5, 11).requires_grad_(False)
    loss = chunked_kl(torch.randn(1, 3, 5), torch.randn(1, 3, 5), head, head, list(head.parameters()))
    assert not loss.requires_grad
    assert loss > 0


@pytest.mark.parametrize("name", ["gemma2", "granite", "llama"])
@torch.no_grad()
def test_the_output_head_gives_the_models_logits(name: str, shape: dict[str, Any]) -> None:
    model: Any = {
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**shape, head_dim=8, final_logit_softcapping=3.0)),
        "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**shape, logits_scaling=5.0)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**shape)),
    }[name]()
    tokens = torch.randint(3, 300, (1, 9))
    torch.testing.assert_close(output_head(model)(model.model(tokens).last_hidden_state), model(tokens).logits)
