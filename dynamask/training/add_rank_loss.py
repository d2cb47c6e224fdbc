"""The ranks' loss in trainers that compute the loss themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dynamask.errors import InvalidInputError
from dynamask.mixers.rank_loss import RankLosses
from dynamask.models.modeling import AUXILIARY_WEIGHT


def add_rank_loss(trainer: Any) -> Any:
    """Add the loss of the ranks to what a trainer computes from a model's outputs.

    A model adds the loss of its ranks to its own loss, which it computes from labels. Label smoothing, TRL's trainers
    and any `compute_loss` of one's own take logits or hidden states in its place: the ranks would not learn. Call this
    once, before `trainer.train()`. Where the model adds the loss itself, nothing is added.

    Args:
        trainer: a transformers `Trainer`, or one derived from it, of a native or a converted model.

    Returns:
        The trainer.

    Raises:
        InvalidInputError: no layer of its model learns ranks.
    """
    layers = _layers(trainer.model)
    if not layers:
        raise InvalidInputError(f"no layer of {type(trainer.model).__name__} learns ranks")
    compute_loss = trainer.compute_loss

    def with_ranks(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        losses = RankLosses()
        for layer in layers:  # stays there until the next call: a layer that is recomputed finds it again
            layer.rank_losses = losses
        result = compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        aux = losses.mean()
        if aux is None:
            return result
        loss: Tensor = result[0] if return_outputs else result
        config = _config(trainer.model)
        config.trained_ranks = True
        weight = getattr(config, "rank_loss_weight", AUXILIARY_WEIGHT)
        if num_items_in_batch is not None and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func):
            # The losses of the parts of a batch are summed; otherwise the trainer takes their mean.
            weight = weight / getattr(trainer, "current_gradient_accumulation_steps", 1)
        loss = loss + weight * aux.to(loss)
        return (loss, *result[1:]) if return_outputs else loss

    trainer.compute_loss = with_ranks
    return trainer


def _layers(model: Any) -> list[Any]:
    """The modules that collect losses: attention modules of converted models, decoders of native ones."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "rank_losses") and getattr(module, "rank_predictor", module) is not None
    ]


def _config(model: Any) -> Any:
    """The configuration of the model inside of wrappers."""
    return next(module.config for module in model.modules() if hasattr(module, "rank_losses"))
