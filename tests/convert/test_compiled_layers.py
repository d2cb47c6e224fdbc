"""Compiled layers compute what the layers compute, one graph for all of them."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from dynamask import BoundedCache, InvalidInputError, convert
from dynamask.cache import BoundedLayer
from dynamask.convert.distill import distillation_losses

WINDOWS = [[10, 19], [26, 13]]


def student_of(dense: Any, slopes: Any = ([0.1, 0.0], None)) -> Any:
    model: Any = convert.upcycle(dense, 10, local=4, sinks=2, copy_weights=True)
    convert.set_windows(model, WINDOWS)
    convert.set_slopes(model, slopes)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.rank_predictor.down.weight)
    model.config.trained_ranks = True
    return model.train().requires_grad_(True)


def tokens(rows: int = 2, length: int = 48) -> Tensor:
    return torch.randint(3, 300, (rows, length))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-5, msg=name)


def call(model: Any, kind: str) -> Tensor:
    """The loss of one training call."""
    torch.manual_seed(3)
    inputs: dict[str, Any] = {"input_ids": (block := tokens()), "labels": block}
    if kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(30), torch.arange(18)]).expand(2, -1)
    elif kind == "padded":
        inputs["attention_mask"] = torch.ones_like(block)
        inputs["attention_mask"][1, :9] = 0
    return model(**inputs, use_cache=False).loss  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kind", ["packed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("plain", "padded"))]
)
def test_one_graph_serves_all_layers(llama: Any, kind: str) -> None:
    model = student_of(llama)
    expected_loss = call(model, kind)
    expected = gradients(model, expected_loss)
    assert any("rank_predictor" in name for name in expected)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with convert.compiled_layers(model, backend=backend) as layers:  # type: ignore[arg-type]
        loss = call(model, kind)
        assert layers.failure is None
        assert len(graphs) == 1
        torch.testing.assert_close(loss, expected_loss)
        same(gradients(model, loss), expected)
        assert len(graphs) == 1
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


@pytest.mark.slow
@torch.no_grad()
def test_a_text_is_read_into_an_empty_cache(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("dynamask.convert.compiled_layers"), "_LONG", 30)
    model, block = student_of(llama).eval(), tokens(length=40)
    caches, logits = [], []
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        cache = BoundedCache(model.config, graphs=False)
        with convert.compiled_layers(model, backend=backend) if compiled else nullcontext() as layers:  # type: ignore[arg-type]
            parts = [model(block[:, :36], past_key_values=cache).logits]
            parts += [model(block[:, t : t + 1], past_key_values=cache).logits for t in (36, 37)]
            parts += [model(block[:, 38:], past_key_values=cache).logits]
        if layers is not None:
            assert layers.failure is None
        caches.append(cache)
        logits.append(torch.cat(parts, 1))
    assert len(graphs) == 1
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)
    for mine, other in zip(caches[1].layers, caches[0].layers, strict=True):
        assert isinstance(mine, BoundedLayer)
        assert isinstance(other, BoundedLayer)
        assert mine.counts() == other.counts()
        assert torch.equal(mine.positions, other.positions)
        torch.testing.assert_close(mine.keys, other.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine.ranks, other.ranks, rtol=1e-3, atol=1e-4)
    layer: Any = caches[0].layers[0]
    with pytest.raises(InvalidInputError, match="holds keys of 40 tokens"):
        layer.fill(*(torch.zeros(2, 2, 1, 16),) * 2, torch.zeros(2, 2, 1), torch.zeros(2, 2, 1, dtype=torch.int32))


@pytest.mark.slow
def test_in_sixteen_bits_a_compiled_layer_rounds_as_the_layer_does(llama: Any) -> None:
    """Ranks decide by small differences: rounding in other places would keep other keys."""
    model, block = student_of(llama).bfloat16().eval(), tokens()
    with torch.no_grad():
        expected = model(block, use_cache=False).logits.float()
        with convert.compiled_layers(model) as layers:
            found = model(block, use_cache=False).logits.float()
        assert layers.failure is None
    # Sums in another order move single ranks by a step of their grid; fused operations moved most.
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_distillation_steps_of_both_models(llama: Any, backend: str, checkpointing: bool) -> None:
    model, block = student_of(llama), tokens()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        loss, ranks = distillation_losses(model, llama, block)
        assert ranks is not None
        return loss.detach(), gradients(model, loss + ranks)

    expected_loss, expected = step()
    options = {"backend": backend}
    with convert.compiled_layers(model, **options) as own, convert.compiled_layers(llama, **options) as other:
        for _ in range(2):
            loss, found = step()
            torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-5)
            same(found, expected)
        assert (own.failure, other.failure) == (None, None)
        assert (len(own._kinds), len(other._kinds)) == (1, 1)


@pytest.mark.slow
def test_distill_compiles_where_it_is_told_to(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, made = [tokens()], []

    def compiled(model: Any) -> Any:
        made.append(layers := convert.compiled_layers(model, backend="eager"))
        return layers

    monkeypatch.setattr(importlib.import_module("dynamask.convert.distill"), "compiled_layers", compiled)
    expected = convert.distill(student_of(llama), llama, data, steps=3)
    assert not made
    found = convert.distill(student_of(llama), llama, data, steps=3, compiled=True)
    assert [len(layers._kinds) for layers in made] == [1, 1]
    assert all(not layers._layers for layers in made)
    # The predictors are drawn anew; what they rank by decides little of this loss.
    assert found[0] == pytest.approx(expected[0], rel=0.5)


@pytest.mark.slow
def test_a_trainer_compiles_where_it_is_told_to(llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    made = []

    def compiled(model: Any) -> Any:
        made.append(layers := convert.compiled_layers(model, backend="eager"))
        return layers

    monkeypatch.setattr(importlib.import_module("dynamask.convert.distillation_trainer"), "compiled_layers", compiled)
    options = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    for wanted in (None, True):
        convert.DistillationTrainer(
            student_of(llama),
            TrainingArguments(str(tmp_path), max_steps=2, **options),
            teacher=llama,
            train_dataset=[{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens(4)],
            compiled=wanted,
        ).train()
        assert [len(layers._kinds) for layers in made] == ([1, 1] if wanted else [])
    assert all(not layers._layers for layers in made)


def test_calls_that_are_not_served_run_as_before(llama: Any) -> None:
    model = student_of(llama).eval()
    block = tokens(1, 40)
    with torch.no_grad():
        whole = model(block, use_cache=False).logits
        generated = model.generate(block, max_new_tokens=5, do_sample=False)
        short = model(block[:, :8], use_cache=False).logits
        with convert.compiled_layers(model, backend="eager") as layers:
            assert torch.equal(model.generate(block, max_new_tokens=5, do_sample=False), generated)
            assert torch.equal(model(block[:, :8], use_cache=False).logits, short)
            assert not layers._kinds
            torch.testing.assert_close(model(block, use_cache=False).logits, whole)
            assert len(layers._kinds) == 1


def test_a_wrong_or_broken_graph_is_not_used(llama: Any) -> None:
    model, block = student_of(llama).eval(), tokens(1, 40)

    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *values: tuple(out * 1.5 if out is not None else None for out in graph.forward(*values))

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    with torch.no_grad():
        whole = model(block, use_cache=False).logits
        for backend, message in ((wrong, "differs from the layer"), (broken, "no compiler here")):
            with convert.compiled_layers(model, backend=backend) as layers:  # type: ignore[arg-type]
                with pytest.warns(UserWarning, match=message):
                    assert torch.equal(model(block, use_cache=False).logits, whole)
                assert layers.failure is not None


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="list of decoder layers"):
        convert.compiled_layers(nn.Linear(2, 2))


def test_a_teacher_without_decoder_layers_is_refused_before_the_student_is_touched(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of(llama)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=student.config.vocab_size, **sizes))
    with pytest.raises(InvalidInputError, match="list of decoder layers"):
        convert.distill(student, teacher, [tokens()], steps=1, compiled=True)
    assert all("forward" not in layer.__dict__ for layer in student.model.layers)

    settings = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    trainer = convert.DistillationTrainer(student, settings, teacher=teacher)
    trainer.compiled = True  # what None means on a GPU
    compiled: list[Any] = []
    monkeypatch.setattr(
        importlib.import_module("dynamask.convert.distillation_trainer"),
        "compiled_layers",
        lambda model: compiled.append(model) or nullcontext(),
    )
    monkeypatch.setattr(transformers.Trainer, "train", lambda self: None)
    trainer.train()
    assert compiled == [student]
