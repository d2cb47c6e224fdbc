"""Training of the dense model on the tokens that converted models are distilled on: what adaptation alone gives."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WARMUP = 0.05
CHUNK = 4096


def adapt(model: Any, batches: Iterable[Tensor], *, steps: int, rate: float, clip: float = 1.0) -> list[float]:
    """Train all parameters of a bfloat16 model on the next token, with AdamW on float32 copies.

    The rate rises, then falls to zero.

    Args:
        model: a causal LM of transformers with `model` and `lm_head`.
        batches: token ids (B, N).
        steps: batches to train on.
        rate: the highest learning rate.
        clip: largest norm of the gradient.

    Returns:
        The loss of every step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float().clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    model.train()
    history: list[Tensor] = []
    for step, tokens in enumerate(islice(batches, steps)):
        progress = (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(progress / WARMUP, (1 - progress) / (1 - WARMUP) + 1e-3)
        history.append(_backward(model, tokens))
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_([m for m in masters if m.grad is not None], clip, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in parameters], [m.data for m in masters])
    model.eval()
    return [float(loss) for loss in history]


def _backward(model: Any, tokens: Tensor) -> Tensor:
    """Add the gradients of one batch, and return its mean loss. Logits exist for `CHUNK` positions at a time."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    rows, wanted = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    leaf = rows.detach().requires_grad_()
    total = torch.zeros((), device=tokens.device)
    for first in range(0, len(leaf), CHUNK):
        part = slice(first, first + CHUNK)
        loss = F.cross_entropy(model.lm_head(leaf[part]).float(), wanted[part], reduction="sum") / len(leaf)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    rows.backward(leaf.grad)
    return total
