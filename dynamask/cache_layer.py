"""The layers of a key/value cache of constant size: at most `windows[g]` keys for key/value head g of a layer.

A key that a window of others outranks never returns to any later query (design section 2), so forgetting it changes no
output: decoding from the bounded cache is the same attention as decoding from the full one. Heads have windows of
different sizes, and each takes the memory of its window: the keys of a layer are one flat pool, head after head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin

from dynamask.errors import CacheRollbackError, InvalidInputError
from dynamask.integers import check_window
from dynamask.ops.autocast import autocast_dtype, without_autocast
from dynamask.ops.cache_contest import CacheContest
from dynamask.ops.cache_insert import insert_key
from dynamask.ops.expiry import key_expiry
from dynamask.ops.interval.api import attend
from dynamask.ops.interval.operators import triton_available
from dynamask.ops.ragged_decode import ragged_decode
from dynamask.ops.ragged_layout import RaggedLayout, ragged_layout

_POOLS = ("keys", "values", "ranks", "positions")

_ROOM = 64
"""Slots to grow into, at least, where windows are wider than the text: copying pools for every token would be slow."""

_FLAT_WORK = 1 << 19
"""Products of a query and a key, in numbers and per head, below which one call over all heads is faster than one per
head, although it computes as many times more."""

Windows = SupportsIndex | Sequence[int]


class LiveKeys(NamedTuple):
    """The keys that the queries of one call can see, padded to one length, as `interval_attention` takes them.

    Attributes:
        key, value: (B, G, N, D) and (B, G, N, Dv): the live keys of the past, then those of the call.
        score: (B, G, N) their ranks.
        position: (B, G, N) int64, the number of real tokens before each key; -1 for padding and for empty slots.
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
        windows: keys that a query keeps, hence the most that this layer holds: an integer for all key/value heads, or
            one integer per head.
        local: newest real tokens that are always kept. `local = window` is a sliding window.
        sinks: first real tokens of each row that are always kept.

    Attributes:
        keys, values: (B, S, D) and (B, S, Dv), a flat pool. The slots of head g are `offsets[g]` to `offsets[g + 1]`;
            its occupied slots are the first of them, in no order. S grows with the text up to the sum of the windows.
        ranks: (B, S) float32 (float64 where the given ranks are): what decides which keys stay.
        positions: (B, S) int32, the number of real tokens before each key; -1 for an empty slot.
        clock: (B, G) int64, the real tokens seen, the same for all heads of a row.

    Raises:
        InvalidInputError: windows, local or sinks that `key_expiry` refuses.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, windows: Windows, *, local: int = 0, sinks: int = 0) -> None:
        super().__init__()
        self._given = windows
        self.windows = check_window(windows, local, sinks)  # one for all heads while their number is not known
        self.local, self.sinks = int(local), int(sinks)
        self._slopes: tuple[float, ...] | None = None  # of the ranks of the keys that are held
        self._fitting: object = None  # the arguments of `check_fits` that were last found to fit
        # Set by the first keys, like `keys` and `values`.
        self.ranks: Tensor
        self.positions: Tensor
        self.clock: Tensor
        self._layout: RaggedLayout
        self._narrowest = self._widest = 0
        self._counters: Tensor | None = None  # of `ragged_decode_launch`
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self._contest: CacheContest | None = None  # on a CPU, while single tokens come
        self._mask: tuple[tuple[RaggedLayout, int, torch.dtype], Tensor] | None = None  # see `_own_slots`
        self.seen = 0
        self._exact_from = 0  # the shortest length this layer can still be cropped to
        self._calls: list[int | Tensor] = []  # since then: tokens of each call, or its key mask
        self._least = self._most = 0  # bounds on the real tokens of a row, known without a look at the device
        self._room = 0  # real tokens that fit before the pools must grow

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what is only remembered."""
        return {**self.__dict__, "_contest": None, "_mask": None, "_counters": None}

    @property
    def offsets(self) -> tuple[int, ...]:
        """Return the first slot of each head, then the number of slots."""
        return self._layout.offsets

    @property
    def keys_held(self) -> Tensor:
        """Return how many keys each head holds, (B, G) int64."""
        return torch.minimum(self.clock, self.clock.new_tensor(self.windows))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and the number of heads from the first keys; the layer starts without slots."""
        batch, groups, _, dim = key_states.shape
        self.windows = check_window(self._given, self.local, self.sinks, groups=groups)
        self._narrowest, self._widest = min(self.windows), max(self.windows)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(batch, 0, dim)
        self.values = value_states.new_zeros(batch, 0, value_states.shape[-1])
        self.ranks = torch.zeros(batch, 0, dtype=torch.float32, device=self.device)
        self.positions = torch.zeros(batch, 0, dtype=torch.int32, device=self.device)
        self.clock = torch.zeros(batch, groups, dtype=torch.int64, device=self.device)
        self._layout = ragged_layout((0,) * groups, self.device)
        self.is_initialized = True

    def check_fits(
        self, windows: Windows, *, local: int = 0, sinks: int = 0, slopes: tuple[float, ...] | None = None
    ) -> None:
        """Refuse to serve attention that keeps other keys than this layer.

        Args:
            windows, local, sinks: of the attention that is about to use the layer, as in `BoundedLayer`.
            slopes: of its ranks, per key/value head; None where all are 0, as in `ConvertedConfig.head_slopes`.

        Raises:
            InvalidInputError: they are not those the layer was made for, or the slopes are not those of the keys that
                the layer holds.
        """
        if self.seen == 0:
            self._slopes = slopes
        elif slopes != self._slopes:
            raise InvalidInputError(
                f"the ranks of the keys in this cache rise by {self._slopes} per token, those of the layer that uses "
                f"it by {slopes}: slopes were changed after the cache was filled. Start with a new cache"
            )
        exactly = (tuple(windows) if isinstance(windows, list) else windows, local, sinks)
        known = isinstance(windows, (int, tuple, list))
        if known and self._fitting == exactly:
            return
        wanted = check_window(windows, local, sinks)
        heads = max(len(wanted), len(self.windows))
        # One integer stands for all heads.
        same = all(len(w) == heads or len(set(w)) == 1 for w in (wanted, self.windows)) and all(
            one == other for one, other in zip(_spread(wanted, heads), _spread(self.windows, heads), strict=True)
        )
        if not same or (local, sinks) != (self.local, self.sinks):
            raise InvalidInputError(
                f"this cache was made for windows {_shown(self.windows)}, local {self.local}, sinks {self.sinks}, and "
                f"the layer that uses it has windows {_shown(wanted)}, local {local}, sinks {sinks}: make the cache "
                "from the configuration of the model, BoundedCache(model.config)"
            )
        self._fitting = exactly if known else None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ranks: Tensor | None,
        *,
        key_mask: Tensor | None = None,
        bias_is_rank: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Add the keys of this call, and attend from its queries to the keys that they keep.

        Args:
            query: (B, H, Nq, D); H is a multiple of the G key/value heads.
            key, value: (B, G, Nq, D) and (B, G, Nq, Dv) of the same tokens.
            ranks: (B, G, Nq) float, the higher is kept longer; None keeps the newest.
            key_mask: (B, Nq) bool, True for a real token, or None where all are.
            bias_is_rank: whether the ranks are also added to the logits of their keys (the paper's form). One
                that is not finite adds nothing.
            scale: factor on the query-key products, default D**-0.5.

        Returns:
            (B, H, Nq, Dv) in the query's dtype: the attention over the whole text, of which the layer holds what is
            visible. Rows of padding hold numbers without meaning.

        Raises:
            InvalidInputError: shapes or dtypes that do not fit each other or what the layer holds.
        """
        narrow = autocast_dtype(query)
        if narrow is not None:
            attend_so = partial(self.attend, ranks=ranks, key_mask=key_mask, bias_is_rank=bias_is_rank, scale=scale)
            return without_autocast(attend_so, query, key, value, dtype=narrow)
        key, value, ranks = self._admit(key, value, ranks, key_mask)
        narrowed = query if query.dtype == self.dtype else query.to(self.dtype)
        if key.shape[2] == 1 and not torch.is_grad_enabled():
            self._insert(key, value, ranks, key_mask)
            live = None if self._least >= self._widest else self.positions >= 0
            bias = _finite(self.ranks) if bias_is_rank else None
            output = self._decode(narrowed, live, bias, scale)
        else:
            keys = self._merge(key, value, ranks, key_mask)
            bias = _finite(keys.score) if bias_is_rank else None
            output = attend(narrowed, keys.key, keys.value, keys.expiry, bias=bias, scale=scale, max_live=self.windows)
        return output if output.dtype == query.dtype else output.to(query.dtype)

    def fill(self, key: Tensor, value: Tensor, ranks: Tensor, expiry: Tensor) -> None:
        """Take the keys of a first call whose attention has been computed elsewhere.

        Args:
            key, value, ranks: as in `attend`; all tokens are real.
            expiry: (B, G, Nq) int32, as `dynamask.key_expiry` gives it for the windows of this layer.

        Raises:
            InvalidInputError: the layer holds keys, or as `attend`.
        """
        if self.seen:
            raise InvalidInputError(f"fill: the layer holds keys of {self.seen} tokens; make a new cache")
        key, value, admitted = self._admit(key, value, ranks, None)
        assert admitted is not None
        position = self.clock[..., None] + torch.arange(key.shape[2], device=key.device)
        self.clock = self.clock + key.shape[2]
        self._count(key.shape[2], None)
        self._keep(LiveKeys(key, value, admitted, position, expiry))

    def check_takes(self, other: BoundedLayer) -> None:
        """Raise `InvalidInputError` unless this layer is empty and made for what `other` keeps, see `take`."""
        if self.seen:
            raise InvalidInputError(f"take: the layer holds keys of {self.seen} tokens; make a new cache")
        self.check_fits(other.windows, local=other.local, sinks=other.sinks, slopes=other._slopes)

    def take(self, other: BoundedLayer) -> None:
        """Hold copies of what another layer of the same windows, local and sinks holds: see `check_takes`."""
        self.__dict__.update({**other.__getstate__(), "_calls": [*other._calls]})
        for name in (*_POOLS, "clock"):
            setattr(self, name, getattr(other, name).clone())

    def extend(self, key: Tensor, value: Tensor, scores: Tensor | None, key_mask: Tensor | None) -> LiveKeys:
        """Add new keys, return what their queries see, and keep what later queries may see.

        For attention that needs the live keys themselves; `attend` is faster.

        Args:
            key, value: (B, G, Nq, D) and (B, G, Nq, Dv) of the new positions.
            scores: (B, G, Nq) float, the higher is kept longer; None keeps the newest.
            key_mask: (B, Nq) bool, True for a real token, or None.

        Returns:
            The keys visible to these Nq queries, which are the last positions of `LiveKeys.key`.

        Raises:
            InvalidInputError: as `attend`.
        """
        key, value, scores = self._admit(key, value, scores, key_mask)
        if key.shape[2] == 1 and not torch.is_grad_enabled():
            self._insert(key, value, scores, key_mask)
            return self._live_keys()
        return self._merge(key, value, scores, key_mask)

    def _admit(
        self, key: Tensor, value: Tensor, ranks: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Check a call's tensors against each other and the pools, and bring them to the pools' dtypes."""
        if not self.is_initialized:
            _check_call(key, value, ranks, key_mask)
            self.lazy_initialization(key, value)
        batch, groups, new, dim = key.shape
        if self.keys.shape[0] != batch:
            raise InvalidInputError(
                f"the cache holds {self.keys.shape[0]} sequences and was given {batch}: start a new cache or reorder "
                "this one"
            )
        if (groups, dim, value.shape) != (
            len(self.windows),
            self.keys.shape[2],
            (batch, groups, new, self.values.shape[2]),
        ):
            raise InvalidInputError(
                f"the cache holds {len(self.windows)} key/value heads of {self.keys.shape[2]} (keys) and "
                f"{self.values.shape[2]} (values) dimensions and was given keys {tuple(key.shape)} and values "
                f"{tuple(value.shape)}: start a new cache for another model"
            )
        if key.device != self.keys.device:
            raise InvalidInputError(
                f"the cache lies on {self.keys.device} and was given keys on {key.device}: call prefetch() after "
                "offload(), or start a new cache"
            )
        _check_call(key, value, ranks, key_mask)
        if key.dtype != self.dtype:
            key = key.to(self.dtype)
        if value.dtype != self.dtype:
            value = value.to(self.dtype)
        if ranks is not None and ranks.dtype != self.ranks.dtype:
            wide = torch.promote_types(ranks.dtype, self.ranks.dtype)
            self.ranks, ranks = self.ranks.to(wide), ranks.to(wide)
        self._leave_inference_mode()
        return key, value, ranks

    def _leave_inference_mode(self) -> None:
        """Copy what inference mode made: it cannot be changed, nor be saved for a backward pass, outside of it."""
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            for name in (*_POOLS, "clock"):
                setattr(self, name, getattr(self, name).clone())

    def _insert(self, key: Tensor, value: Tensor, ranks: Tensor | None, key_mask: Tensor | None) -> None:
        """One token, in place: no shape changes, but where a growing layer needs more slots."""
        self._make_room()
        pools = (self.keys, self.values, self.ranks, self.positions, self.clock)
        if not self._on_gpu() and not torch.compiler.is_compiling():
            contest = self._contest
            if contest is None or contest.positions is not self.positions:
                state = (self.ranks, self.positions, self.clock, self._layout)
                self._contest = contest = CacheContest(*state, self.local, self.sinks)
            contest.insert(key, value, ranks, key_mask, *pools)
        else:
            insert_key(key, value, ranks, key_mask, *pools, self._layout, self.local, self.sinks)
        self._count(1, key_mask)

    def _make_room(self) -> None:
        """Let the pools have a slot for one more key, and let nobody else need what they hold."""
        if self._most >= self._room:
            self._grow()
        if self.keys.requires_grad or self.ranks.requires_grad:  # a backward pass may still need what is overwritten
            for name in ("keys", "values", "ranks"):
                setattr(self, name, getattr(self, name).detach().clone())

    def room_for_a_token(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, ...]]:
        """Return what a kernel of a whole step puts a real token of every row into; `advance` counts it afterwards.

        Returns:
            keys, values, ranks, positions and clock, then the first slot of each head and the number of all.
        """
        self._leave_inference_mode()
        self._make_room()
        return self.keys, self.values, self.ranks, self.positions, self.clock, self.offsets

    def attend_to_slots(self, query: Tensor, scale: float) -> Tensor:
        """Attend from one token's queries (B, H, 1, D), in the layer's dtype, to the keys held: (B, H, 1, Dv)."""
        live = None if self._least >= self._widest else self.positions >= 0
        return self._decode(query, live, None, scale)

    def _on_gpu(self) -> bool:
        return self.keys.is_cuda

    def _decode(self, query: Tensor, live: Tensor | None, bias: Tensor | None, scale: float | None) -> Tensor:
        """The queries of one token against all occupied slots."""
        on_gpu = self._on_gpu()
        if not on_gpu and bias is None:
            return self._decode_by_torch(query, live, scale)
        if not on_gpu or query.dtype == torch.float64 or torch.compiler.is_compiling() or not triton_available():
            return ragged_decode(query, self.keys, self.values, live, self.offsets, bias, scale)
        from dynamask.ops.triton.ragged_decode import ragged_decode_launch

        # The operator and its checks around the kernels would take longer than they.
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        counters = self._counters
        if (
            counters is None
            or counters.numel() != query.shape[0] * len(self.windows)
            or counters.device != query.device
        ):
            shape = query.shape[0] * len(self.windows)
            self._counters = counters = torch.zeros(shape, dtype=torch.int32, device=query.device)
        return ragged_decode_launch(query, self.keys, self.values, live, self.offsets, bias, scale, counters)

    def _decode_by_torch(self, query: Tensor, live: Tensor | None, scale: float | None) -> Tensor:
        """Do `_decode` without biases by torch's dense attention: in one call where that is little work."""
        groups, layout = len(self.windows), self._layout
        batch, heads, _, dim = query.shape
        grouped = query.unflatten(1, (groups, -1)).flatten(2, 3)
        mask = live
        if layout.uniform:
            keys, values = (pool.unflatten(1, (groups, -1)) for pool in (self.keys, self.values))
            mask = None if live is None else live.unflatten(1, (groups, 1, -1))
            output = scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)
        elif batch * heads * layout.offsets[-1] * dim <= _FLAT_WORK * groups:
            # All queries against the slots of all heads, those of other heads masked.
            mask = self._own_slots(heads, query.dtype)
            if live is not None:
                mask = torch.where(live[:, None, None], mask, float("-inf"))
            keys, values = self.keys[:, None], self.values[:, None]
            output = scaled_dot_product_attention(query.transpose(1, 2), keys, values, mask, scale=scale)
        else:
            outputs = []
            for group, (start, stop) in enumerate(itertools.pairwise(layout.offsets)):
                keys, values = (pool[:, None, start:stop] for pool in (self.keys, self.values))
                mask = None if live is None else live[:, None, None, start:stop]
                outputs.append(scaled_dot_product_attention(grouped[:, group, None], keys, values, mask, scale=scale))
            output = torch.cat(outputs, 1)
        return output.reshape(*query.shape[:-1], -1)

    def _own_slots(self, heads: int, dtype: torch.dtype) -> Tensor:
        """(H, S) of this dtype: 0 where a slot belongs to the key/value head of the query head, -inf elsewhere."""
        made_for = (self._layout, heads, dtype)
        if self._mask is None or self._mask[0] != made_for:
            with torch.inference_mode(False):
                group = torch.arange(heads, device=self.keys.device) // (heads // len(self.windows))
                own = group[:, None] == self._layout.head
                mask = torch.zeros(own.shape, dtype=dtype, device=own.device).masked_fill_(~own, float("-inf"))
            self._mask = (made_for, mask)
        return self._mask[1]

    def _merge(self, key: Tensor, value: Tensor, ranks: Tensor | None, key_mask: Tensor | None) -> LiveKeys:
        """The general step: past and new keys side by side, expiry over both, survivors kept."""
        batch, groups, new = key.shape[:3]
        if ranks is None:
            ranks = self.ranks.new_zeros(1, 1, 1).expand(batch, groups, new)
        if key_mask is None:
            place = torch.arange(new, device=key.device)
        else:
            place = torch.where(key_mask, key_mask.cumsum(-1) - 1, -1)[:, None]
        position = self.clock[..., None] + place
        if key_mask is not None:
            position = torch.where(key_mask[:, None], position, -1)
        real, contest = key_mask, ranks.detach()
        past = min(self._most, self._layout.widest)
        if past:
            slot, old_position, empty = self._in_order(past)
            alive = old_position >= 0
            old_ranks = _take(self.ranks[..., None], slot)[..., 0]
            # An empty slot that only some heads have ranks below all of their keys, which fill the window.
            contest = torch.cat([old_ranks.detach().masked_fill(~alive, float("nan")), contest], -1)
            key, value = torch.cat([_take(self.keys, slot), key], 2), torch.cat([_take(self.values, slot), value], 2)
            ranks, position = torch.cat([old_ranks, ranks], -1), torch.cat([old_position, position], -1)
            if key_mask is not None or self._least < past:
                old = torch.arange(past, device=key.device) >= empty[:, None]
                real = torch.cat([old, old.new_ones(batch, new) if key_mask is None else key_mask], -1)
        expiry = key_expiry(contest, self.windows, local=self.local, sinks=self.sinks, key_mask=real)
        if past:
            column = torch.arange(past, dtype=torch.int32, device=key.device)
            expiry = torch.cat([torch.where(alive, expiry[..., :past], column), expiry[..., past:]], -1)
        keys = LiveKeys(key, value, ranks, position, expiry)
        self.clock = self.clock + (new if key_mask is None else key_mask.sum(-1, keepdim=True))
        self._count(new, key_mask)
        self._keep(keys)
        return keys

    def _in_order(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Lay the slots of each head side by side in the order of the text.

        Args:
            width: columns, at least the occupied slots of any head.

        Returns:
            slot: (B, G, width) int64. Columns without a key come first where no head of the row has a key for them,
                as padding does; the others come between the sinks and the other keys.
            position: (B, G, width) int64 of the keys, -1 in a column without one.
            empty: (B,) int64, how many columns come first.
        """
        slot, there = self._layout.padded[:, :width], self._layout.there[:, :width]
        position = torch.where(there, self.positions[:, slot].long(), -1)
        alive = position >= 0
        count = alive.sum(-1, keepdim=True)
        empty = (width - count).amin(1)
        missing = torch.arange(width, device=position.device) - count
        between = torch.where(missing < empty[:, None], -1, 2 * self.sinks + 1)
        order = torch.where(alive, 2 * position + 2, between).argsort(dim=-1, stable=True)
        return slot.expand_as(order).gather(-1, order), position.gather(-1, order), empty[:, 0]

    def _keep(self, keys: LiveKeys) -> None:
        """Pack the keys that survive into pools of the layout that `_count` has asked for."""
        layout = self._layout = self._spacious()
        if keys.key.is_cuda and _serves_kernels(keys):
            from dynamask.ops.triton.cache_keep import keep_launch

            found = keep_launch(*keys, layout.table, layout.offsets[-1])
            self.keys, self.values, self.ranks, self.positions = found
            return
        survives = keys.expiry == keys.key.shape[2]
        batch, groups, length = survives.shape
        slots, device = layout.offsets[-1], survives.device
        first = layout.first[:, None]
        slot = torch.where(survives, first + survives.cumsum(-1) - 1, slots)
        column = torch.arange(length, device=device).expand(batch, groups, length)
        chosen = torch.full((batch, slots + 1), -1, device=device).scatter_(-1, slot.flatten(1), column.flatten(1))
        chosen = chosen[:, :slots]
        index = (torch.arange(batch, device=device)[:, None], layout.head, chosen.clamp(min=0))
        self.keys, self.values, self.ranks = keys.key[index], keys.value[index], keys.score[index]
        self.positions = torch.where(chosen >= 0, keys.position[index], -1).to(torch.int32)
        if self._least < self._widest:
            self._clean()

    def _clean(self) -> None:
        """Put zeros into the empty slots: NaN there would reach dense attention, mask or no mask."""
        empty = (self.positions < 0)[..., None]
        self.keys, self.values = self.keys.masked_fill(empty, 0), self.values.masked_fill(empty, 0)

    def _count(self, new: int, key_mask: Tensor | None) -> None:
        """Count the tokens of a call on the host, after `clock` has counted them on the device."""
        self.seen += new
        self._most += new
        if key_mask is None:
            self._least += new
        elif new > 1:
            self._look()
        if self._most > self._narrowest:
            self._exact_from = self.seen
            self._calls.clear()
        elif key_mask is None and self._calls and isinstance(self._calls[-1], int):
            self._calls[-1] += new
        else:
            self._calls.append(new if key_mask is None else key_mask)

    def _look(self) -> None:
        """Read the bounds of the clock from the device."""
        self._least, self._most = (int(bound) for bound in self.clock.aminmax())

    def advance(self) -> None:
        """Count the token that a replayed graph of `attend` has put into the layer."""
        self._count(1, None)

    def counts(self) -> tuple[Any, ...]:
        """Return what the layer counts on the host, for `restore_counts`."""
        return self.seen, self._exact_from, [*self._calls], self._least, self._most

    def restore_counts(self, counts: tuple[Any, ...]) -> None:
        """Undo the counting of calls that have not run on the device, such as those of a recording that failed."""
        self.seen, self._exact_from, calls, self._least, self._most = counts
        self._calls = [*calls]

    def skip(self, tokens: int) -> None:
        """Count `tokens` more real tokens that were seen and evicted before what the layer holds, as benchmarks do."""
        self.positions = torch.where(self.positions >= 0, self.positions + tokens, -1)
        self.clock = self.clock + tokens
        self._count(tokens, None)

    def _spacious(self) -> RaggedLayout:
        """The layout for one more token and, where windows are wider than the text, some room to grow."""
        wanted = self._most + 1 + max(_ROOM, self._most // 8)
        if wanted >= self._widest:
            wanted = self._widest
        sizes = tuple(min(window, wanted) for window in self.windows)
        self._room = 1 << 62 if wanted == self._widest else wanted
        return ragged_layout(sizes, self.keys.device)

    def _grow(self) -> None:
        """Move the keys into larger pools."""
        old, new = self._layout, self._spacious()
        if old is new:
            return
        # Slots keep their places inside the heads.
        target = new.first[old.head] + old.place
        for name in _POOLS:
            pool = getattr(self, name)
            shape = (pool.shape[0], new.offsets[-1], *pool.shape[2:])
            larger = pool.new_full(shape, -1) if name == "positions" else pool.new_zeros(shape)
            setattr(self, name, larger.index_copy(1, target, pool))
        self._layout = new

    def _live_keys(self) -> LiveKeys:
        """All occupied slots, padded to the widest head, for a query that sees them all."""
        layout = self._layout
        groups, width = len(self.windows), layout.widest
        if layout.uniform:
            key, value, score, position = (getattr(self, name).unflatten(1, (groups, width)) for name in _POOLS)
            position = position.long()
        else:
            slot = layout.padded.expand(self.keys.shape[0], groups, width)
            key, value, score = _take(self.keys, slot), _take(self.values, slot), self.ranks[:, layout.padded]
            position = torch.where(layout.there, self.positions[:, layout.padded].long(), -1)
        column = torch.arange(width, dtype=torch.int32, device=key.device)
        return LiveKeys(key, value, score, position, torch.where(position >= 0, width, column))

    @property
    def steps_in_place(self) -> int:
        """Return how many tokens the layer can take one by one before its pools must grow."""
        return self._room - self._most

    def addresses(self) -> tuple[int, ...] | None:
        """Return where the tensors lie that the next token changes in place; None where its pools must grow.

        The last number says whether every slot is known to be occupied, in which case a step launches less.
        """
        if not self.is_initialized or self.steps_in_place <= 0:
            return None
        tensors = [self.keys, self.values, self.ranks, self.positions, self.clock]
        if self._counters is not None:
            tensors.append(self._counters)
        return (*map(Tensor.data_ptr, tensors), int(self._least >= self._widest))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: a layer that does not know the ranks cannot know what to keep.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(
            "BoundedCache serves dynamic-mask and sliding-window attention of dynamask models; this layer called "
            "Cache.update, which carries no scores. Convert the model first (dynamask.convert), or give it a "
            "DynamicCache."
        )

    def get_seq_length(self) -> int:
        """Return the number of positions seen so far, padding and evicted ones included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of transformers' mask, which covers all positions seen."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the layer accepts sequences of any length."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    @property
    def num_bytes(self) -> int:
        """Return the memory of the tensors held, in bytes."""
        if not self.is_initialized:
            return 0
        held = [getattr(self, name) for name in (*_POOLS, "clock")]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def check_crop(self, max_length: int) -> int:
        """Return the length that `crop` leaves, without a change; arguments and errors are those of `crop`."""
        length = max_length if max_length > 0 else max(0, self.seen + max_length)
        if length < min(self.seen, self._exact_from):
            raise CacheRollbackError(
                f"cannot return to length {length}: keys were evicted at length {self._exact_from}, and a bounded "
                f"cache (windows {_shown(self.windows)}) does not keep them. Copy the cache before the tokens you may "
                "want to take back, or use transformers' DynamicCache for speculative decoding."
            )
        return min(length, self.seen)

    def crop(self, max_length: int) -> None:
        """Forget the last positions.

        Args:
            max_length: negative: forget the last `-max_length` positions. 0: forget nothing (`reset` forgets all).
                Positive: forget the positions from `max_length` on.

        Raises:
            CacheRollbackError: a key that was alive at that length has been evicted since.
        """
        length = self.check_crop(max_length)
        if length >= self.seen:
            return
        # No key was evicted since: of each row, the newest keys go, as many as the calls brought real tokens.
        calls, left = [*self._calls], self.seen - length
        removed = torch.zeros_like(self.clock[:, :1])
        while left:
            call = calls.pop()
            size = call if isinstance(call, int) else call.shape[1]
            here = min(size, left)
            removed = removed + (here if isinstance(call, int) else call[:, size - here :].sum(-1, keepdim=True))
            if here < size:
                calls.append(size - here if isinstance(call, int) else call[:, : size - here])
            left -= here
        self.clock = self.clock - removed
        self.positions = torch.where(self.positions < self.clock[:, :1], self.positions, -1)
        self._clean()
        self._calls, self.seen = calls, length
        self._look()

    def reset(self) -> None:
        """Forget everything."""
        self.keys, self.values = None, None  # type: ignore[assignment]
        self._clear()

    def _over_batch(self, change: Any) -> None:
        """Replace every tensor that has a row per sequence by `change` of it."""
        if not self.is_initialized:
            return
        for name in (*_POOLS, "clock"):
            setattr(self, name, change(getattr(self, name)))
        if any(isinstance(call, Tensor) for call in self._calls):
            masks = [
                torch.ones(1, call, dtype=torch.bool, device=self.clock.device) if isinstance(call, int) else call
                for call in self._calls
            ]
            before = max(mask.shape[0] for mask in masks)
            self._calls = [change(torch.cat([mask.expand(before, -1) for mask in masks], 1))]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search: row b continues what row `beam_idx[b]` holds."""
        self._over_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch: integers, or a bool per row."""
        if indices.dtype == torch.bool:
            if self.is_initialized and indices.shape != self.clock.shape[:1]:
                raise InvalidInputError(
                    f"one bool per row selects rows of the cache, which holds {self.clock.shape[0]} sequences; got a "
                    f"mask of shape {tuple(indices.shape)}"
                )
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        self._over_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if not self.is_initialized or self.keys.device == device:
            return
        # Copies to the CPU are awaited: the next step may read them there.
        wait = device.type == "cpu"
        for name in (*_POOLS, "clock"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=not wait))
        self._calls = [call if isinstance(call, int) else call.to(device) for call in self._calls]
        self._layout = ragged_layout(self._layout.sizes, device)


