"""Cross-entropy of next tokens, in parts where all logits at once would be too many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from dynamask.models.modeling import AUXILIARY_WEIGHT

Head = Callable[[Tensor], Tensor]
"""Hidden states (..., hidden) to logits (..., vocabulary)."""

TokenLosses = Callable[[Head, Tensor, Tensor], Tensor]
"""Output layer, states (n, hidden), targets (n,) -> losses (n,)."""

MOST_LOGITS = 1 << 30
"""Logits that exist at a time; more positions go through the output layer in parts, recomputed in the backward pass."""


def output_head(model: Any) -> Head:
    """Return the output layer of a causal LM with what its architecture does to the logits.

    Args:
        model: a causal LM of transformers; Granite's scale and Gemma's capping of the logits are applied.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    layer = model.get_output_embeddings()
    scale = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if not scale and not cap:
        return layer  # type: ignore[no-any-return]

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = layer(hidden)
        if scale:
            logits = logits / scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return head


def plain_losses(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy of each state.

    Args:
        head: output layer.
        hidden: (n, hidden) states.
        targets: (n,) int64 tokens; -100 gives a loss of 0.

    Returns:
        (n,) float32, nats.
    """
    return F.cross_entropy(head(hidden).float(), targets, reduction="none", ignore_index=-100)


def chunked_losses(
    head: Head, hidden: Tensor, targets: Tensor, vocab_size: int, token_losses: TokenLosses = plain_losses
) -> Tensor:
    """Compute `token_losses` of any number of states, with at most `MOST_LOGITS` logits at a time.

    Args:
        head, hidden, targets: see `plain_losses`.
        vocab_size: logits of a state.
        token_losses: the loss itself; a compiled one is faster.

    Returns:
        (n,) float32, nats.
    """
    part = max(1, MOST_LOGITS // vocab_size)
    if len(targets) <= part:
        return token_losses(head, hidden, targets)
    pieces = zip(hidden.split(part), targets.split(part), strict=True)
    return torch.cat([checkpoint(token_losses, head, states, goal, use_reentrant=False) for states, goal in pieces])


@dataclass
class LossOutput(ModelOutput):
    """What a model with `use_chunked_loss` returns for a batch with labels.

    Attributes:
        loss: scalar, mean over the predicted tokens (or their sum divided by num_items_in_batch), with the auxiliary
            loss of learned ranks.
        row_losses: (B,) float32, sum of the cross-entropy in each row, without the auxiliary loss.
        row_counts: (B,) int64, predicted tokens in each row.
        aux_loss: scalar, or None where the model has none.
    """

    loss: Tensor | None = None
    row_losses: Tensor | None = None
    row_counts: Tensor | None = None
    aux_loss: Tensor | None = None


def use_chunked_loss(model: Any, token_losses: TokenLosses = plain_losses) -> None:
    """Let a causal LM compute its loss by `chunked_losses` whenever it is called with labels.

    The model's `forward` is replaced, so that the loss is computed inside it: wrappers for several GPUs and mixed
    precision see one forward pass. Without labels it is the model's own.

    Args:
        model: a causal LM of transformers, or a converted one.
        token_losses: see `chunked_losses`.
    """
    own = model.forward
    config = model.config

    @functools.wraps(own)
    def forward(*args: Any, labels: Tensor | None = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        if labels is None:
            return own(*args, **inputs)
        inputs["use_cache"] = False
        targets = inputs.pop("shift_labels", None)
        if targets is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)

        def of_hidden(hidden: Tensor) -> Tensor:
            head = output_head(model)
            return chunked_losses(head, hidden.flatten(0, 1), targets.flatten(), config.vocab_size, token_losses)

        if getattr(config, "rank_loss_weight", None) is not None:  # converted: its own forward gives layers their facts
            parts: list[Tensor | None] = []

            def of_converted(hidden: Tensor, facts: Any) -> Tensor:
                ranks = [each.to(hidden.device) for each in facts.losses or ()]
                parts.extend((of_hidden(hidden), torch.stack(ranks).mean() if ranks else None))
                return hidden.sum()

            own(*args, **inputs, loss_of_hidden=of_converted)
            losses, aux_loss = parts
            weight = config.rank_loss_weight
            assert losses is not None
        else:
            outputs = model.get_decoder()(*args, **inputs)
            losses, aux_loss = of_hidden(outputs.last_hidden_state), getattr(outputs, "aux_loss", None)
            weight = AUXILIARY_WEIGHT
        losses = losses.view(targets.shape)
        counts = targets.ne(-100).sum(-1)
        total = losses.sum()
        loss = total / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
        if aux_loss is not None:
            # A part of a batch carries its part of the auxiliary loss, as it does of the cross-entropy.
            share = 1.0 if num_items_in_batch is None else counts.sum() / num_items_in_batch
            loss = loss + weight * share * aux_loss
        return LossOutput(loss=loss, row_losses=losses.detach().sum(-1), row_counts=counts, aux_loss=aux_loss)

    model.forward = forward


def next_token_losses(model: Any, tokens: Tensor, token_losses: TokenLosses = plain_losses, **inputs: Any) -> Tensor:
    """Compute the cross-entropy of every next token, without the auxiliary loss of learned ranks.

    Args:
        model: a causal LM of transformers.
        tokens: (B, N + 1) int64.
        token_losses: see `chunked_losses`.
        **inputs: further arguments of the decoder, such as position_ids (B, N).

    Returns:
        (B, N) float32, nats.
    """
    return _next_token_losses(model, tokens, token_losses, inputs)[0]


def training_loss(model: Any, tokens: Tensor, token_losses: TokenLosses = plain_losses, **inputs: Any) -> Tensor:
    """Compute the mean cross-entropy of every next token, with the auxiliary loss of learned ranks.

    Args:
        model, tokens, token_losses, **inputs: see `next_token_losses`.

    Returns:
        Scalar, nats.
    """
    losses, aux_loss = _next_token_losses(model, tokens, token_losses, inputs)
    return losses.mean() if aux_loss is None else losses.mean() + AUXILIARY_WEIGHT * aux_loss


def _next_token_losses(
    model: Any, tokens: Tensor, token_losses: TokenLosses, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    outputs = model.get_decoder()(input_ids=tokens[:, :-1], use_cache=False, **inputs)
    targets = tokens[:, 1:]
    hidden, head = outputs.last_hidden_state.flatten(0, 1), output_head(model)
    losses = chunked_losses(head, hidden, targets.flatten(), model.config.vocab_size, token_losses)
    return losses.view(targets.shape), getattr(outputs, "aux_loss", None)
