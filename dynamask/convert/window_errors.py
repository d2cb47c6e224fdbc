"""What each key/value head's window and slope cost: an estimate of the divergence that they cause."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dynamask.convert.attention import Projected, call_facts
from dynamask.convert.learn_ranks import run_decoder
from dynamask.errors import InvalidInputError
from dynamask.mixers.rank_predictor import sloped_ranks
from dynamask.models.decoder import attention_of, decoder_of, output_projection_of
from dynamask.training.loss import output_head

_CHUNK = 1024


def candidate_windows(least: int, context: int, ratio: float = 1.4) -> list[int]:
    """Return windows from `least` to the context, each about `ratio` times the one before."""
    windows = [least]
    while windows[-1] * ratio < context:
        windows.append(max(windows[-1] + 1, round(windows[-1] * ratio)))
    return [*windows, context] if windows[-1] < context else windows


def window_errors(
    model: Any,
    tokens: Tensor,
    candidates: Sequence[int],
    slopes: Sequence[float] = (0.0,),
    *,
    queries: int = 256,
) -> Tensor:
    """Estimate the divergence from dense attention that each window and slope of each head causes, others dense.

    To second order, changing what a head gives at a position by d changes the model's distributions by
    KL = E[(g·d)^2] / 2, where g is the gradient of the log-probability of tokens drawn from the model (its Fisher
    information). Positions are taken as independent.

    With keys in the order of their ranks, a query keeps the first of its prefix. So one cumulative sum over the keys,
    of the weights p and of p (g·v), gives g·d of every window at once.

    Args:
        model: a converted model with trained ranks.
        tokens: (B, N) token ids.
        candidates: windows, each at least local + sinks; those of at least N have no error.
        slopes: of the ranks, in nats per token, see `dynamask.mixers.rank_predictor.sloped_ranks`.
        queries: positions of each block that are looked at, evenly spaced.

    Returns:
        (heads of the ranked layers, slopes, candidates) float64, nats summed over all positions.
    """
    config = model.config
    layers, groups = config.ranked_layers, config.num_key_value_heads
    gradients = _gradients(model, tokens, layers)
    errors = torch.zeros(len(layers), groups, len(slopes), len(candidates), dtype=torch.float64)
    batch, length = tokens.shape
    count = min(queries, length)

    def observe(layer: Projected) -> None:
        predictor, index = layer.module.rank_predictor, layer.module.layer_idx
        if predictor is None:
            return
        query = layer.query
        heads, dim = query.shape[1], layer.output.shape[-1]
        at = ((torch.arange(count, device=query.device) + 0.5) * (length / count)).long()
        steep = gradients.pop(index).view(batch, length, heads, dim)[:, at].transpose(1, 2).unflatten(1, (groups, -1))
        asking = query[:, :, at].unflatten(1, (groups, -1))
        ranks = predictor(layer.hidden_states)
        found = torch.zeros(groups, len(slopes), len(candidates), dtype=torch.float64, device=query.device)
        for row, head in itertools.product(range(batch), range(groups)):
            logits = (asking[row, head].float() @ layer.key[row, head].float().T) * layer.scale
            along = steep[row, head].float() @ layer.value[row, head].float().T
            found[head] += _head_errors(logits, along, at, ranks[row, head], slopes, candidates, config)
        errors[layers.index(index)] += found.cpu() * (length / count)

    facts = call_facts(batch, length, None, None, 0, tokens.device)
    facts.observer = observe
    with torch.no_grad():
        run_decoder(model, tokens, facts)
    return errors.flatten(0, 1)


def _head_errors(
    logits: Tensor,
    along: Tensor,
    at: Tensor,
    ranks: Tensor,
    slopes: Sequence[float],
    candidates: Sequence[int],
    config: Any,
) -> Tensor:
    """Sum the errors of one key/value head over queries: (slopes, candidates) float64.

    Args:
        logits: (R, Q, N) of the queries at positions `at`, of the R query heads of the group.
        along: (R, Q, N), the values along each query's gradient.
        at: (Q,).
        ranks: (N,) of the keys.
        slopes, candidates: see `window_errors`.
        config: `local` and `sinks`.
    """
    length = len(ranks)
    position = torch.arange(length, device=ranks.device)
    weight = logits.masked_fill(position > at[:, None], -torch.inf).softmax(-1)
    along = weight * along
    dense = along.sum(-1)
    contested = position <= at[:, None] - config.local
    newest_weight = (weight * ~contested).sum(-1)
    newest_along = (along * ~contested).sum(-1)
    places = torch.tensor([window - config.local for window in candidates], device=ranks.device)
    errors = []
    for slope in slopes:
        sloped = sloped_ranks(ranks[None, None], (slope,), position[None])[0, 0]
        sloped = sloped.masked_fill(position < config.sinks, torch.inf)
        # The better first, of equal ones the later.
        order = sloped.sort(stable=True).indices.flip(0)
        competes = contested[:, order]
        before = competes.int().cumsum(-1)
        taken = torch.searchsorted(before, places.int().expand(len(at), -1).contiguous(), right=True)
        taken = taken.expand(*weight.shape[:-1], -1)
        kept_weight = F.pad((weight[..., order] * competes).cumsum(-1), (1, 0)).gather(-1, taken)
        kept_along = F.pad((along[..., order] * competes).cumsum(-1), (1, 0)).gather(-1, taken)
        given = (newest_along[..., None] + kept_along) / (newest_weight[..., None] + kept_weight)
        change = (given - dense[..., None]).sum(0)
        errors.append(0.5 * change.square().sum(0, dtype=torch.float64))
    complete = torch.tensor([window >= length for window in candidates], device=ranks.device)
    return torch.stack(errors).masked_fill(complete, 0.0)


def _gradients(model: Any, tokens: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """Per layer (B, N, H·D): the gradient of drawn tokens' log-probability by what the attention gives."""
    captured: dict[int, Tensor] = {}

    def hook(index: int) -> Any:
        def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
            captured[index] = inputs[0]

        return keep

    modules = [output_projection_of(attention_of(decoder_of(model).layers[index])) for index in layers]
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
                    chances = head(part).float().softmax(-1)
                    if not bool(torch.isfinite(chances).all()):
                        raise InvalidInputError(
                            "allocate_windows: the model computes NaN or infinity on these blocks; check its weights "
                            "and dtype"
                        )
                    drawn = torch.multinomial(chances, 1, generator=generator)
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


