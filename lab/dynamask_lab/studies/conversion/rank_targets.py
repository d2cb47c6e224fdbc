"""Ranks that learn how much the loss would suffer without a key, instead of the largest attention that it gets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dynamask.convert.attention import Projected, call_facts
from dynamask.convert.learn_ranks import run_decoder
from dynamask.convert.window_errors import _gradients
from dynamask.mixers.rank_loss import rank_loss
from dynamask.models.decoder import attention_of, decoder_of

FLOOR = 1e-9
"""Least effect, in nats, that ranks tell apart."""


@torch.no_grad()
def key_effects(layer: Projected, gradient: Tensor, local: int, chunk: int = 512) -> dict[str, Tensor]:
    """Say how much each key matters to queries at least `local` positions later.

    Args:
        layer: what an observer sees, of dense attention.
        gradient: (B, N, H·D), of the log-probability of drawn tokens by what the attention gives.
        local: distance from the key to the first query that counts.
        chunk: queries at a time.

    Returns:
        Each (B, G, N) float32. "max": the largest attention weight; "mass": their sum over queries and the heads of the
        group; "loss": the divergence, to second order, that leaving out this key alone causes, summed over queries.
    """
    batch, heads, length, dim = layer.query.shape
    groups = layer.key.shape[1]
    asking = layer.query.unflatten(1, (groups, -1)).float()
    steep = gradient.view(batch, length, heads, dim).transpose(1, 2).unflatten(1, (groups, -1)).float()
    given = layer.output.unflatten(1, (groups, -1)).float()
    position = torch.arange(length, device=layer.query.device)
    found = {name: torch.zeros(batch, groups, length, device=position.device) for name in ("max", "mass", "loss")}
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        at = position[part, None]
        logits = torch.einsum("bgrqd,bgkd->bgrqk", asking[:, :, :, part], layer.key.float()) * layer.scale
        weight = logits.masked_fill(position > at, -torch.inf).softmax(-1)
        weight = weight * (position <= at - local)
        along = torch.einsum("bgrqd,bgkd->bgrqk", steep[:, :, :, part], layer.value.float())
        along = along - (steep[:, :, :, part] * given[:, :, :, part]).sum(-1, keepdim=True)
        found["max"] = torch.maximum(found["max"], weight.amax((2, 3)))
        found["mass"] += weight.sum((2, 3))
        found["loss"] += 0.5 * (weight * along).sum(2).square().sum(2)
    return found


def effects_of(model: Any, tokens: Tensor) -> dict[int, tuple[Tensor, dict[str, Tensor]]]:
    """Per ranked layer the hidden state it reads and `key_effects`, of blocks (B, N)."""
    layers, local = model.config.ranked_layers, model.config.local
    gradients = _gradients(model, tokens, layers)
    found: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def observe(layer: Projected) -> None:
        index = layer.module.layer_idx
        if index in gradients:
            found[index] = layer.hidden_states, key_effects(layer, gradients.pop(index), local)

    facts = call_facts(tokens.shape[0], tokens.shape[1], None, None, 0, tokens.device)
    facts.observer = observe
    with torch.no_grad():
        run_decoder(model, tokens, facts)
    return found


def learn_by_loss(
    model: Any, blocks: Iterable[Tensor], *, steps: int, learning_rate: float, rows: int = 2
) -> list[float]:
    """Train the predictors as `dynamask.convert.learn_ranks` does, on the logarithm of the effect on the loss.

    Args:
        model: a converted model, frozen but for its predictors.
        blocks: batches (B, N), of which `rows` teach.
        steps, learning_rate: as there.
        rows: blocks of each batch that are read.

    Returns:
        The loss of every step.
    """
    predictors = {
        index: attention_of(decoder_of(model).layers[index]).rank_predictor for index in model.config.ranked_layers
    }
    dtypes = {index: next(module.parameters()).dtype for index, module in predictors.items()}
    for module in predictors.values():
        module.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [p for module in predictors.values() for p in module.parameters()],
        lr=learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    history = []
    source = iter(blocks)
    for step in range(steps):
        warm = min(1.0, (step + 1) / 11)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        tokens = next(source)[:rows]
        length = tokens.shape[1]
        position = torch.arange(length, device=tokens.device)
        counts = (position >= model.config.sinks) & (position < length - length // 16)
        losses = []
        for index, (hidden, effects) in effects_of(model, tokens).items():
            target = effects["loss"].clamp(min=FLOOR).log()
            if step == 0:
                with torch.no_grad():
                    predictors[index].down.bias.copy_(target[:, :, counts].mean((0, 2)))
            with torch.enable_grad():
                losses.append(rank_loss(predictors[index](hidden.detach()), target, counts.expand_as(target)))
        loss = torch.stack(losses).mean()
        (len(losses) * loss).backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], math.sqrt(len(losses)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(loss.detach())
    for index, module in predictors.items():
        module.to(dtypes[index])
        module.requires_grad_(False)
    model.config.trained_ranks = True
    return torch.stack(history).tolist()
