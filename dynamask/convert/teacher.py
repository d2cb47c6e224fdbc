"""The dense model that a converted one is trained towards."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError


@torch.no_grad()
def teacher_states(teacher: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Run a causal LM without its output layer: (B, N) token ids to (B, N, hidden)."""
    with narrow(teacher):
        decoder = teacher.get_decoder() if hasattr(teacher, "get_decoder") else teacher.model
        outputs = decoder(input_ids=tokens, attention_mask=attention_mask, use_cache=False)
    return outputs.last_hidden_state  # type: ignore[no-any-return]


def narrow(model: Any) -> Any:
    """Return a context that autocasts to bfloat16 where float32 weights lie on a GPU."""
    weight = next(model.parameters())
    return torch.autocast("cuda", torch.bfloat16) if weight.is_cuda and weight.dtype == torch.float32 else nullcontext()


def check_teacher(model: Any, teacher: Any) -> None:
    """Raise `InvalidInputError` unless both models have one vocabulary."""
    check_vocabularies(*(getattr(each, "config", None) for each in (model, teacher)))


def check_vocabularies(student: Any, teacher: Any) -> None:
    """Raise `InvalidInputError` unless both configurations name one vocabulary."""
    sizes = [getattr(each, "vocab_size", None) for each in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise InvalidInputError(
            f"the teacher has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}: distillation compares "
            "their distributions token by token"
        )


def separate_teacher(model: Any, teacher: Any) -> Any:
    """Return the teacher, frozen for evaluation: a copy of it if it shares weights with the model, or trains."""
    mine = {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
    shares = any(parameter.data_ptr() in mine for parameter in teacher.parameters() if parameter.numel())
    if shares:
        teacher = copy.deepcopy(teacher)
        teacher.requires_grad_(False)
    return teacher.eval()