def _spread(windows: tuple[int, ...], heads: int) -> tuple[int, ...]:
    return windows if len(windows) == heads else windows[:1] * heads


def _shown(windows: tuple[int, ...]) -> str:
    """Windows in a message: one number where they are all alike."""
    return str(windows[0]) if len(set(windows)) == 1 else str(list(windows))


def _check_call(key: Tensor, value: Tensor, ranks: Tensor | None, key_mask: Tensor | None) -> None:
    if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
        raise InvalidInputError(
            f"key and value must be (batch, key/value heads, tokens, dim) of the same tokens; got {tuple(key.shape)} "
            f"and {tuple(value.shape)}"
        )
    if ranks is not None and (ranks.shape != key.shape[:3] or not ranks.is_floating_point()):
        raise InvalidInputError(
            f"ranks must be float of shape {tuple(key.shape[:3])}, one per key; got {ranks.dtype} of shape "
            f"{tuple(ranks.shape)}"
        )
    if key_mask is not None and (key_mask.shape != (key.shape[0], key.shape[2]) or key_mask.dtype != torch.bool):
        raise InvalidInputError(
            f"key_mask must be bool of shape {(key.shape[0], key.shape[2])}, True for a real token; got "
            f"{key_mask.dtype} of shape {tuple(key_mask.shape)}"
        )


def _serves_kernels(keys: LiveKeys) -> bool:
    """Whether no gradient is wanted of these keys, and nothing traces what is done with them."""
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in (keys.key, keys.value, keys.score))
    return not wanted and not torch.compiler.is_compiling() and triton_available()


def _take(pool: Tensor, slot: Tensor) -> Tensor:
    """Rows `slot` (B, G, L) of a pool (B, S, D): (B, G, L, D)."""
    index = slot.flatten(1)[..., None].expand(-1, -1, pool.shape[-1])
    return pool.gather(1, index).unflatten(1, slot.shape[1:])


def _finite(ranks: Tensor) -> Tensor:
    """Ranks as a bias: one that is not finite is not added to a logit, as in `dynamic_mask_attention`."""
    return ranks.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


__all__ = ["BoundedLayer", "LiveKeys", "Windows"]
