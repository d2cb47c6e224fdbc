"""Distillation lowers the divergence, resumes exactly, and works in a Trainer."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from dynamask import InvalidInputError, convert
from dynamask.convert.distillation_loss import distillation_losses, next_tokens


def blocks(count: int = 3, rows: int = 2) -> list[torch.Tensor]:
    return [torch.randint(3, 300, (rows, 48)) for _ in range(count)]


def student_of(dense: Any) -> Any:
    torch.manual_seed(1)
    model = convert.upcycle(dense, 10, local=4, sinks=2, copy_weights=True)
    model.config.trained_ranks = True
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_lowers_the_divergence(llama: Any, checkpointing: bool) -> None:
    model, data = student_of(llama), blocks(1)
    before = float(distillation_losses(model, llama, data[0])[0].detach())
    teacher = {name: value.clone() for name, value in llama.state_dict().items()}
    predictor = model.model.layers[0].self_attn.rank_predictor.down.weight.clone()
    losses = convert.distill(
        model,
        llama,
        data,
        steps=15,
        learning_rate=1e-3,
        train_embeddings=True,
        chunk=20,
        gradient_checkpointing=checkpointing,
    )
    assert losses[0] == pytest.approx(before, rel=1e-4)
    assert float(distillation_losses(model, llama, data[0])[0]) < 0.8 * before
    assert all(torch.equal(value, teacher[name]) for name, value in llama.state_dict().items())
    assert not torch.equal(predictor, model.model.layers[0].self_attn.rank_predictor.down.weight)
    assert not model.is_gradient_checkpointing


def test_recording_needs_a_gpu(llama: Any) -> None:
    with pytest.raises(InvalidInputError, match="recorded=True needs a model on one GPU"):
        convert.distill(student_of(llama), llama, blocks(), steps=1, recorded=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("options", [{}, {"train_embeddings": False, "beginning_share": 0.5}])
def test_a_recorded_run_ends_where_the_plain_one_does(options: dict[str, Any]) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 512}
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**shape)).to("cuda", torch.bfloat16)
    data = [torch.randint(0, 64, (4, 256)) for _ in range(3)]
    found = []
    for recorded in (False, True):
        torch.manual_seed(1)
        model = convert.upcycle(dense, 32, local=8, sinks=2, copy_weights=True)
        losses = convert.distill(model, dense, data, steps=12, compiled=False, recorded=recorded, **options)
        found.append((torch.tensor(losses), [p.float() for p in model.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.05, atol=1e-4)
    for one, two in zip(*(weights for _, weights in found), strict=True):
        torch.testing.assert_close(one, two, rtol=0.02, atol=5e-3)


def test_a_step_that_cannot_be_recorded_runs_as_it_is(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("no graph")

    monkeypatch.setattr(sys.modules["dynamask.convert.distill"], "RecordedStep", refuse)
    monkeypatch.setattr(sys.modules["dynamask.convert.distill"], "_on_one_gpu", lambda model: True)
    monkeypatch.setattr(sys.modules["dynamask.convert.distill"], "compiled_layers", lambda model: nullcontext())
    monkeypatch.setattr(nullcontext, "remove", lambda self: None, raising=False)
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph, and slower: no graph"):
        losses = convert.distill(student_of(llama), llama, blocks(), steps=1, compiled=True)
    assert losses == convert.distill(student_of(llama), llama, blocks(), steps=1, compiled=True, recorded=False)
    with pytest.raises(RuntimeError, match="no graph"):
        convert.distill(student_of(llama), llama, blocks(), steps=1, recorded=True)


def test_embeddings_may_stay_as_they_are(llama: Any) -> None:
    model = student_of(llama)
    named = {name: value.clone() for name, value in model.state_dict().items()}
    losses = convert.distill(model, llama, blocks(1), steps=3, learning_rate=1e-3, train_embeddings=False)
    assert losses[-1] < losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, named[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in moved
    assert not moved & {"model.embed_tokens.weight", "lm_head.weight"}
    assert model.lm_head.weight.requires_grad
    torch.manual_seed(2)
    tokens = blocks(1)[0]
    expected = distillation_losses(model, llama, tokens)[0]
    model.get_input_embeddings().requires_grad_(False)
    torch.testing.assert_close(distillation_losses(model, llama, tokens)[0], expected)


def test_the_mean_of_the_last_weights_is_returned(llama: Any) -> None:
    model, seen = student_of(llama), []
    weight = model.model.layers[0].mlp.up_proj.weight

    def watch(report: Any) -> None:
        seen.append(weight.detach().clone())

    convert.distill(model, llama, blocks(1), steps=2, learning_rate=1e-2, average_share=0.9, progress=watch)
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(weight.detach(), (seen[0] + seen[1]) / 2)


def test_beginnings_have_their_share_of_the_loss(llama: Any) -> None:
    model, tokens = student_of(llama), blocks(1)[0]
    with torch.no_grad():
        given, wanted = (each(tokens).logits.float().log_softmax(-1) for each in (model, llama))
    each = (wanted.exp() * (wanted - given)).sum(-1)
    expected = 0.6 * each[:, :10].mean() + 0.4 * each[:, 10:].mean()
    torch.testing.assert_close(distillation_losses(model, llama, tokens, beginning_share=0.6)[0], expected)
    plain = distillation_losses(model, llama, tokens)[0]
    torch.testing.assert_close(distillation_losses(model, llama, tokens, beginning_share=0.1)[0], plain)


def test_within_the_windows_there_is_nothing_to_learn(llama: Any) -> None:
    loss, ranks = distillation_losses(student_of(llama), llama, torch.randint(3, 300, (1, 10)))
    assert loss < 1e-6
    assert ranks is not None


def test_a_teacher_that_shares_weights_is_copied(llama: Any) -> None:
    shared = convert.upcycle(llama.to(torch.bfloat16), 10, local=4, sinks=2)
    before = shared.lm_head.weight.clone()
    options: dict[str, Any] = {"learning_rate": 1e-2, "rank_learning_rate": 0.0, "train_embeddings": True}
    losses = convert.distill(shared, llama, blocks(1), steps=4, **options)
    assert losses[-1] > 0
    assert shared.lm_head.weight.dtype == torch.bfloat16
    assert not torch.equal(shared.lm_head.weight, before)
    assert not shared.config.trained_ranks
    assert shared.model.layers[0].self_attn.rank_predictor.down.weight.abs().max() == 0


def test_labels_adapt_the_model(llama: Any) -> None:
    model, data = student_of(llama), blocks(1)
    labels = data[0][:, 1:].flatten()

    def entropy() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(data[0]).logits[:, :-1].flatten(0, 1), labels))

    before = entropy()
    losses = convert.distill(model, llama, data, steps=10, learning_rate=1e-2, label_share=1.0)
    assert losses[0] == pytest.approx(before, rel=1e-3)
    assert entropy() < before - 0.1


def test_padding_has_no_next_token() -> None:
    tokens = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4]])
    assert next_tokens(tokens).tolist() == [[6, 7, 0, -1], [8, 9, 4, -1]]
    assert next_tokens(tokens, (tokens > 0).long()).tolist() == [[6, 7, -1, -1], [8, 9, 4, -1]]


def test_windows_shrink_to_the_models(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student_of(llama)
    convert.set_windows(model, [[10, 14]] * 2)
    seen: list[Any] = []
    module = sys.modules["dynamask.convert.distill"]
    original = module.distillation_losses

    def spy(student: Any, *args: Any, **options: Any) -> Any:
        seen.append(student.config.head_windows[0])
        return original(student, *args, **options)

    monkeypatch.setattr(module, "distillation_losses", spy)
    convert.distill(model, llama, blocks(1), steps=8, start_windows=4.0, shrink_share=0.5)
    assert seen[0] == (40, 48)
    assert seen[2] == (20, 28)
    assert seen[4:] == [(10, 14)] * 4
    assert model.config.windows == [[10, 14]] * 2


class Killed(Exception):
    pass


def test_a_killed_run_continues_to_the_same_weights(llama: Any, tmp_path: Path) -> None:
    data = blocks()

    def kill(report: Any) -> None:
        if report.step == 10:
            raise Killed

    whole, broken, again = student_of(llama), student_of(llama), student_of(llama)
    run: dict[str, Any] = {"steps": 12, "average_share": 0.5}
    expected = convert.distill(whole, llama, data, **run)
    file = tmp_path / "distill.pt"
    with pytest.raises(Killed):
        convert.distill(broken, llama, data, **run, checkpoint=file, save_every=0.0, progress=kill)
    assert convert.distill(again, llama, data, **run, checkpoint=file) == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_in_a_trainer(llama: Any, tmp_path: Path) -> None:
    model = student_of(llama)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in torch.cat(blocks(2))]
    before = float(distillation_losses(model, llama, torch.stack([row["input_ids"] for row in rows]))[0].detach())
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = convert.DistillationTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, teacher=llama)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-3)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    assert model.model.layers[0].self_attn.rank_predictor.down.weight.abs().max() > 0


def test_bad_input(llama: Any, shape: dict[str, Any]) -> None:
    model = student_of(llama)
    other = LlamaForCausalLM(LlamaConfig(**{**shape, "vocab_size": 299}))
    with pytest.raises(InvalidInputError, match="vocabulary of 299"):
        convert.distill(model, other, blocks(), steps=1)
    with pytest.raises(InvalidInputError, match="distill takes a model made by"):
        convert.distill(llama, llama, blocks(), steps=1)
    with pytest.raises(InvalidInputError, match="must be"):
        convert.distill(model, llama, blocks(), steps=0)
    for options in ({"label_share": 1.5}, {"start_windows": 0.5}, {"shrink_share": 0.0}):
        with pytest.raises(InvalidInputError, match="label_share must be from 0 to 1, start_windows at least 1"):
            convert.distill(model, llama, blocks(), steps=1, **options)
    with pytest.raises(InvalidInputError, match="beginning_share and average_share must be at least 0 and below 1"):
        convert.distill(model, llama, blocks(), steps=1, beginning_share=1.0)
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match="divergence is nan at step 1"):
        convert.distill(model, llama, blocks(), steps=1)
