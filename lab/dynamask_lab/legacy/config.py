"""Configurations in the fields of dynamask 0.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamask.errors import InvalidInputError
from dynamask.models import DynamaskConfig, uneven_windows
from dynamask.models.window_schedule import scheduled_windows
from dynamask.models.windows import set_head_windows

_DEFAULTS: dict[str, Any] = {
    "local": None,
    "recency": None,
    "recency_spread": 1.0,
    "score_form": "exp",
    "gate_init": "gate",
    "rank_noise": 0.0,
    "rank_recency": None,
    "ranking": "score",
    "rank_power": 1.0,
    "distance_penalty": 0.0,
    "rope_layers": None,
}
"""Options of 0.1 that its mixers read, with their defaults."""

_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_BLOCKS = ("nsa_block_size", "nsa_block_counts", "nsa_window")
_UNBOUNDED = frozenset({"mha", "mla", "nsa"})


def config_of_0_1(**fields: Any) -> DynamaskConfig:
    """Make a configuration from the fields of dynamask 0.1's `DynamaskConfig`.

    Args:
        **fields: any of 0.1's fields. `window` is 1024 where it is left out.

    Returns:
        A configuration whose dma layers, and those with a distance penalty or without RoPE, are this package's mixers
        of 0.1; the others are dynamask's.

    Raises:
        InvalidInputError: values that 0.1 refused.
    """
    options = {name: fields.pop(name, default) for name, default in _DEFAULTS.items()}
    window = options["window"] = fields.pop("window", 1024)
    given, mixers = fields.pop("layer_windows", None), fields.pop("layer_attention", None)
    attention = fields.pop("attention", "dma")
    layers = fields.get("num_hidden_layers", DynamaskConfig.num_hidden_layers)
    if mixers is not None and len(mixers) != layers:
        raise InvalidInputError(
            f"layer_attention names the attention of each of the {layers} layers; got {len(mixers)} names"
        )
    names = list(mixers) if mixers else [attention] * layers
    windows = uneven_windows(layers, window) if given == "uneven" else given
    if windows is not None and len(windows) != layers:
        raise InvalidInputError(
            f"layer_windows gives the window of each of the {layers} layers; got {len(windows)} windows"
        )
    options["local"] = window // 2 if options["local"] is None else options["local"]
    options["recency"] = 1.0 / window if options["recency"] is None else options["recency"]
    options["rope_layers"] = _rope_layers(options["rope_layers"], names, windows or [window] * layers, window)
    _check(options)
    rotates = options["rope_layers"] or [True] * layers
    for index, name in enumerate(names):
        plain = rotates[index] and not (options["distance_penalty"] and name in ("swa", "mha"))
        if name == "dma" or (not plain and name in ("swa", "mha", "mla")):
            names[index] = f"{name}01"
        elif not plain:
            raise InvalidInputError(f"rope_layers and distance_penalty are not for attention {name!r}")
    for field, old in (("mla", _LATENT), ("nsa", _BLOCKS)):
        own = {name.removeprefix("nsa_"): fields.pop(name) for name in old if fields.get(name) is not None}
        if own:
            fields[field] = own
    return DynamaskConfig(
        attention=names if len(set(names)) > 1 else names[0],
        windows=window if windows is None else list(windows),
        local=0,
        sinks=0,
        mixer_options=options,
        **{name: value for name, value in fields.items() if name not in (*_LATENT, *_BLOCKS)},
    )


def set_window(model: Any, window: int | None) -> None:
    """Let the layers of a model keep so many keys on average, those of other windows in proportion; None: as it is."""
    if window is None:
        return
    config = model.config
    common = (config.mixer_options or {}).get("window") or config.budget
    if common is None:
        return
    set_head_windows(model, [[max(1, int(own * window // common)) for own in layer] for layer in config.head_windows])


def scheduled_window(window: int, schedule: Sequence[Sequence[float]], step: int, steps: int) -> int:
    """Keys per query in a step, the first of `steps` being 0; before the first share, `window` itself."""
    return scheduled_windows(((window,),), schedule, step, steps)[0][0]


def _rope_layers(given: Any, names: Sequence[str], windows: Sequence[int], window: int) -> list[bool] | None:
    if given is None:
        return None
    if given == "narrow":
        near = [name not in _UNBOUNDED and own <= window for name, own in zip(names, windows, strict=True)]
        if all(near):
            raise InvalidInputError(
                f'rope_layers="narrow" leaves RoPE out of the layers that look further than window={window}, and there '
                "is none"
            )
        return near
    if len(given) != len(names):
        raise InvalidInputError(
            f"rope_layers says of each of the {len(names)} layers whether it rotates; got {len(given)} values"
        )
    return list(given)


def _check(options: dict[str, Any]) -> None:
    choices = {"score_form": ("exp", "linear"), "gate_init": ("gate", "delta"), "ranking": ("score", "attention")}
    for name, known in choices.items():
        if options[name] not in known:
            raise InvalidInputError(f"{name} must be one of {', '.join(known)}; got {options[name]!r}")
    if not 0 <= options["local"] <= options["window"]:
        raise InvalidInputError(f"local must be at most window = {options['window']}; got {options['local']}")
    for name in ("recency", "rank_noise", "rank_recency", "distance_penalty"):
        if (options[name] or 0.0) < 0:
            raise InvalidInputError(f"{name} cannot be negative (0: none); got {options[name]}")
    if options["recency_spread"] < 1:
        raise InvalidInputError(f"recency_spread is a factor of at least 1; got {options['recency_spread']}")
    if options["rank_power"] <= 0:
        raise InvalidInputError(f"rank_power is a power above 0; got {options['rank_power']}")
    slope = options["recency"] if options["rank_recency"] is None else options["rank_recency"]
    if options["ranking"] == "attention" and not slope:
        raise InvalidInputError('ranking="attention" learns the slope of the ranks from a first one: give rank_recency')
