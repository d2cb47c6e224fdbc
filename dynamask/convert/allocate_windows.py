"""Choose the window of every key/value head, for a given mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamask.convert.attention import Projected, call_facts
from dynamask.convert.learn_ranks import run_decoder
from dynamask.convert.measured_rules import Rules, measured_divergences
from dynamask.convert.models import check_converted
from dynamask.convert.progress import Clock, Report, checked_block
from dynamask.convert.window_errors import candidate_windows, cheapest_slopes, cheapest_windows, window_errors
from dynamask.convert_settings import METHODS
from dynamask.errors import InvalidInputError
from dynamask.integers import check_integer, check_window
from dynamask.mixers.rank_predictor import slope_on_grid

SLOPES = tuple(steps / 8192 for steps in (0, 1, 2, 4, 6, 8, 12, 16, 32, 128, 8192))
"""Slopes that method "loss" tries, in nats per token: from none to the newest keys alone."""

_LIMITS = (math.inf, 16 / 8192, 4 / 8192, 0.0)
"""Highest slopes of the alternatives that are measured."""

_MEASURED_BLOCKS = 4


def allocate_windows(
    model: PreTrainedModel,
    blocks: Iterable[Tensor],
    window: int,
    *,
    method: str = "loss",
    slopes: Sequence[float] = SLOPES,
    max_batches: int | None = None,
    progress: Report | None = None,
) -> list[list[int] | None]:
    """Set a window for each key/value head, so that their mean is `window`, and a slope.

    Method "loss" estimates, from the model's gradients, the divergence that each head's window causes
    (`dynamask.convert.window_errors`), for windows of many sizes and several slopes, and gives the budget to where it
    saves most. The slope of a head is how much its ranks rise per token, so that keys lose against newer ones as they
    age (`dynamask.mixers.rank_predictor.sloped_ranks`). It takes a backward pass of the model over each batch of
    blocks, and its memory: few blocks in a batch need less. The estimate adds up heads that act together, and a steep
    slope gives up most of what a head chose. So the divergence is then measured with the chosen slopes, with none above
    a few low limits, and without slopes, each in windows of their own: the lowest is kept. Blocks that repeat
    their first half are left out, where there are others: what cannot be copied would outweigh the text.

    Method "threshold" needs no gradients. Ranks of all heads and layers predict one quantity, the largest attention
    that a key gets later. One threshold on it, over all heads, says how many keys each head needs at the end of a
    block; the threshold is chosen so that they are as many as the budget allows. All slopes are 0.

    Args:
        model: made by `dynamask.convert.upcycle`, with ranks trained by `learn_ranks`.
        blocks: iterable of (B, N) token ids; N is the context that the windows are made for.
        window: mean over the key/value heads of the layers that rank, at least local + sinks.
        method: "loss" or "threshold".
        slopes: those that "loss" chooses from, in nats per token; (0,) leaves the ranks as they are.
        max_batches: read no more than so many of the batches; None: all, so they must come to an end.
        progress: called after every block.

    Returns:
        The windows of every layer and head, which are also set in the model's configuration, as the slopes are. None
        for layers left dense. Their mean over the ranked layers is exactly `window`, each is at least local + sinks and
        at most the longest block. A window of at least the longest block gives every head that window: attention is
        dense then.

    Raises:
        InvalidInputError: a model without ranks or with untrained ones, no blocks, or a window below local + sinks.
    """
    check_converted(model, "allocate_windows")
    config: Any = model.config
    check_window(window, config.local, config.sinks)
    window = check_integer(window, "window", 1, "keys kept per query, on average over the heads")
    if not config.trained_ranks:
        raise InvalidInputError("allocate_windows: the ranks of this model are untrained; run learn_ranks first")
    if method not in METHODS:
        raise InvalidInputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not slopes or not all(0 <= slope < math.inf and (not slope or slope_on_grid(slope)) for slope in slopes):
        raise InvalidInputError(
            f"slopes must be numbers of at least 0, in nats per token, which are multiples of 1/8192; got {slopes!r}"
        )
    layers, groups = config.ranked_layers, config.num_key_value_heads
    batches = [checked_block(block, "allocate_windows", config.vocab_size) for block in islice(blocks, max_batches)]
    if not batches:
        raise InvalidInputError("allocate_windows: there are no blocks of tokens")
    context, least = max(block.shape[1] for block in batches), config.local + config.sinks
    heads_in_all = len(layers) * groups
    steep = [0.0] * heads_in_all
    if window >= context:
        chosen = [window] * heads_in_all
    elif method == "loss":
        candidates = candidate_windows(max(least, 1), context)
        tried = [slope_on_grid(slope) for slope in slopes]
        errors = _errors(model, batches, candidates, tried, progress)
        rules = _alternatives(errors, candidates, tried, window)
        if len(rules) > 1:
            plain = [block for block in batches if not _repeats(block)] or batches
            rules = [_least_divergent(model, plain[:_MEASURED_BLOCKS], rules)]
        chosen, steep = list(rules[0].windows), list(rules[0].slopes)
    else:
        ranks = _ranks(model, batches, progress)
        chosen = [least + n for n in counts_above_threshold(ranks, window - least)]
    Rules(tuple(chosen), tuple(steep)).set(model)
    return [None if entry is None else list(entry) for entry in config.head_windows]


def _alternatives(errors: Tensor, candidates: list[int], slopes: list[float], window: int) -> list[Rules]:
    """Choose windows and slopes by their errors (heads, slopes, candidates), below one limit of slopes after another.

    The first are those without a limit. Equal ones are left out.
    """
    heads, least = errors.shape[0], candidates[0]
    found: dict[Rules, None] = {}
    for limit in _LIMITS:
        kept = [index for index, slope in enumerate(slopes) if slope <= limit]
        if not kept:
            continue
        part = errors[:, kept]
        wanted = cheapest_windows(part.amin(1), candidates, window * heads)
        spare = exact_sum(wanted - least, (window - least) * heads, candidates[-1] - least)
        windows = tuple(least + number for number in spare)
        steep = tuple(slopes[kept[index]] for index in cheapest_slopes(part, candidates, windows))
        found.setdefault(Rules(windows, steep))
    return list(found)


def _repeats(block: Tensor) -> bool:
    """Whether any row repeats its first half, but for some tokens that a block begins with."""
    half = block.shape[1] // 2
    same = (block[:, :half] == block[:, half : 2 * half]).float().mean(1)
    return bool((same > 0.9).any())


def _least_divergent(model: Any, batches: list[Tensor], rules: list[Rules]) -> Rules:
    """Return the rules with the lowest measured divergence, the first of equal ones."""
    training = model.training
    config, before = model.config, (model.config.windows, model.config.slopes)
    model.eval()
    try:
        found = measured_divergences(model, batches, rules).mean(0)
    finally:
        config.windows, config.slopes = before
        model.train(training)
    return rules[int(found.argmin())]


def _errors(
    model: Any, batches: list[Tensor], candidates: list[int], slopes: list[float], progress: Report | None
) -> Tensor:
    """Errors (heads of all ranked layers, slopes, candidates), summed over the blocks."""
    device = next(model.parameters()).device
    clock = Clock("windows", len(batches))
    total: Tensor | None = None
    training = model.training
    model.eval()
    try:
        for number, block in enumerate(batches):
            found = window_errors(model, block.to(device), candidates, slopes)
            total = found if total is None else total + found
            clock.tokens += block.numel()
            if progress is not None:
                progress(clock.progress(number + 1))
    finally:
        model.train(training)
    assert total is not None
    if not bool(total.isfinite().all()):
        raise InvalidInputError("allocate_windows: errors of windows are not finite: the model computes NaN")
    return total


def _ranks(model: Any, batches: list[Tensor], progress: Report | None) -> list[Tensor]:
    """Predicted ranks (heads of all ranked layers, B, contested keys) of every block."""
    config = model.config
    device = next(model.parameters()).device
    clock = Clock("windows", len(batches))
    ranks: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        for number, block in enumerate(batches):
            tokens = block.to(device)
            found: list[Tensor] = []

            def observe(layer: Projected, found: list[Tensor] = found) -> None:
                if layer.module.rank_predictor is not None:
                    predicted = layer.module.rank_predictor(layer.hidden_states)
                    found.append(predicted[:, :, config.sinks : predicted.shape[-1] - config.local].to(device))

            facts = call_facts(tokens.shape[0], tokens.shape[1], None, None, 0, device)
            facts.observer = observe
            with torch.no_grad():
                run_decoder(model, tokens, facts)
            part = torch.cat(found, dim=1).transpose(0, 1).float()
            if not bool(part.isfinite().all()):
                raise InvalidInputError("allocate_windows: predicted ranks are not finite: the model computes NaN")
            ranks.append(part)
            clock.tokens += tokens.numel()
            if progress is not None:
                progress(clock.progress(number + 1))
    finally:
        model.train(training)
    return ranks


def counts_above_threshold(ranks: list[Tensor], budget: int) -> list[int]:
    """Find how many keys of each head exceed one common threshold, so that their mean is the budget.

    Args:
        ranks: per batch (heads, B, keys) float.
        budget: mean number of keys.

    Returns:
        One integer per head, the mean over the blocks; their mean is exactly `budget`, each at most the number of
        keys of the longest block.
    """
    heads = ranks[0].shape[0]
    blocks = sum(part.shape[1] for part in ranks)
    longest = max(part.shape[2] for part in ranks)
    flat = [part.flatten(1).sort(dim=-1).values for part in ranks]

    def counts(threshold: float) -> Tensor:
        edge = torch.full((heads, 1), threshold, dtype=flat[0].dtype, device=flat[0].device)
        above = [part.shape[1] - torch.searchsorted(part, edge, right=True).squeeze(-1) for part in flat]
        return torch.stack(above).sum(0).double() / blocks

    low = min(float(part[:, 0].min()) for part in flat if part.shape[1]) - 1.0
    high = max(float(part[:, -1].max()) for part in flat if part.shape[1])
    for _ in range(60):
        middle = (low + high) / 2
        if float(counts(middle).mean()) > budget:
            low = middle
        else:
            high = middle
    # Between the two thresholds lie ties: a share of them fills the budget.
    few, many = counts(high), counts(low)
    between = float((many - few).mean())
    share = (budget - float(few.mean())) / between if between > 0 else 0.0
    return exact_sum(few + share * (many - few), budget * heads, longest)


def exact_sum(wanted: Tensor, total: int, most: int) -> list[int]:
    """Round numbers to integers from 0 to `most` whose sum is exactly `total`, largest remainders first."""
    wanted = wanted.double().clamp(0, most).cpu()
    whole = wanted.floor().long()
    missing = min(total, most * len(whole)) - int(whole.sum())
    while missing:
        step = 1 if missing > 0 else -1
        room = whole < most if step > 0 else whole > 0
        gap = (wanted - whole) * step
        order = torch.where(room, gap, -torch.inf).argsort(descending=True, stable=True)
        chosen = order[: min(abs(missing), int(room.sum()))]
        whole[chosen] += step
        missing -= step * len(chosen)
    return whole.tolist()  # type: ignore[no-any-return]
