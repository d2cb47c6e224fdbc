"""Kullback-Leibler divergence between two models' next-token distributions, a few positions at a time."""

from __future__ import annotations

import warnings
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
    weights: Tensor | None = None,
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
        weights: (N,) float32, weights of the positions in the mean of the divergence; None: equal.

    Returns:
        () float32, differentiable in `student_hidden` and `parameters`. 0 where no position counts.
    """
    if label_share and labels is None:
        raise InvalidInputError(f"label_share={label_share} needs labels")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options = (student_head, teacher_head, mask, temperature, chunk, labels, label_share, weights)
    return _ChunkedKL.apply(student_hidden, teacher_hidden.detach(), options, *trained)  # type: ignore[no-any-return]


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, options: tuple[Any, ...], *trained: Tensor) -> Tensor:
        student_head, teacher_head, mask, temperature, chunk, labels, share, given_weights = options
        wanted = student.requires_grad or any(parameter.requires_grad for parameter in trained)
        rows, teacher = student.detach().flatten(0, -2), teacher.flatten(0, -2)
        weights = (
            torch.ones(rows.shape[0], device=rows.device) if mask is None else mask.flatten().to(rows.device).float()
        )
        if given_weights is not None:
            weights = weights * given_weights.to(rows.device).repeat(rows.shape[0] // len(given_weights))
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
                    given = logits.detach(), teacher_head(teacher[part]), weights[part], temperature
                    found_here, slope = _divergence_on_gpu(*given) if logits.is_cuda else divergence_and_slope(*given)
                    total += found_here
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


def divergence_and_slope(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute the weighted divergence of some positions, and its gradient by the student's logits.

    Args:
        student, teacher: (n, V) logits.
        weight: (n,) float32, factors of the positions.
        temperature: see `chunked_kl`.

    Returns:
        () float32 and (n, V) float32 (float64 for float64 logits).
    """
    log_target = _wide(teacher) if temperature == 1 else _wide(teacher) / temperature
    log_given = _wide(student) if temperature == 1 else _wide(student) / temperature
    log_target, log_given = log_target.log_softmax(-1), log_given.log_softmax(-1)
    target = log_target.exp()
    # In place from here on: the logits of a chunk are the largest tensors of a step.
    divergence = log_target.sub_(log_given).mul_(target).sum(-1)
    total = (divergence * weight).sum().float() * temperature**2
    return total, log_given.exp_().sub_(target).mul_(weight[:, None] * temperature)


_WORTH_COMPILING = 1 << 24
"""Logits of a chunk; fewer take less time than compiling does."""

_MOST_COMPILED = 4

_compiled: dict[tuple[torch.Size, torch.dtype], Any] = {}
"""By shape and dtype of the logits: the compiled `divergence_and_slope`, or None where that failed."""


def _divergence_on_gpu(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Run `divergence_and_slope` compiled: a third of the passes over the logits. As it is where that fails."""
    key = student.shape, student.dtype
    if key not in _compiled:
        worth = student.numel() >= _WORTH_COMPILING and len(_compiled) < _MOST_COMPILED
        _compiled[key] = _checked_compilation(student, teacher, weight, temperature) if worth else None
    return (_compiled[key] or divergence_and_slope)(student, teacher, weight, temperature)  # type: ignore[no-any-return]


def _checked_compilation(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Any:
    if student.dtype not in (torch.bfloat16, torch.float16, torch.float32) or torch.compiler.is_compiling():
        return None
    try:
        function = torch.compile(divergence_and_slope)
        found = function(student, teacher, weight, temperature)
        expected = divergence_and_slope(student, teacher, weight, temperature)
        close = 1e-4 * float(expected[1].abs().max()) + 1e-6 * float(weight.max())
        torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=close)
    except Exception as error:  # whatever a compiler or an incomplete installation raises
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"the divergence runs uncompiled, and slower: {type(error).__name__}: {reason}", stacklevel=2)
        return None
    return function


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
