"""Steps of a trainer that are replayed give what they give by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dynamask import DynamaskForCausalLM, InvalidInputError, convert
from dynamask.ops.looks import looks_allowed, without_looks
from dynamask.training import AtomicTrainer, record_steps, recorded_gradients, recorded_steps
from tests.conftest import tiny_config

GPU = torch.cuda.is_available()


class Replayed:
    """Stands for a CUDA graph: runs the step, its gradients in tensors of its own, off by a factor."""

    factor = 1.0
    made = 0

    def __init__(
        self,
        run: Callable[..., Tensor],
        parameters: Iterable[nn.Parameter],
        *inputs: Tensor,
        backward: bool,
        pool: None,
    ) -> None:
        assert not backward
        self.run, self.parameters = run, list(parameters)
        assert all(parameter.grad is None for parameter in self.parameters)
        self.static = [torch.zeros_like(parameter) for parameter in self.parameters]
        Replayed.made += 1

    def __call__(self, *inputs: Tensor) -> Tensor:
        with without_looks():
            loss = self.run(*inputs)
        for parameter, static in zip(self.parameters, self.static, strict=True):
            assert parameter.grad is not None
            parameter.grad = static.copy_(self.factor * parameter.grad)
        return loss


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> type[Replayed]:
    """Lets steps be "recorded" on a CPU."""
    if not GPU:
        monkeypatch.setattr(recorded_gradients, "RecordedGradients", Replayed)
        monkeypatch.setattr(recorded_steps, "reason_against_recording", lambda trainer, model: None)
    monkeypatch.setattr(Replayed, "factor", 1.0)
    monkeypatch.setattr(Replayed, "made", 0)
    return Replayed


class Rows(torch.utils.data.Dataset):
    """Texts of two packed documents each."""

    def __init__(self, rows: int, length: int, packed: bool) -> None:
        self.tokens = torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(0))
        self.positions = torch.cat([torch.arange(length - 9), torch.arange(9)])
        self.packed = packed

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.tokens[index], "labels": self.tokens[index]}
        return row | {"position_ids": self.positions} if self.packed else row


def trained(
    kind: str, folder: Path, recorded: bool, accumulation: int = 1, rows: int = 4, **more: Any
) -> tuple[Any, Any]:
    """A model after some steps, and its trainer."""
    torch.manual_seed(0)
    if kind == "native":
        model: Any = DynamaskForCausalLM(tiny_config("dma", windows=16, head_dim=16))
    else:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 512}
        model = convert.upcycle(LlamaForCausalLM(LlamaConfig(**shape)), 16, local=8, sinks=2)
        model.config.trained_ranks = True
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not GPU,
        logging_steps=1,
    )
    data = Rows(rows, 40, packed=True)
    if kind == "native":
        trainer: Any = AtomicTrainer(model=model, args=arguments, train_dataset=data, recorded=recorded, **more)
    else:
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        if recorded:
            record_steps(trainer)
    trainer.train()
    return model, trainer


@pytest.mark.parametrize(
    ("kind", "accumulation"), [("converted", 2), *(pytest.param("native", n, marks=pytest.mark.slow) for n in (1, 2))]
)
def test_recorded_training_ends_at_the_same_weights(
    replayed: type[Replayed], tmp_path: Path, kind: str, accumulation: int
) -> None:
    expected, _ = trained(kind, tmp_path, False, accumulation)
    actual, trainer = trained(kind, tmp_path, True, accumulation)
    steps = trainer._steps if kind == "native" else trainer.training_step
    assert steps.reason is None
    assert len(steps._recorded) == 1
    for parameter, other in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", ["freeze", pytest.param("move", marks=pytest.mark.slow)])
def test_parameters_that_change_during_the_training_are_seen(
    replayed: type[Replayed], tmp_path: Path, change: str
) -> None:
    class Changes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weight = model.get_input_embeddings().weight
            if state.global_step == 3 and change == "freeze":
                weight.requires_grad_(False)
            elif state.global_step == 3:
                weight.data = weight.data.clone()

    expected, _ = trained("native", tmp_path, False, rows=6, callbacks=[Changes()])
    actual, trainer = trained("native", tmp_path, True, rows=6, callbacks=[Changes()])
    assert len(trainer._steps._recorded) == 2
    for parameter, other in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4)


def test_a_replay_that_differs_is_not_used(
    replayed: type[Replayed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if GPU:
        pytest.skip("a CUDA graph does not differ")
    monkeypatch.setattr(replayed, "factor", 1.5)
    expected, _ = trained("native", tmp_path, False, rows=3)
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph.*loss and norm"):
        actual, _ = trained("native", tmp_path, True, rows=3)
    for parameter, other in zip(actual.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_no_recording_without_a_gpu(tmp_path: Path) -> None:
    if GPU:
        pytest.skip("there is one")
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph.*cpu"):
        trained("native", tmp_path, True, rows=1)


def test_record_steps_takes_a_trainer_once() -> None:
    with pytest.raises(InvalidInputError, match="takes a transformers Trainer"):
        record_steps(object())


def test_no_looks_within_the_block() -> None:
    assert looks_allowed()
    with without_looks(), without_looks():
        assert not looks_allowed()
    assert looks_allowed()
