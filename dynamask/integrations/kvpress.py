"""Rank predictors of dynamask as a press of kvpress, for dense models that are not converted.

kvpress (https://github.com/NVIDIA/kvpress) compresses the cache of a dense model after it has read a prompt. The press
here ranks the prompt's keys with predictors that `dynamask.convert.save_ranks` wrote. It differs from a converted model
in two ways: the prompt itself is read with dense attention, and keys that come later are never dropped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dynamask.convert import load_ranks, upcycle
from dynamask.errors import InvalidInputError
from dynamask.mixers.rank_predictor import sloped_ranks
from dynamask.models.decoder import attention_of, decoder_of

try:
    from kvpress import ScorerPress
except ImportError as error:
    raise ImportError(
        "dynamask.integrations.kvpress needs kvpress. It wants an older transformers than dynamask runs on: "
        "pip install --no-deps kvpress serves for its prefill presses"
    ) from error


@dataclass
class DynamaskPress(ScorerPress):
    """Keeps the keys that dynamask's rank predictors rank highest, with the first and the newest positions.

        press = DynamaskPress(ranks="smollm2.ranks.safetensors", compression_ratio=0.5)
        with press(model):
            outputs = model(input_ids, past_key_values=cache)

    Ranks of different heads are on one scale, so `AdaKVPress(DynamaskPress(...))` shares a budget over the heads.

    Args:
        compression_ratio: share of each head's keys that is dropped, at least 0 and below 1. Not read with
            `head_windows`.
        ranks: file that `dynamask.convert.save_ranks` wrote for this model.
        head_windows: keep in each head as many keys as the file says, instead of the same number in all.

    Raises (when it is applied to a model):
        InvalidInputError: no such file, or one for a model of another architecture, other sizes or other weights.
    """

    ranks: str | Path = ""
    head_windows: bool = False
    _converted: Any = field(default=None, init=False, repr=False)

    def post_init_from_model(self, model: Any) -> None:
        """Load the predictors, and check that they are for this model."""
        if not self.ranks:
            raise InvalidInputError("DynamaskPress needs ranks=FILE, as dynamask.convert.save_ranks writes it")
        width, windows = _settings(Path(self.ranks))
        dense = [layer for layer, entry in enumerate(windows) if entry is None] if isinstance(windows, list) else []
        # It shares the weights of the dense model, which stays as it is, and knows how to check and apply the file.
        converted = upcycle(model, 512, dense_layers=dense, rank_predictor_width=width)
        load_ranks(converted, self.ranks)
        self._converted = converted.eval()

    def _layer(self, module: nn.Module) -> Any:
        """The converted layer of the same index, with its predictor, windows and slopes."""
        if self._converted is None:
            raise InvalidInputError("DynamaskPress is applied by `with press(model):`")
        return attention_of(decoder_of(self._converted).layers[int(module.layer_idx)])  # type: ignore[arg-type]

    @torch.no_grad()
    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Rank the keys of a layer.

        Args:
            module: the attention layer, with `layer_idx`.
            hidden_states: (B, N, hidden) that the layer reads.
            keys, values: (B, G, N, D) of the cache.
            attentions, kwargs: not read.

        Returns:
            (B, G, N) float64; the first `sinks` and the newest `local` positions rank above all others.
        """
        layer, config = self._layer(module), self._converted.config
        length = keys.shape[2]
        place = torch.arange(length, device=keys.device)
        if layer.rank_predictor is None:  # the newest are kept
            return place.double().expand(keys.shape[:3]).clone()
        ranks = sloped_ranks(layer.rank_predictor(hidden_states), layer.slopes, place[None]).double()
        ranks = torch.nan_to_num(ranks, nan=-1e30)
        # Of equal ranks the later position wins, as in dynamask.key_expiry; ranks lie on a grid of 1/8192.
        score = ranks + place / (16384.0 * length)
        top = torch.finfo(score.dtype).max
        score[..., : config.sinks] = top
        if config.local:
            score[..., -config.local :] = top
        return score

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Drop the lowest-ranked keys of a layer, see `ScorerPress.compress`; with `head_windows`, head by head.

        Heads keep different numbers then, and kvpress masks what a narrower head does not keep
        (`module.masked_key_indices`), so that the cache takes the memory of the layer's widest head.
        """
        if not self.head_windows:
            return super().compress(module, hidden_states, keys, values, attentions, kwargs)  # type: ignore[no-any-return]
        windows = self._layer(module).windows
        length = keys.shape[2]
        if windows is None or min(windows) >= length:
            return keys, values
        score = self.score(module, hidden_states, keys, values, attentions, kwargs)
        kept = min(max(windows), length)
        index = score.topk(kept, dim=-1).indices  # the highest first: a head's surplus comes last
        gather = index[..., None]
        keys = keys.gather(2, gather.expand(-1, -1, -1, keys.shape[-1])).contiguous()
        values = values.gather(2, gather.expand(-1, -1, -1, values.shape[-1])).contiguous()
        place = torch.arange(kept, device=keys.device)
        surplus = place >= torch.tensor(windows, device=keys.device)[:, None]
        if bool(surplus.any()):
            masked = surplus.expand(keys.shape[0], -1, -1).nonzero(as_tuple=True)
            module.masked_key_indices = masked  # type: ignore[assignment]
        return keys, values


def _settings(path: Path) -> tuple[int | None, Any]:
    """The width of the file's predictors and its windows; `load_ranks` checks everything else."""
    if not path.is_file():
        raise InvalidInputError(f"there is no file {path} of rank predictors")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise InvalidInputError(f"{path} is damaged or no safetensors file: {error}") from error
    return json.loads(metadata.get("rank_predictor_width", "null")), json.loads(metadata.get("windows", "null"))


__all__ = ["DynamaskPress"]
