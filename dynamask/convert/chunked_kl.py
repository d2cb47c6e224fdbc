"""Kullback-Leibler divergence between two models' next-token distributions, a few positions at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.training.loss import Head


def chunked_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Head,
    teacher_head: Head,
    parameters: list[Tensor],
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
    labels: Tensor | None = None,
    label_share: float = 0.0,
) -> Tensor:
    """Compute the mean divergence KL(teacher || student) over positions, without all logits in memory.

    With `label_share` a, the loss is (1 - a) KL + a times the cross-entropy of the labels.

    Gradients are computed in the forward pass, chunk by chunk, so that no chunk's logits outlive it.

    Args:
        student_hidden: (B, N, hidden) last hidden states of the student.
        teacher_hidden: (B, N, hidden') of the teacher; not differentiated.
        student_head, teacher_head: see `output_head`; one vocabulary.
        parameters: the student head's parameters that get a gradient.
        mask: (B, N) bool, positions that count; None: all.
        temperature: divides the logits; the divergence is multiplied by its square, which keeps the gradient's size.
        chunk: positions whose logits are in memory at a time.
        labels: (B, N) int64, the token that follows each position; below 0 where there is none. Needed for a
            `label_share` above 0.
        label_share: from 0 to 1. At 1 the teacher's hidden states are not read and may be the student's.

    Returns:
        () float32, differentiable in `student_hidden` and `parameters`. 0 where no position counts.
    """
    if label_share and labels is None:
        raise InvalidInputError(f"label_share={label_share} needs labels")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options = (student_head, teacher_head, mask, temperature, chunk, labels, label_share)
    return _ChunkedKL.apply(student_hidden, teacher_hidden.detach(), options, *trained)  # type: ignore[no-any-return]


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, options: tuple[Any, ...], *trained: Tensor) -> Tensor:
        student_head, teacher_head, mask, temperature, chunk, labels, share = options
        wanted = student.requires_grad or any(parameter.requires_grad for parameter in trained)
        rows, teacher = student.detach().flatten(0, -2), teacher.flatten(0, -2)
        weights = (
            torch.ones(rows.shape[0], device=rows.device) if mask is None else mask.flatten().to(rows.device).float()
        )
        weights = weights * ((1 - share) / weights.sum().clamp(min=1))
        if share:
            labels = labels.flatten().to(rows.device)
            labelled = (labels >= 0) if mask is None else (labels >= 0) & mask.flatten().to(rows.device)
            label_weights = labelled.float() * (share / labelled.sum().clamp(min=1))
            labels = labels.clamp(min=0)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        gradient = torch.zeros_like(rows) if wanted else None
        sums = [torch.zeros_like(parameter) for parameter in trained] if wanted else []
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            piece = rows[part].requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = student_head(piece)
            slope: Tensor | None = None
            with torch.no_grad():
                if share < 1:
                    log_target = (_wide(teacher_head(teacher[part])) / temperature).log_softmax(-1)
                    log_given = (_wide(logits.detach()) / temperature).log_softmax(-1)
                    target = log_target.exp()
                    # In place from here on: the logits of a chunk are the largest tensors of a step.
                    divergence = log_target.sub_(log_given).mul_(target).sum(-1)
                    total += (divergence * weights[part]).sum().float() * temperature**2
                    slope = log_given.exp_().sub_(target).mul_(weights[part, None] * temperature)
                if share:
                    own = _wide(logits.detach()).log_softmax(-1)
                    follows = labels[part, None]
                    total -= (own.gather(-1, follows)[:, 0] * label_weights[part]).sum().float()
                    own = own.exp_().mul_(label_weights[part, None])
                    own.scatter_add_(-1, follows, -label_weights[part, None].to(own.dtype))
                    slope = own if slope is None else slope.add_(own)
            if wanted and gradient is not None and slope is not None:
                found = torch.autograd.grad(logits, [piece, *trained], slope.to(logits.dtype), allow_unused=True)
                gradient[part] = found[0]
                for summed, each in zip(sums, found[1:], strict=True):
                    if each is not None:
                        summed += each
        ctx.save_for_backward(*([] if gradient is None else [gradient.view_as(student), *sums]))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *sums = ctx.saved_tensors
        return (gradient * grad.to(gradient.dtype), None, None, *(each * grad.to(each.dtype) for each in sums))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
