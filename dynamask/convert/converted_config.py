"""What the configurations of converted models share: windows, slopes, and how ranks are made."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from dynamask.convert.architectures import ARCHITECTURES, PREFIX
from dynamask.convert.attention import LayerRules
from dynamask.errors import InvalidInputError
from dynamask.integers import check_window
from dynamask.mixers.head_shard import HeadShard
from dynamask.models.auto_code import CarriesAutoCode
from dynamask.models.windows import Slopes, checked_slopes

Windows = int | list[Any]


class ConvertedConfig(CarriesAutoCode):
    """What the converted configurations share, mixed in before the transformers class.

    Attributes:
        windows: keys that each query keeps: one integer for all, or a list of one entry per layer, each an integer, a
            list of one integer per key/value head, or None for a layer left dense. Entries of layers that slide in
            the original are ignored: they keep their window.
        local: how many of them are the newest positions.
        sinks: how many of them are the first positions.
        ranking: "learned" (rank predictors) or "paper" (Doge).
        trained_ranks: whether the rank predictors have been trained.
        rank_predictor_width: hidden units of a rank predictor; None: its default; 0: linear predictors.
        rank_loss_weight: factor of the ranks' loss in a training forward with labels.
        slopes: how much ranks rise per token, in nats: None for not at all, or a list of one entry per layer, each
            None or a list of one number per key/value head (`dynamask.mixers.rank_predictor.sloped_ranks`).
    """

    windows: Windows
    slopes: Slopes
    local: int
    sinks: int
    ranking: str
    trained_ranks: bool

    auto_module = "dynamask.convert.models"  # which makes the classes

    def auto_classes(self) -> dict[str, str]:
        """See `CarriesAutoCode`."""
        names = ARCHITECTURES[self.model_type.removeprefix(PREFIX)]  # type: ignore[attr-defined]
        return {"AutoConfig": f"Dynamask{names.config}", "AutoModelForCausalLM": f"Dynamask{names.model}"}

    def sliding_window_of(self, layer: int) -> int | None:
        """Return the window with which this layer slides in the original; None where it attends to everything."""
        window: int | None = getattr(self, "sliding_window", None)
        kinds = getattr(self, "layer_types", None)
        slides = kinds[layer] == "sliding_attention" if kinds else getattr(self, "use_sliding_window", True)
        return window if slides else None

    def layer_slides(self, layer: int) -> bool:
        """Whether this layer slides in the original, and so keeps the newest keys without ranks."""
        return self.sliding_window_of(layer) is not None

    def ranks_layer(self, layer: int) -> bool:
        """Whether this layer chooses its keys by learned ranks."""
        return self.head_windows[layer] is not None and not self.layer_slides(layer)

    @property
    def head_windows(self) -> tuple[tuple[int, ...] | None, ...]:
        """Windows of every layer and key/value head, L x G; None for a layer left dense.

        Of a model split by tensor parallelism, as the slopes: of the heads that this process holds.
        """
        return self._by_head("_head_windows", repr(self.windows), self._resolved)  # type: ignore[no-any-return]

    def _by_head(self, name: str, given: Any, resolve: Callable[[int, int], Any]) -> Any:
        """What `resolve` makes of the layers and heads, remembered under a name until the given field changes."""
        layers, groups = self._all_layers, self.num_key_value_heads  # type: ignore[attr-defined]
        shard: HeadShard | None = self.__dict__.get("_head_shard")  # of a model split by tensor parallelism
        key = (given, layers, groups, shard)
        known = self.__dict__.get(name)
        if known is None or known[0] != key:
            resolved = resolve(layers, groups)
            if shard is not None:
                resolved = tuple(None if layer is None else shard.of(layer) for layer in resolved)
            known = key, resolved
            self.__dict__[name] = known
        return known[1]

    @property
    def _all_layers(self) -> int:
        """Layers of the model. `generate(assistant_early_exit=...)` sets `num_hidden_layers` to fewer for a while."""
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]
        return max(layers, self.__dict__.get("_built_layers", 0))

    def _resolved(self, layers: int, groups: int) -> tuple[tuple[int, ...] | None, ...]:
        entries = self.windows if isinstance(self.windows, list) else [self.windows] * layers
        if len(entries) != layers:
            raise InvalidInputError(f"windows must have an entry for each of the {layers} layers; got {len(entries)}")
        resolved: list[tuple[int, ...] | None] = []
        for layer, entry in enumerate(entries):
            slides = self.sliding_window_of(layer)
            if slides is not None:
                resolved.append((slides,) * groups)
            elif entry is None:
                resolved.append(None)
            else:
                resolved.append(check_window(entry, self.local, self.sinks, groups=groups))
        return tuple(resolved)

    @property
    def head_slopes(self) -> tuple[tuple[float, ...] | None, ...]:
        """Slopes of every layer and key/value head, L x G; None for a layer whose ranks do not rise."""
        slopes = self.slopes
        given = None if slopes is None else [None if entry is None else tuple(entry) for entry in slopes]
        return self._by_head("_head_slopes", given, functools.partial(checked_slopes, slopes))  # type: ignore[no-any-return]

    @property
    def layer_rules(self) -> tuple[LayerRules, ...]:
        """Which keys each layer keeps, but for layers that slide, which keep the newest of their windows."""
        local, sinks = self.local, self.sinks
        each = zip(self.head_windows, self.head_slopes, strict=True)
        return tuple(LayerRules(windows, slopes, local, sinks) for windows, slopes in each)

    @property
    def layer_locals(self) -> list[int]:
        """Newest positions that each layer keeps; in a layer that slides, its whole window."""
        slides = [self.sliding_window_of(layer) for layer in range(self.num_hidden_layers)]  # type: ignore[attr-defined]
        return [self.local if window is None else window for window in slides]

    @property
    def layer_sinks(self) -> list[int]:
        """First positions that each layer keeps; none in a layer that slides."""
        layers = range(self.num_hidden_layers)  # type: ignore[attr-defined]
        return [0 if self.layer_slides(layer) else self.sinks for layer in layers]

    @property
    def budget(self) -> float | None:
        """Mean window over the key/value heads of the layers that rank; None where no layer does."""
        windows = [self.head_windows[layer] or () for layer in self.ranked_layers]
        return sum(map(sum, windows)) / sum(map(len, windows)) if windows else None

    @property
    def ranked_layers(self) -> list[int]:
        """Indices of the layers that choose their keys by learned ranks."""
        return [layer for layer in range(self.num_hidden_layers) if self.ranks_layer(layer)]  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, without what is only remembered."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        for name in ("_head_windows", "_head_slopes", "_head_shard", "_built_layers"):
            fields.pop(name, None)
        return fields

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a saved configuration, also one of dynamask 0.1, with a warning of what has changed."""
        if "layer_windows" in config_dict:
            config_dict = _from_0_1(dict(config_dict), paper=cls.model_type == "dynamask_doge")  # type: ignore[attr-defined]
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


def _from_0_1(fields: dict[str, Any], *, paper: bool) -> dict[str, Any]:
    window, local = fields.pop("window", 2048), fields.pop("local", 0)
    windows = fields.pop("layer_windows") or [window] * fields["num_hidden_layers"]
    locals_ = fields.pop("layer_locals", None) or [local]
    for name in ("score_form", "rank_power", "ranking"):
        fields.pop(name, None)
    given = [each for each, entry in zip(locals_, windows, strict=False) if entry is not None]
    fields |= {"windows": windows, "local": min(given, default=0), "sinks": 0}
    fields["ranking"] = "paper" if paper else "learned"
    if not paper:
        warnings.warn(
            "this model was converted by dynamask 0.1, which ranked keys by gates on their values. Gates are gone: "
            "ranks are now predicted from the hidden state, and those of this model are untrained. Train them with "
            "dynamask.convert.learn_ranks, or convert the dense model again",
            stacklevel=4,
        )
    return fields


__all__ = ["ConvertedConfig", "Windows"]
