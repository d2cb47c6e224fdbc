"""Kullback-Leibler divergence between two models' next-token distributions, a few positions at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
) -> Tensor:
    """Compute the mean divergence KL(teacher || student) over positions, without all logits in memory.

    Gradients are computed in the forward pass, chunk by chunk, so that no chunk's logits outlive it.

    Args:
        student_hidden: (B, N, hidden) last hidden states of the student.
        teacher_hidden: (B, N, hidden') of the teacher; not differentiated.
        student_head, teacher_head: see `output_head`; one vocabulary.
        parameters: the student head's parameters that get a gradient.
        mask: (B, N) bool, positions that count; None: all.
        temperature: divides the logits; the divergence is multiplied by its square, which keeps the gradient's size.
        chunk: positions whose logits are in memory at a time.

    Returns:
        () float32, differentiable in `student_hidden` and `parameters`. 0 where no position counts.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options = (student_head, teacher_head, mask, temperature, chunk)
    return _ChunkedKL.apply(student_hidden, teacher_hidden.detach(), options, *trained)  # type: ignore[no-any-return]


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, options: tuple[Any, ...], *trained: Tensor) -> Tensor:
        student_head, teacher_head, mask, temperature, chunk = options
        wanted = student.requires_grad or any(parameter.requires_grad for parameter in trained)
        rows, teacher = student.detach().flatten(0, -2), teacher.flatten(0, -2)
        weights = None if mask is None else mask.flatten().to(rows.device, torch.float32)
        count = rows.shape[0] if weights is None else weights.sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        gradient = torch.zeros_like(rows) if wanted else None
        sums = [torch.zeros_like(parameter) for parameter in trained] if wanted else []
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            with torch.no_grad():
                wide = _wide(teacher_head(teacher[part])) / temperature
                log_target = wide.log_softmax(-1)
            piece = rows[part].requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = student_head(piece)
            with torch.no_grad():
                log_given = (_wide(logits.detach()) / temperature).log_softmax(-1)
                target = log_target.exp()
                # In place from here on: the logits of a chunk are the largest tensors of a step.
                divergence = log_target.sub_(log_given).mul_(target).sum(-1)
                weight = None if weights is None else weights[part]
                total += (divergence if weight is None else divergence * weight).sum().float()
                slope = log_given.exp_().sub_(target).mul_(temperature)
                slope = slope / count if weight is None else slope * (weight / count)[:, None]
            if wanted and gradient is not None:
                found = torch.autograd.grad(logits, [piece, *trained], slope.to(logits.dtype), allow_unused=True)
                gradient[part] = found[0]
                for summed, each in zip(sums, found[1:], strict=True):
                    if each is not None:
                        summed += each
        ctx.save_for_backward(*([] if gradient is None else [gradient.view_as(student), *sums]))
        return total * temperature**2 / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, *sums = ctx.saved_tensors
        return (gradient * grad.to(gradient.dtype), None, None, *(each * grad.to(each.dtype) for each in sums))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
