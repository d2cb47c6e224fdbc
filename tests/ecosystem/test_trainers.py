"""Trainers: transformers', TRL's, and those on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dynamask.training import add_rank_loss
from tests.ecosystem.conftest import dense_model, predictors

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def _arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    plain: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "max_steps": 2}
    plain |= {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "disable_tqdm": True}
    return kind(str(folder), **(plain | options))


def test_trainer_trains_saves_and_loads(model: Any, rows: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    before = predictors(model)
    trainer = Trainer(model=model, args=_arguments(tmp_path, max_steps=8), train_dataset=rows)
    first = float(model.eval()(tokens, labels=tokens).loss)
    trainer.train()
    assert float(model.eval()(tokens, labels=tokens).loss) < first
    assert before
    assert all(not torch.equal(p, before[name]) for name, p in predictors(model).items())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_gradient_accumulation_changes_nothing(model: Any, rows: Any, tmp_path: Path) -> None:
    """Rows alike, so that it does not matter which of a batch teach the ranks."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for size, steps in ((4, 1), (1, 4)):
        model.load_state_dict(state)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        args = _arguments(tmp_path, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", **options)
        Trainer(model=model, args=args, train_dataset=[rows[0]] * 8).train()
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_label_smoothing_keeps_the_loss_of_the_ranks(model: Any, rows: Any, tmp_path: Path) -> None:
    before = predictors(model)
    args = _arguments(tmp_path, label_smoothing_factor=0.1)
    trainer = add_rank_loss(Trainer(model=model, args=args, train_dataset=rows))
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in predictors(model).items())


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_add_rank_loss_adds_what_the_model_would(
    model: Any, rows: Any, tmp_path: Path, steps: int, smoothing: float
) -> None:
    """The predictors' steps do not depend on who computes the loss, nor on the parts of the batch."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    results = []
    for added in (False, True):
        model.load_state_dict(before, strict=False)
        sizes = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps, "max_steps": 1}
        smooth = {"label_smoothing_factor": smoothing if added else 0.0}
        args = _arguments(tmp_path, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **sizes, **smooth)
        trainer = Trainer(model=model, args=args, train_dataset=[rows[0]] * 4)
        (add_rank_loss(trainer) if added else trainer).train()
        results.append(predictors(model))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(p, before[name]) for name, p in results[0].items())


def _torchrun(kind: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run(
        [*command, str(script), kind], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "2 processes" in done.stdout


@pytest.mark.parametrize("kind", ["accelerate", "fsdp2"])
def test_two_processes_train_as_one(kind: str) -> None:
    """The weights after three steps equal those of one process on the whole batch, and are the same on both."""
    pytest.importorskip("accelerate")
    _torchrun(kind)


def test_trl_sft_packs(converted: Any, tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    texts = [" ".join(f"w{3 + (7 * i + j) % 60}" for j in range(5 + i)) for i in range(8)]
    args = _arguments(tmp_path, trl.SFTConfig, packing=True, max_length=48, per_device_train_batch_size=1)
    trainer = trl.SFTTrainer(
        model=converted, args=args, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"] == 0).nonzero()[:, 1].tolist()
    assert len(starts) > 1  # several documents in one row
    converted.eval()
    with torch.no_grad():
        logits = converted(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        for start, stop in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            alone = converted(batch["input_ids"][:, start:stop], use_cache=False).logits
            torch.testing.assert_close(logits[:, start:stop], alone, atol=1e-4, rtol=1e-4)
    before = predictors(converted)
    add_rank_loss(trainer).train()
    assert all(not torch.equal(p, before[name]) for name, p in predictors(converted).items())


@pytest.mark.filterwarnings("ignore")
def test_trl_distils_into_a_converted_model(converted: Any, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    gkd = pytest.importorskip("trl.experimental.gkd")
    from datasets import Dataset

    words = [[f"w{3 + (7 * i + j) % 60}" for j in range(16)] for i in range(4)]
    roles = ("user", "assistant")
    halves = [(" ".join(each[:8]), " ".join(each[8:])) for each in words]
    turns = [[{"role": role, "content": text} for role, text in zip(roles, half, strict=True)] for half in halves]
    args = _arguments(tmp_path, gkd.GKDConfig, max_length=64, max_new_tokens=12, lmbda=0.5, max_steps=4)
    trainer = gkd.GKDTrainer(
        model=converted,
        teacher_model=dense_model(),
        args=args,
        train_dataset=Dataset.from_dict({"messages": turns}),
        processing_class=tokenizer,
    )
    before = predictors(converted)
    add_rank_loss(trainer).train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] or [
        trainer.state.log_history[-1]["train_loss"]
    ]
    assert all(loss == loss and loss > 0 for loss in losses)
    assert all(not torch.equal(p, before[name]) for name, p in predictors(converted).items())