def cheapest_windows(errors: Tensor, candidates: Sequence[int], total: int) -> Tensor:
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


def cheapest_slopes(errors: Tensor, candidates: Sequence[int], windows: Sequence[int]) -> list[int]:
    """Choose the slope of each head that makes its error at its window the smallest.

    Args:
        errors: (heads, slopes, candidates), see `window_errors`; between two candidates taken as linear.
        candidates: windows, which rise.
        windows: the chosen window of each head.

    Returns:
        The index of each head's slope; the first of equally good ones.
    """
    if len(candidates) == 1:
        return errors[:, :, 0].argmin(1).tolist()  # type: ignore[no-any-return]
    places = torch.tensor(candidates, dtype=torch.float64)
    wanted = torch.tensor(windows, dtype=torch.float64)
    left = (torch.searchsorted(places, wanted, right=True) - 1).clamp(0, len(candidates) - 2)
    share = ((wanted - places[left]) / (places[left + 1] - places[left])).clamp(0, 1)
    head = torch.arange(len(windows))
    between = errors[head, :, left] * (1 - share)[:, None] + errors[head, :, left + 1] * share[:, None]
    return between.argmin(1).tolist()  # type: ignore[no-any-return]


def _hull(places: Sequence[int], values: list[float]) -> list[tuple[int, int]]:
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
