"""Tensor parallelism by transformers' plans: which heads a process holds, and what follows for windows and caches.

`from_pretrained(folder, tp_plan="auto")` under torchrun splits the projections as the configuration's plan says. Each
process then computes a contiguous part of the heads; windows, slopes, rank predictors and the cache must be of that
part alone, and the loss of the ranks is a mean over the heads of all processes.
"""

from __future__ import annotations

from typing import Any

from dynamask.errors import InvalidInputError
from dynamask.mixers.head_shard import HeadShard, check_divides
from dynamask.models.decoder import attention_of, decoder_of

SHARD_FIELD = "_head_shard"
"""Attribute of a configuration whose model is split; it is not saved."""


class TensorParallelLoading:
    """Mixed in before transformers' `PreTrainedModel`: `from_pretrained` tells a split model which heads it holds."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, see transformers. With `tp_plan` or `distributed_config` it is split over the processes.

        Raises:
            InvalidInputError: key/value heads that the processes cannot divide, or attention that cannot be split.
        """
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if (getattr(model, "_tp_size", None) or 1) > 1:
            hold_head_shard(model)
        return loaded


def split_attention(plan: dict[str, str]) -> list[str]:
    """Return the patterns of the attention modules whose heads a plan divides between the processes."""
    keys = (".k_proj", ".query_key_value")
    return [name.rsplit(".", 1)[0] for name, style in plan.items() if name.endswith(keys) and style == "colwise"]


def hold_head_shard(model: Any) -> None:
    """Restrict windows, slopes and caches of a split model to the heads of this process.

    Args:
        model: a model that transformers has split by its `tp_plan`.

    Raises:
        InvalidInputError: key/value heads that the processes cannot divide, or attention that cannot be split.
    """
    if not split_attention(model.tp_plan or {}):
        return  # every process computes all heads
    mesh = model._device_mesh
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    check_divides(model.config.num_key_value_heads, mesh.size())
    shard, group = HeadShard(mesh.get_local_rank(), mesh.size()), mesh.get_group()
    decoder = decoder_of(model)
    for layer in decoder.layers:
        attention = attention_of(layer)
        hold = getattr(attention, "hold_heads", None)
        if hold is None:
            raise InvalidInputError(
                f"{type(attention).__name__} cannot be split over processes by heads (tp_plan): tensor parallelism "
                "serves dma with learned ranks, swa and mha"
            )
        hold(shard, group)
    for config in {id(each.config): each.config for each in (model, decoder)}.values():
        config.__dict__[SHARD_FIELD] = shard
