"""The loss of a distillation: how far a converted model's next-token distribution is from the dense model's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamask.convert.attention import call_facts
from dynamask.convert.chunked_kl import chunked_kl
from dynamask.convert.learn_ranks import run_decoder
from dynamask.convert.teacher import narrow, teacher_states
from dynamask.mixers.rank_loss import RankLosses
from dynamask.training.loss import output_head


def distillation_losses(
    student: Any,
    teacher: Any,
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
    ranks: bool = True,
    label_share: float = 0.0,
    beginning_share: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Compute the losses of one batch of distillation.

    Args:
        student: a converted model.
        teacher: a causal LM with the same vocabulary.
        tokens: (B, N) token ids.
        attention_mask: (B, N), 1 for a real token, or None.
        temperature, chunk: see `chunked_kl`.
        ranks: whether the ranks' loss is computed, too.
        label_share, beginning_share: see `distill`.

    Returns:
        The mean divergence in nats per real token, or its mixture with the cross-entropy, and the mean loss of the
        ranks, or None.
    """
    teacher_hidden = teacher_states(teacher, tokens, attention_mask) if label_share < 1 else None
    facts = call_facts(tokens.shape[0], tokens.shape[1], attention_mask, None, 0, tokens.device)
    facts.losses = RankLosses() if ranks else None
    embeddings, embedded = student.get_input_embeddings(), None
    if torch.is_grad_enabled() and not any(parameter.requires_grad for parameter in embeddings.parameters()):
        # The first layer then computes a gradient like the others, and runs in their graph.
        embedded = embeddings(tokens).detach().requires_grad_()
    hidden = run_decoder(student, None if embedded is not None else tokens, facts, embedded)
    return losses_of_hidden(
        student,
        teacher,
        hidden,
        hidden if teacher_hidden is None else teacher_hidden,
        facts.losses,
        attention_mask,
        temperature=temperature,
        chunk=chunk,
        labels=next_tokens(tokens, attention_mask) if label_share else None,
        label_share=label_share,
        weights=_position_weights(student.config, tokens.shape[1], beginning_share, tokens.device),
    )


def _position_weights(config: Any, length: int, share: float, device: torch.device) -> Tensor | None:
    """(N,) weights that give the first positions, as many as the mean window, this share of their sum, or None."""
    windows = [window for entry in config.head_windows if entry is not None for window in entry]
    first = round(sum(windows) / max(1, len(windows)))
    if not share or not 0 < first < length or share <= first / length:
        return None
    weights = torch.ones(length, device=device)
    weights[:first] = share / (1 - share) * (length - first) / first
    return weights


def next_tokens(tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the token that follows each of (B, N), -1 where there is none or it is padding."""
    labels = F.pad(tokens[:, 1:], (0, 1), value=-1)
    if attention_mask is None:
        return labels
    return labels.masked_fill(F.pad(attention_mask[:, 1:], (0, 1)) == 0, -1)


def losses_of_hidden(
    student: Any,
    teacher: Any,
    hidden: Tensor,
    teacher_hidden: Tensor,
    rank_losses: RankLosses | None,
    attention_mask: Tensor | None,
    *,
    temperature: float,
    chunk: int,
    labels: Tensor | None = None,
    label_share: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`distillation_losses` from the last hidden states (B, N, hidden) of both models."""
    with narrow(student):
        loss = chunked_kl(
            hidden,
            teacher_hidden,
            output_head(student),
            output_head(teacher),
            list(student.get_output_embeddings().parameters()),
            mask=None if attention_mask is None else attention_mask.bool(),
            temperature=temperature,
            chunk=chunk,
            labels=labels,
            label_share=label_share,
            weights=weights,
        )
    aux = torch.stack([each.to(loss.device) for each in rank_losses]).mean() if rank_losses else None
    return loss, aux
