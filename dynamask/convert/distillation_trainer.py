"""Distillation with transformers' Trainer, for any data set."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from dynamask.convert.attention import CallFacts
from dynamask.convert.compiled_layers import check_compilable, compiled_layers, is_compilable
from dynamask.convert.distillation_loss import losses_of_hidden, next_tokens
from dynamask.convert.models import check_converted
from dynamask.convert.teacher import check_teacher, separate_teacher, teacher_states
from dynamask.errors import InvalidInputError
from dynamask.training.optimizer import adamw
from dynamask.training.recorded_steps import record_steps
from dynamask.training.trainer import AtomicTrainer


class DistillationTrainer(Trainer):
    """Trains a converted model towards a teacher's next-token distributions, with the arguments of `Trainer`.

    The data set gives `input_ids` and, with padding, `attention_mask`; labels are ignored. The loss, also the
    evaluation's, is `distill`'s: KL(teacher || student) in nats per token, a few positions' logits at a time, and, in
    training, the loss of the ranks. bf16, gradient checkpointing, accumulation and several GPUs work as in `Trainer`.

    Args:
        teacher: a causal LM with the same vocabulary. A copy is made of one that shares weights with the model.
        temperature, chunk: see `dynamask.convert.chunked_kl.chunked_kl`.
        label_share: share of the cross-entropy of the next token in the loss, see `dynamask.convert.distill`.
        rank_rate: learning rate of the rank predictors, divided by that of the model; 0 leaves them as they are.
        compiled: whether `train()` runs the layers of both models compiled (`dynamask.convert.compiled_layers`).
            None: on one GPU, for models without adapters, and of a teacher without a list of decoder layers (GPT-2)
            not.
        recorded: whether steps are replayed as CUDA graphs (`dynamask.training.record_steps`). None: where nothing is
            known to be in the way.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any,
        temperature: float = 1.0,
        chunk: int = 1024,
        label_share: float = 0.0,
        rank_rate: float = 6.0,
        compiled: bool | None = None,
        recorded: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(self, AtomicTrainer):
            kwargs["recorded"] = recorded
        super().__init__(*args, **kwargs)
        student: Any = self.model
        base = student.get_base_model() if hasattr(student, "get_base_model") else student
        check_converted(base, "DistillationTrainer")
        check_teacher(base, teacher)
        self.teacher = separate_teacher(base, teacher).to(next(base.parameters()).device)
        if not 0 <= label_share <= 1:
            raise InvalidInputError(f"label_share must be from 0 to 1; got {label_share}")
        self.temperature, self.chunk, self.rank_rate, self.label_share = temperature, chunk, rank_rate, label_share
        if compiled is None:
            compiled = base is student and self.args.device.type == "cuda" and self.args.world_size == 1
        elif compiled:
            check_compilable(self.teacher)
        self.compiled = compiled
        if recorded is not False and not isinstance(self, AtomicTrainer):
            record_steps(self, wanted=bool(recorded))
        self.model_accepts_loss_kwargs = False  # a mean over tokens: Trainer divides by the accumulation steps

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build AdamW over dynamask's parameter groups."""
        if self.optimizer is None:
            self.optimizer: torch.optim.Optimizer | None = adamw(
                self.model if model is None else model,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                rank_rate=self.rank_rate,
            )
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does, with compiled layers where they are wanted."""
        with ExitStack() as stack:
            if self.compiled:
                student: Any = self.model
                base = student.get_base_model() if hasattr(student, "get_base_model") else student
                for model in filter(is_compilable, (base, self.teacher)):
                    stack.enter_context(compiled_layers(model))
            return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the divergence and, in training, the loss of the ranks."""
        tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
        student = self.accelerator.unwrap_model(model)
        hidden_of_teacher = teacher_states(self.teacher, tokens, mask)

        def losses(hidden: Tensor, facts: CallFacts) -> Tensor:
            loss, ranks = losses_of_hidden(
                student,
                self.teacher,
                hidden,
                hidden_of_teacher,
                facts.losses,
                mask,
                temperature=self.temperature,
                chunk=self.chunk,
                labels=next_tokens(tokens, mask) if self.label_share else None,
                label_share=self.label_share,
            )
            return loss if ranks is None else loss + ranks

        # Through the model's own forward, so that wrappers around it (DDP, autocast) see the call.
        outputs = model(input_ids=tokens, attention_mask=mask, loss_of_hidden=losses)
        return (outputs.loss, {"loss": outputs.loss}) if return_outputs else outputs.loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute the loss, which needs no labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None
