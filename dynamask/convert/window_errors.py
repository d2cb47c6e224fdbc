"""What each key/value head's window costs: an estimate of the divergence that it causes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dynamask.convert.attention import Projected, call_facts
from dynamask.convert.learn_ranks import run_decoder
from dynamask.ops.expiry import key_expiry
from dynamask.ops.interval.api import attend
from dynamask.training.loss import output_head

_CHUNK = 1024


def candidate_windows(least: int, context: int) -> list[int]:
    """Return windows from `least` to the context, each twice the one before."""
    windows = [least]
    while windows[-1] * 2 < context:
        windows.append(windows[-1] * 2)
    return [*windows, context] if windows[-1] < context else windows


def window_errors(model: Any, tokens: Tensor, candidates: list[int]) -> Tensor:
    """Estimate the divergence from dense attention that each window of each head causes, all others being dense.

    To second order, changing what a head gives at a position by d changes the model's distributions by
    KL = E[(g·d)^2] / 2, where g is the gradient of the log-probability of tokens drawn from the model (its Fisher
    information). Positions are taken as independent.

    Args:
        model: a converted model with trained ranks.
        tokens: (B, N) token ids.
        candidates: windows; those of at least N have no error.

    Returns:
        (heads of the ranked layers, candidates) float64, nats summed over all positions.
    """
    config = model.config
    layers = config.ranked_layers
    gradients = _gradients(model, tokens, layers)
    errors = torch.zeros(len(layers), config.num_key_value_heads, len(candidates), dtype=torch.float64)

    def observe(layer: Projected) -> None:
        predictor, index = layer.module.rank_predictor, layer.module.layer_idx
        if predictor is None:
            return
        batch, heads, length, dim = layer.output.shape
        slope = gradients.pop(index).view(batch, length, heads, dim).transpose(1, 2).float()
        ranks = predictor(layer.hidden_states)
        for number, window in enumerate(candidates):
            if window >= length:
                continue
            expiry = key_expiry(ranks, window, local=config.local, sinks=config.sinks)
            given = attend(layer.query, layer.key, layer.value, expiry, scale=layer.scale, max_live=window)
            change = slope * (given - layer.output).float()
            along = change.unflatten(1, (config.num_key_value_heads, -1)).sum((2, 4))
            errors[layers.index(index), :, number] += 0.5 * along.square().sum((0, 2)).double().cpu()

    facts = call_facts(tokens.shape[0], tokens.shape[1], None, None, 0, tokens.device)
    facts.observer = observe
    with torch.no_grad():
        run_decoder(model, tokens, facts)
    return errors.flatten(0, 1)


def _gradients(model: Any, tokens: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """Per layer (B, N, H·D): the gradient of drawn tokens' log-probability by what the attention gives."""
    captured: dict[int, Tensor] = {}

    def hook(index: int) -> Any:
        def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
            captured[index] = inputs[0]

        return keep

    modules = [model.model.layers[index].self_attn.o_proj for index in layers]
    handles = [module.register_forward_pre_hook(hook(i)) for i, module in zip(layers, modules, strict=True)]
    facts = call_facts(tokens.shape[0], tokens.shape[1], None, None, 0, tokens.device)
    facts.observer = _look_away
    head = output_head(model)
    dtype = next(model.parameters()).dtype
    generator = torch.Generator(tokens.device).manual_seed(0)
    try:
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
            hidden = run_decoder(model, None, facts, embedded).to(dtype).flatten(0, 1)
            total = torch.zeros((), device=tokens.device)
            for part in hidden.split(_CHUNK):
                with torch.no_grad():
                    drawn = torch.multinomial(head(part).float().softmax(-1), 1, generator=generator)
                total = total + checkpoint(_log_probability, part, drawn, head, use_reentrant=False)
        found = torch.autograd.grad(total, [captured[index] for index in layers])
    finally:
        for handle in handles:
            handle.remove()
    return dict(zip(layers, found, strict=True))


def _look_away(layer: Projected) -> None:
    """An observer that only makes the attention dense."""


def _log_probability(hidden: Tensor, drawn: Tensor, head: Any) -> Tensor:
    return head(hidden).float().log_softmax(-1).gather(-1, drawn).sum()


def cheapest_windows(errors: Tensor, candidates: list[int], total: int) -> Tensor:
    """Choose windows of a given sum that make the sum of errors small.

    Each head's errors are replaced by their lower convex hull; the budget goes to the steepest pieces first. Between
    two candidates the error is taken as linear.

    Args:
        errors: (heads, candidates), of windows `candidates`, which rise.
        total: sum of the windows of all heads, at least heads times the first candidate.

    Returns:
        (heads,) float64 whose sum is `total`, as far as the largest candidates allow.
    """
    heads = errors.shape[0]
    chosen = torch.full((heads,), float(candidates[0]), dtype=torch.float64)
    pieces = []
    for head, values in enumerate(errors.tolist()):
        for start, end in _hull(candidates, values):
            gain = (values[start] - values[end]) / (candidates[end] - candidates[start])
            pieces.append((gain, head, candidates[end] - candidates[start]))
    left = total - heads * candidates[0]
    for _, head, width in sorted(pieces, key=lambda piece: -piece[0]):
        spent = min(width, left)
        chosen[head] += spent
        left -= spent
        if left <= 0:
            break
    return chosen


def _hull(places: list[int], values: list[float]) -> list[tuple[int, int]]:
    """Pieces (start, end) of the lower convex hull of points, as indices."""
    corners: list[int] = []
    for index in range(len(places)):
        while len(corners) >= 2:
            a, b = corners[-2:]
            if (values[b] - values[a]) * (places[index] - places[a]) < (values[index] - values[a]) * (
                places[b] - places[a]
            ):
                break
            corners.pop()
        corners.append(index)
    return list(itertools.pairwise(corners))
