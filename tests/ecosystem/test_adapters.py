"""Adapters, optimizers and compilers around a training step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dynamask import InvalidInputError
from tests.ecosystem.conftest import dense_model, predictors

pytestmark = pytest.mark.slow


def _gradients(model: Any, call: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    model.zero_grad()
    loss = call(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_lora_trains_saves_loads_and_merges(converted: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(converted)
    adapted = peft.get_peft_model(converted, peft.LoraConfig(task_type="CAUSAL_LM", r=4)).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    moved = {name for name, p in adapted.named_parameters() if "lora_B" in name and p.abs().max() > 0}
    assert {name.split(".lora_B")[0].rpartition(".")[2] for name in moved} == {"q_proj", "v_proj", "up", "down"}
    adapted.eval()
    expected = adapted(tokens).logits
    assert (expected - base.eval()(tokens).logits).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(tokens).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(tokens).logits, merged(tokens).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model: Any, tokens: torch.Tensor, reentrant: bool) -> None:
    model.train()
    plain = _gradients(model, model, tokens)
    if reentrant and hasattr(model.config, "rank_loss_weight"):
        with pytest.raises(InvalidInputError, match="use_reentrant=False"):
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model.config.rank_loss_weight = 0.0
        plain = _gradients(model, model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(_gradients(model, model, tokens), plain)


def test_a_compiled_step_has_the_same_gradients(model: Any, tokens: torch.Tensor) -> None:
    model.train()
    plain = _gradients(model, model, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(_gradients(model, compiled, tokens), plain, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


def test_a_compiled_step_of_a_model_that_is_not_converted(tokens: torch.Tensor) -> None:
    model = dense_model().train()
    model.set_attn_implementation("eager")
    plain = _gradients(model, model, tokens)
    model.set_attn_implementation("dynamask")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(_gradients(model, compiled, tokens), plain, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


def test_an_8_bit_optimizer_trains(model: Any, rows: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    before, first = predictors(model), float(model.eval()(tokens, labels=tokens).loss)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        learning_rate=1e-2,
        optim="adamw_bnb_8bit",
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        per_device_train_batch_size=4,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert float(model.eval()(tokens, labels=tokens).loss) < first
    assert all(not torch.equal(p, before[name]) for name, p in predictors(model).items())


def test_ligers_fused_loss(converted: Any, tokens: torch.Tensor) -> None:
    """Through `loss_of_hidden`: the loss and the gradients of the model's own, and the ranks' beside it."""
    liger = pytest.importorskip("liger_kernel.transformers")
    fused = liger.LigerFusedLinearCrossEntropyLoss()
    converted.train()

    def by_liger(hidden: torch.Tensor, facts: Any) -> torch.Tensor:
        states, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        return fused(converted.lm_head.weight, states, targets) + facts.losses.mean()

    loss, plain = _gradients(converted, converted, tokens)
    converted.zero_grad()
    given = converted(input_ids=tokens, loss_of_hidden=by_liger).loss
    given.backward()
    torch.testing.assert_close(given.detach(), loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close([p.grad for p in converted.parameters()], plain, atol=1e-4, rtol=1e-3)
