"""A layer of dynamic mask attention for models of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from dynamask.cache import BoundedCache
from dynamask.errors import InvalidInputError
from dynamask.integers import check_integer, check_window
from dynamask.mixers.base import RMSNorm
from dynamask.mixers.dma import DynamicMaskAttention as Mixer
from dynamask.models.configuration import DynamaskConfig
from dynamask.models.modeling import sequence_info


class DynamicMaskAttention(nn.Module):
    """Attention layer (B, N, dim) -> (B, N, dim) whose queries see the best-ranked keys of their prefix.

    Grouped-query attention with RMS-normalised, rotated query and key heads. It needs no configuration object and no
    model of dynamask around it.

        layer = DynamicMaskAttention(dim=512, window=256)
        hidden_states = hidden_states + layer(norm(hidden_states))
        loss = loss + 0.1 * layer.rank_loss  # trains the ranks; they learn by nothing else

    Args:
        dim: width of the input and output.
        num_heads: query heads H. None: dim / 64, at least 1.
        num_kv_heads: key/value heads G; H is a multiple of it. None: H.
        head_dim: width of a head. None: dim / H.
        window: keys that each query keeps: one integer, or one per key/value head.
        local: how many of them are the newest. None: half the smallest window, at most 128; with ranking="paper" 0.
        sinks: how many of them are the first of each document. None: 4, or a quarter of the smallest window; with
            ranking="paper" 0.
        ranking: "learned", or "paper" (arXiv 2508.02124).
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square of the head norms.
        layer_idx: which layer of a cache belongs to this layer.

    Attributes:
        rank_loss: () float, the loss of the ranks in the last forward in training mode with gradients and without a
            cache; None after any other, and with ranking="paper". Add it to the loss, or the ranks stay untrained and
            the layer is a sliding window with sinks. `rank_loss_of` collects those of a model.

    Raises:
        InvalidInputError: sizes that are no integers or contradict each other, or a window below local + sinks.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | Sequence[int] = 1024,
        local: int | None = None,
        sinks: int | None = None,
        ranking: str = "learned",
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        dim = check_integer(dim, "dim", 2, "width of the input")
        layer_idx = check_integer(layer_idx, "layer_idx", 0, "layer of a cache")
        for name, value, least in (
            ("num_heads", num_heads, 1),
            ("num_kv_heads", num_kv_heads, 1),
            ("head_dim", head_dim, 1),
            ("local", local, 0),
            ("sinks", sinks, 0),
        ):
            if value is not None:
                check_integer(value, name, least, "or None for the default")
        heads = max(1, dim // 64) if num_heads is None else num_heads
        if head_dim is None and dim % heads:
            raise InvalidInputError(
                f"dim={dim} is no multiple of num_heads={heads}: choose num_heads so that it is, or give head_dim"
            )
        found = check_window(window)
        per_head = isinstance(window, Sequence) or len(found) > 1
        windows = [list(found)] * (layer_idx + 1) if per_head else found[0]
        config = DynamaskConfig(
            vocab_size=1,
            hidden_size=dim,
            intermediate_size=dim,
            num_hidden_layers=layer_idx + 1,
            num_attention_heads=heads,
            num_key_value_heads=heads if num_kv_heads is None else num_kv_heads,
            head_dim=dim // heads if head_dim is None else head_dim,
            windows=windows,
            local=local,
            sinks=sinks,
            ranking=ranking,
            rope_theta=rope_theta,
            rms_norm_eps=norm_eps,
        )
        self.dim, self.layer_idx = dim, layer_idx
        self.mixer = Mixer(config, layer_idx)
        self.rank_loss: Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise: projections from a normal distribution of standard deviation 0.02, equal ranks."""
        for module in self.mixer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for module in self.mixer.modules():
            initialize = getattr(module, "initialize_parameters", None)
            if initialize is not None:
                initialize()

    @property
    def windows(self) -> tuple[int, ...]:
        """Return the keys that a query of each key/value head keeps."""
        return self.mixer.windows

    def extra_repr(self) -> str:
        """Return what identifies the layer in a printed model."""
        return f"dim={self.dim}, windows={self.windows}, local={self.mixer.local}, sinks={self.mixer.sinks}"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: (B, N, dim).
            attention_mask: (B, past + N), 1 for a real token, or None.
            position_ids: (B, N); default: counted on. Positions that start over begin a new packed document; without
                a mask and a cache a gap does so, too.
            segment_ids: (B, N) non-decreasing integers of packed documents, without a cache.
            cache: `BoundedCache` or another cache of transformers; this call's keys are added to its layer `layer_idx`.
                `new_cache` makes one for a stack of layers.

        Returns:
            (B, N, dim). Padding positions hold numbers without meaning.

        Raises:
            InvalidInputError: another width, a mask of another shape or an additive one, packed documents with a cache,
                or a cache made for other windows.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.dim:
            raise InvalidInputError(
                f"hidden_states must be (batch, length, {self.dim}); got shape {tuple(hidden_states.shape)}"
            )
        past = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
        sequence = sequence_info(hidden_states, attention_mask, position_ids, segment_ids, cache, past)
        learns = self.training and torch.is_grad_enabled() and cache is None
        if learns:
            sequence = replace(sequence, learns=True)
        output = self.mixer(hidden_states, sequence, cache)
        self.rank_loss = None
        if isinstance(output, tuple):
            output, self.rank_loss = output
        return output


def new_cache(layers: Sequence[DynamicMaskAttention]) -> BoundedCache:
    """Make the bounded cache of a stack of layers.

    Args:
        layers: with `layer_idx` 0, 1, 2, ... in this order.

    Raises:
        InvalidInputError: no layers, other indices, or layers with different `local` or `sinks`.
    """
    if not layers or [layer.layer_idx for layer in layers] != list(range(len(layers))):
        found = [layer.layer_idx for layer in layers]
        raise InvalidInputError(f"layers must have layer_idx 0, 1, 2, ... in order; got {found}")
    kept = {(layer.mixer.local, layer.mixer.sinks) for layer in layers}
    if len(kept) > 1:
        raise InvalidInputError(f"layers of one cache must have the same local and sinks; got {sorted(kept)}")
    (local, sinks) = kept.pop()
    return BoundedCache(
        windows=[layer.windows for layer in layers], local=local, sinks=sinks, num_hidden_layers=len(layers)
    )


def rank_loss_of(model: nn.Module) -> Tensor | None:
    """Return the mean `rank_loss` of all layers of a model after a forward, (); None where no layer has one."""
    losses = [module.rank_loss for module in model.modules() if isinstance(module, DynamicMaskAttention)]
    found = [loss for loss in losses if loss is not None]
    return torch.stack([loss.to(found[0].device) for loss in found]).mean() if found else None


__all__ = ["DynamicMaskAttention", "new_cache", "rank_loss_of"]
