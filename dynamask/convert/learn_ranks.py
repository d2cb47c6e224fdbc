"""Train the rank predictors of a converted model, with the model frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynamask.convert.attention import Projected, call_facts, no_mask
from dynamask.convert.models import check_converted
from dynamask.convert.progress import Clock, Report, check_training, load_state, save_state, token_blocks
from dynamask.errors import InvalidInputError
from dynamask.integers import check_integer
from dynamask.mixers.rank_loss import rank_loss, rank_target
from dynamask.models.decoder import attention_of, decoder_of

_REPORT_EVERY = 10
"""Steps between two looks at the loss; each look waits for the GPU."""

_TAIL = 16
"""The last N / 16 keys of a block have too few later queries to show what attention they get."""


def learn_ranks(
    model: PreTrainedModel,
    blocks: Iterable[Tensor],
    *,
    steps: int,
    learning_rate: float = 3e-3,
    warmup: int = 10,
    checkpoint: str | Path | None = None,
    save_every: float = 30.0,
    progress: Report | None = None,
) -> list[float]:
    """Train the rank predictors of all layers at once, and nothing else.

    Every block runs once through the model with all windows off. Each layer's predictor reads the hidden state that
    the layer reads and learns the logarithm of the largest attention that any query at least `local` positions later
    gives each key (`dynamask.future_attention`). Its gradient is computed in passing, so no graph of the model is
    kept. AdamW, linear warm-up, then a cosine to zero.

    Args:
        model: made by `dynamask.convert.upcycle`. Its rank predictors are trained in place, in float32, and returned
            to their dtype.
        blocks: iterable of (B, N) token ids; a list is read again from its beginning. `calibration_blocks` makes
            blocks half of which repeat their first half, which teaches what retrieval needs.
        steps: blocks to train on.
        learning_rate: highest rate.
        warmup: steps of linear warm-up.
        checkpoint: file that keeps the state of the training. If it exists, training continues from it.
        save_every: seconds between two writes of the checkpoint.
        progress: called every few steps.

    Returns:
        The loss of every step, mean over layers.

    Raises:
        InvalidInputError: a model without ranks, blocks that are too few, too short or no token ids, a model that
            computes NaN, or a checkpoint of another run.
    """
    check_converted(model, "learn_ranks")
    steps = check_training("learn_ranks", steps, learning_rate=learning_rate)
    warmup = check_integer(warmup, "learn_ranks: warmup", 0, "steps of the warm-up")
    checkpoint = None if checkpoint is None else Path(checkpoint)
    config: Any = model.config
    predictors = _predictors(model)
    dtypes = {index: next(module.parameters()).dtype for index, module in predictors.items()}
    parameters = [parameter for module in predictors.values() for parameter in module.parameters()]
    wanted_grad = [parameter.requires_grad for parameter in parameters]
    training = model.training
    identity = {"stage": "learn_ranks", "steps": steps, "learning_rate": learning_rate, "layers": len(predictors)}
    state = load_state(checkpoint, identity)
    try:
        model.eval()
        for module in predictors.values():
            module.float().requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        start, history = 0, torch.zeros(steps)
        if state is not None:
            for index, module in predictors.items():
                module.load_state_dict(state["predictors"][index])
            optimizer.load_state_dict(state["optimizer"])
            start, history = state["step"], state["losses"]
        _train(model, blocks, predictors, optimizer, history, start, steps, learning_rate, warmup, config, identity,
               checkpoint, save_every, progress)  # fmt: skip
    finally:
        for index, module in predictors.items():
            module.to(dtypes[index])
        for parameter, wanted in zip(parameters, wanted_grad, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = None
        model.train(training)
    config.trained_ranks = True
    return history.tolist()  # type: ignore[no-any-return]


def _predictors(model: Any) -> dict[int, Any]:
    return {index: attention_of(decoder_of(model).layers[index]).rank_predictor for index in model.config.ranked_layers}


def _train(
    model: Any,
    blocks: Iterable[Tensor],
    predictors: dict[int, Any],
    optimizer: torch.optim.Optimizer,
    history: Tensor,
    start: int,
    steps: int,
    learning_rate: float,
    warmup: int,
    config: Any,
    identity: dict[str, Any],
    checkpoint: Path | None,
    save_every: float,
    progress: Report | None,
) -> None:
    device = next(model.parameters()).device
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    clock, saved = Clock("ranks", steps, start), time.perf_counter()
    losses: list[Tensor] = []
    source = token_blocks(blocks, start, "learn_ranks", model.config.vocab_size)
    for step in range(start, steps):
        if steps == start:
            break
        tokens = next(source).to(device, non_blocking=True)
        if tokens.shape[1] <= config.local + config.sinks + 1:
            raise InvalidInputError(
                f"blocks of {tokens.shape[1]} tokens teach no ranks: keys within local = {config.local} and sinks = "
                f"{config.sinks} are kept anyway. Take longer blocks"
            )
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, warmup) * learning_rate
        if step == 0:
            _step(model, tokens, config, center=True)
        loss, worst = _step(model, tokens, config)
        torch.nn.utils.clip_grad_norm_(parameters, math.sqrt(len(predictors)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        clock.tokens += tokens.numel()
        last = step + 1 == steps
        if last or step == start or (step + 1) % _REPORT_EVERY == 0:
            _check_finite(worst, step)
            history[step + 1 - len(losses) : step + 1] = torch.stack(losses).cpu()
            losses.clear()
            if progress is not None:
                progress(clock.progress(step + 1, float(history[step])))
            if checkpoint is not None and (last or time.perf_counter() - saved > save_every):
                weights = {index: module.state_dict() for index, module in predictors.items()}
                state = {"predictors": weights, "optimizer": optimizer.state_dict(), "losses": history}
                save_state({"identity": identity, "step": step + 1, **state}, checkpoint)
                saved = time.perf_counter()


def _step(model: Any, tokens: Tensor, config: Any, *, center: bool = False) -> tuple[Tensor, Tensor]:
    """Run a block, leave the gradients in the predictors; return the mean loss, and per layer whether all is finite.

    With `center`, no gradients: every head's bias becomes the mean of its targets, which many steps would go into.
    """
    losses: list[Tensor] = []
    sums: list[Tensor] = []
    length = tokens.shape[1]
    position = torch.arange(length, device=tokens.device)
    # Sinks are kept whatever their rank; the last keys' targets are cut off by the end of the block.
    counts = (position >= config.sinks) & (position < length - length // _TAIL)

    def observe(layer: Projected) -> None:
        sums.append(layer.output.float().sum().to(tokens.device))
        predictor = layer.module.rank_predictor
        if predictor is None:
            return
        target, valid = rank_target(layer.query, layer.key, config.local, scale=layer.scale)
        if center:
            counted = valid & counts.to(valid.device)
            mean = target.where(counted, 0.0).sum((0, 2)) / counted.sum((0, 2)).clamp(min=1)
            predictor.down.bias.copy_(mean)
            losses.append(mean.mean())
            return
        hidden = layer.hidden_states.detach()
        half = hidden.is_cuda and hidden.dtype != torch.float64
        with torch.enable_grad(), torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
            loss = rank_loss(predictor(hidden), target, valid & counts.to(valid.device))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach().to(tokens.device))

    facts = call_facts(tokens.shape[0], length, None, None, 0, tokens.device)
    facts.observer = observe
    with torch.no_grad():
        run_decoder(model, tokens, facts)
    return torch.stack(losses).mean(), torch.stack(sums).isfinite() & torch.stack(losses).isfinite().all()


def run_decoder(model: Any, tokens: Tensor | None, facts: Any, embedded: Tensor | None = None) -> Tensor:
    """Run a converted model without its output layer: (B, N) token ids, or their embeddings, to (B, N, hidden).

    In bfloat16 where float32 weights lie on a GPU.
    """
    weight = next(model.parameters())
    narrow = weight.is_cuda and weight.dtype == torch.float32
    with torch.autocast("cuda", torch.bfloat16) if narrow else nullcontext():
        given = {"input_ids": tokens, "inputs_embeds": embedded, "attention_mask": no_mask(weight.device)}
        outputs = decoder_of(model)(**given, use_cache=False, dynamask=facts)
    return outputs.last_hidden_state  # type: ignore[no-any-return]


def _rate(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _check_finite(finite: Tensor, step: int) -> None:
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[0])
        raise InvalidInputError(
            f"the attention of layer {layer} is not finite at step {step + 1}: the model computes NaN or infinity on "
            "this text. Check its weights, or run it in bfloat16 or float32 instead of float16"
        )
