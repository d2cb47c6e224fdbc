"""A key/value cache of constant size that loses nothing: at most `window` keys per head and layer.

A key that `window` others outrank never returns to any later query (design section 2), so forgetting it
changes no output: decoding from the bounded cache is the same attention as decoding from the full one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dynamask.errors import CacheRollbackError, InvalidInputError
from dynamask.ops.checks import check_window
from dynamask.ops.expiry import key_expiry, sortable_scores
from dynamask.ops.interval.operators import triton_available

_PER_KEY = ("keys", "values", "scores", "positions")


class LiveKeys(NamedTuple):
    """What the queries of one call can see, ready for `interval_attention`.

    Attributes:
        key, value: (B, G, N, D): the live keys of the past, then the call's own.
        score: (B, G, N) their scores.
        position: (B, G, N) int64, in the sequence, padding counted; -1 for an empty slot.
        expiry: (B, G, N) int32, in the coordinates of this concatenation.
    """

    key: Tensor
    value: Tensor
    score: Tensor
    position: Tensor
    expiry: Tensor


class BoundedLayer(CacheLayerMixin):
    """The live keys of one layer.

    Args:
        window: keys a query keeps, hence the most this layer holds per key/value head.
        local: how many of them are the newest positions; `local = window` is a sliding window.

    Attributes:
        keys, values: (B, G, S, D), S <= window.
        scores: (B, G, S) the rank of each key, in the scores' own dtype.
        positions: (B, G, S) int64, the position of each key in the sequence; -1 for an empty slot, which
            only rows with left padding have.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, window: int, local: int = 0) -> None:
        super().__init__()
        check_window(window, local)
        self.window, self.local = window, local
        # Set by the first `extend`, like `keys` and `values`.
        self.scores: Tensor
        self.positions: Tensor
        self.seen = 0
        self._exact_from = 0  # the shortest length this layer can still be cropped to
        self._full = False  # every slot of every row holds a key and there are `window` of them
        self._clock: Tensor | None = None  # (B, G) int64, `seen` on the device, where a full layer counts itself
        self._everlasting: Tensor | None = None  # (B, G, S) int32, the expiry of slots that the one query all sees

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first keys; the layer starts without slots."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def extend(self, key: Tensor, value: Tensor, scores: Tensor | None, key_mask: Tensor | None) -> LiveKeys:
        """Add new keys, return what their queries see, and keep what later queries may see.

        Args:
            key, value: (B, G, Nq, D) of the new positions.
            scores: (B, G, Nq) float, higher is kept longer; None where recency alone decides.
            key_mask: (B, Nq) bool, True for a real token, or None.

        Returns:
            The keys visible to these Nq queries, which are the last positions of `LiveKeys.key`.
        """
        if scores is None:
            scores = torch.zeros(1, 1, 1, device=key.device).expand(key.shape[:3])
        if not self.is_initialized:
            self.lazy_initialization(key, value)
            self.scores, self.positions = (
                scores[:, :, :0],
                torch.zeros_like(scores[:, :, :0], dtype=torch.long),
            )
        if self.keys.shape[0] != key.shape[0]:
            raise InvalidInputError(
                f"the cache holds {self.keys.shape[0]} sequences and was given {key.shape[0]}: start a new cache "
                "or reorder this one"
            )
        one = self._full and key.shape[2] == 1 and not torch.is_grad_enabled()
        if one and (key_mask is None or bool(key_mask.all())):
            return self._replace(key, value, scores)
        self._clock = None
        return self._merge(key, value, scores, key_mask)

    def _merge(self, key: Tensor, value: Tensor, scores: Tensor, key_mask: Tensor | None) -> LiveKeys:
        """The general step: past and new keys side by side, expiry over both, survivors kept."""
        self._sort_by_position()
        batch, heads, new = key.shape[:3]
        position = torch.arange(self.seen, self.seen + new, device=key.device)
        if key_mask is None:
            key_mask = torch.ones(batch, new, dtype=torch.bool, device=key.device)
        # Rows differ in how many keys they hold only by their padding, which all heads of a row share.
        real = torch.cat([self.positions[:, 0] >= 0, key_mask], dim=-1)
        positions = torch.cat([self.positions, position.expand(batch, heads, new)], dim=-1)
        score = torch.cat([self.scores, scores], dim=-1)
        expiry = key_expiry(score.detach(), self.window, local=self.local, key_mask=real)
        key, value = torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
        live = LiveKeys(key, value, score, positions, expiry)
        length = positions.shape[-1]
        self.seen += new

        survives = expiry >= length
        if bool(survives.all()):
            self.keys, self.values, self.scores, self.positions = live.key, live.value, live.score, positions
        else:
            # Survivors to the right, in order; shorter rows get empty slots on the left.
            count = int(survives.sum(-1).max())
            index = survives.to(torch.int8).sort(dim=-1, stable=True).indices[..., length - count :]
            self.keys = _take_rows(live.key, index)
            self.values = _take_rows(live.value, index)
            self.scores = live.score.gather(-1, index)
            kept = survives.gather(-1, index)
            self.positions = torch.where(kept, positions.gather(-1, index), -1)
            if bool((~survives & real[:, None]).any()):
                self._exact_from = self.seen
        self._full = self.positions.shape[-1] == self.window and bool((self.positions >= 0).all())
        return live

    def _replace(self, key: Tensor, value: Tensor, scores: Tensor) -> LiveKeys:
        """One token into a full layer: it takes, in place, the slot of the lowest-ranked key of the contest."""
        if self._everlasting is None or self._everlasting.shape != self.positions.shape:
            self._everlasting = _everlasting(self.positions.shape, self.window, self.positions.device)
        if key.is_cuda and scores.dtype == self.scores.dtype == torch.float32 and triton_available():
            self._replace_in_one_launch(key, value, scores)
        else:
            self._replace_plainly(key, value, scores)
        self.advance()
        # The slots are in no order, but there is one query and it sees them all.
        return LiveKeys(self.keys, self.values, self.scores, self.positions, self._everlasting)

    def _replace_plainly(self, key: Tensor, value: Tensor, scores: Tensor) -> None:
        rank = sortable_scores(self.scores)
        worst = torch.iinfo(rank.dtype).max
        # The contest: keys older than the local part. The key that leaves it now takes part for the first time.
        contest = self.positions <= self.seen - self.local
        low = torch.where(contest, rank, worst).amin(-1, keepdim=True)
        tied = contest & (rank == low)
        slot = torch.where(tied, self.positions, torch.iinfo(torch.long).max).argmin(-1, keepdim=True)
        # Without a local part the new key is in the contest too: it wins ties, and is dead on arrival below all.
        arrives = sortable_scores(scores) >= low if self.local == 0 else torch.ones_like(slot, dtype=torch.bool)
        for store, new in ((self.keys, key), (self.values, value)):
            index = slot.unsqueeze(-1).expand_as(new)
            store.scatter_(2, index, torch.where(arrives.unsqueeze(-1), new, store.gather(2, index)))
        self.scores.scatter_(-1, slot, torch.where(arrives, scores, self.scores.gather(-1, slot)))
        position = torch.where(arrives, self.seen, self.positions.gather(-1, slot))
        self.positions.scatter_(-1, slot, position)

    def _replace_in_one_launch(self, key: Tensor, value: Tensor, scores: Tensor) -> None:
        from dynamask.ops.triton.cache_insert import replace_lowest

        if self._clock is None:
            self._clock = torch.full(self.positions.shape[:2], self.seen, device=key.device)
            for name in _PER_KEY:
                setattr(self, name, getattr(self, name).contiguous())
        slots = (self.keys, self.values, self.scores, self.positions)
        replace_lowest(key, value, scores, *slots, self._clock, self.local)

    def advance(self) -> None:
        """Count the token that `extend`, or a replayed graph of it, has put into the full layer."""
        self.seen += 1
        self._exact_from = self.seen

    def addresses(self) -> tuple[int, ...] | None:
        """Where the tensors lie that decoding works on in place; None while steps still change their shapes."""
        if not self._full or self._clock is None or self._everlasting is None:
            return None
        tensors = (self.keys, self.values, self.scores, self.positions, self._clock, self._everlasting)
        return tuple(tensor.data_ptr() for tensor in tensors)

    def _sort_by_position(self) -> None:
        if self.positions.shape[-1] > 1 and bool((self.positions.diff(dim=-1) < 0).any()):
            order = self.positions.argsort(dim=-1)
            self.keys, self.values = _take_rows(self.keys, order), _take_rows(self.values, order)
            self.scores, self.positions = self.scores.gather(-1, order), self.positions.gather(-1, order)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not how this layer is fed: a layer that does not know the scores cannot know what to keep."""
        raise InvalidInputError(
            "BoundedCache serves dynamic-mask and sliding-window attention of dynamask models; this layer called "
            "Cache.update, which carries no scores. Convert the model first (dynamask.convert), or give it a "
            "DynamicCache."
        )

    def get_seq_length(self) -> int:
        """Positions seen so far, evicted ones included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask transformers would build: masks speak of all positions seen."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: the layer accepts sequences of any length."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors held, in bytes."""
        if not self.is_initialized:
            return 0
        held = [getattr(self, name) for name in _PER_KEY]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def crop(self, max_length: int) -> None:
        """Forget the positions from `max_length` on (negative: the last -max_length).

        Raises:
            CacheRollbackError: a key that was alive at that length has been evicted since.
        """
        if max_length < 0:
            max_length = max(0, self.seen + max_length)
        if max_length >= self.seen:
            return
        if max_length < self._exact_from:
            raise CacheRollbackError(
                f"cannot return to length {max_length}: keys were evicted at length {self._exact_from}, and a "
                f"bounded cache (window {self.window}) does not keep them. Copy the cache before the tokens you "
                "may want to take back, or use transformers' DynamicCache for speculative decoding."
            )
        self._sort_by_position()
        keep = self.positions[0, 0] < max_length  # nothing was evicted since, so all heads hold the same
        for name in _PER_KEY:
            setattr(self, name, getattr(self, name)[:, :, keep])
        self.seen = max_length
        self._full = False
        self._clock = None

    def reset(self) -> None:
        """Forget everything."""
        self.keys, self.values = None, None  # type: ignore[assignment]
        self._clock = self._everlasting = None
        self.is_initialized = self._full = False
        self.seen = self._exact_from = 0

    def _index_batch(self, index: Tensor) -> None:
        self._clock = None
        if self.is_initialized:
            for name in _PER_KEY:
                tensor = getattr(self, name)
                setattr(self, name, tensor.index_select(0, index.to(tensor.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row b continues what row `beam_idx[b]` holds."""
        self._index_batch(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        self._index_batch(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        self._clock = None
        if self.is_initialized:
            for name in _PER_KEY:
                setattr(self, name, getattr(self, name).repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self._clock = self._everlasting = None
        if self.is_initialized:
            for name in _PER_KEY:
                setattr(self, name, getattr(self, name).to(device, non_blocking=True))


class BoundedCache(Cache):
    """A transformers cache of at most `window` keys per key/value head and layer, at any length.

    Logits equal those of the full cache: what it forgets, no later query could see. Works in `generate()`
    (greedy, sampling, beams), with prefill, chunked prefill and single tokens in any order.

    Args:
        config: configuration of the model it is for; gives layers, window and local where not given here.
        window: keys per query and head. Default `config.window`, or Doge's `config.keep_window_size`.
        local: how many of them are the newest positions. Default `config.local`, or 0.
        num_hidden_layers: default `config.num_hidden_layers`.
        graphs: on a GPU, record the step of a dynamask model as a CUDA graph once the cache is full, and replay it
            for every further token (`dynamask.models.cuda_graph`). The same numbers without the launches' waiting.

    Raises:
        InvalidInputError: no window to be found, or attention that a bounded cache cannot serve.

    It cannot go back past an eviction: `crop` raises `CacheRollbackError` then.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        window: int | None = None,
        local: int | None = None,
        num_hidden_layers: int | None = None,
        graphs: bool = True,
    ) -> None:
        self.graphs = graphs
        attention = getattr(config, "attention", "dma") if config is not None else "dma"
        mixers = getattr(config, "layer_attention", None)  # where layers differ
        for kind in mixers or [attention]:
            if kind not in ("dma", "swa"):
                raise InvalidInputError(
                    f"a bounded cache serves attention 'dma' and 'swa'; this model has attention {kind!r}, whose "
                    "queries see every past key: use dynamask.models.new_cache(config) or DynamicCache"
                )
        if window is None:
            window = getattr(config, "window", None) or getattr(config, "keep_window_size", None)
        if local is None:
            local = getattr(config, "local", None) or 0
        if num_hidden_layers is None:
            num_hidden_layers = getattr(config, "num_hidden_layers", None)
        if window is None or num_hidden_layers is None:
            raise InvalidInputError(
                "BoundedCache needs a config with window and num_hidden_layers, or both as arguments; "
                f"got window={window!r}, num_hidden_layers={num_hidden_layers!r}"
            )
        # Converted models may have layers that were sliding already, with a window of their own.
        windows = getattr(config, "layer_windows", None) or [window] * num_hidden_layers
        if None in windows:
            raise InvalidInputError(
                "this model has layers left dense, whose queries see every past key, as no bounded cache keeps them: "
                "generate() without past_key_values takes the right cache, or use DynamicCache"
            )
        locals_ = getattr(config, "layer_locals", None) or [
            window if kind == "swa" else local for kind in mixers or [attention] * num_hidden_layers
        ]
        super().__init__(layers=[BoundedLayer(w, n) for w, n in zip(windows, locals_, strict=True)])

    @property
    def num_bytes(self) -> int:
        """Memory of all layers, in bytes."""
        return cache_bytes(self)


def cache_bytes(cache: Cache) -> int:
    """Memory of a cache's tensors, in bytes, whatever its kind."""
    total = 0
    for layer in cache.layers:
        held = getattr(layer, "num_bytes", None)
        if held is None:
            tensors = [t for t in (layer.keys, layer.values) if t is not None]
            held = sum(t.numel() * t.element_size() for t in tensors)
        total += held
    return total


def bounded_layer(cache: Cache, layer_idx: int) -> BoundedLayer | None:
    """The cache's layer if it is a bounded one."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    return layer if isinstance(layer, BoundedLayer) else None


@lru_cache(maxsize=8)
def _everlasting(shape: torch.Size, window: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # shared by layers and calls, whatever mode each is in
        return torch.full(shape, window, dtype=torch.int32, device=device)


def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(2, index.unsqueeze(-1).expand(*index.shape, rows.shape[-1]))
