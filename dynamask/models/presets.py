"""Model sizes by name. The head shapes are those the kernels are fastest at: head_dim 64 or 128."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from dynamask.errors import UsageError, did_you_mean
from dynamask.models.field_names import field_names

if TYPE_CHECKING:
    from dynamask.models.configuration import DynamaskConfig


def _shape(
    hidden: int,
    layers: int,
    heads: int,
    groups: int,
    dim: int,
    ff: int,
    window: int,
    context: int,
    theta: float,
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": dim,
        "intermediate_size": ff,
        "windows": window,
        "max_position_embeddings": context,
        "rope_theta": theta,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _shape(256, 4, 4, 2, 64, 768, 64, 1024, 10_000.0) | {"vocab_size": 4096},
    "30m": _shape(512, 8, 8, 4, 64, 1536, 128, 2048, 10_000.0) | {"vocab_size": 8192},
    "65m": _shape(640, 12, 10, 5, 64, 1792, 256, 2048, 10_000.0) | {"vocab_size": 16384},
    "120m": _shape(768, 14, 12, 4, 64, 2304, 512, 2048, 100_000.0),
    "320m": _shape(1024, 24, 16, 4, 64, 3072, 1024, 4096, 100_000.0),
    # Qwen3-1.7B's shape and vocabulary.
    "1.7b": _shape(2048, 28, 16, 8, 128, 6144, 2048, 40960, 1_000_000.0) | {"vocab_size": 151_936},
}


_LISTS: dict[str, Any] = {
    "attention": (str, list),
    "windows": (int, list),
    "rope_parameters": dict,
    "mixer_options": dict,
}
_LISTS |= {"mla": dict, "nsa": dict, "slopes": list}
"""Fields that take more than the kind of their default."""
_WANTED: dict[Any, str] = {
    (int, float): "a number",
    (str, list): "a name or a list of names",
    (int, list): "an integer or a list",
    dict: "a mapping",
    list: "a list with one entry for each layer",
}


def check_preset(name: str) -> None:
    """Raise UsageError for an unknown preset; the message names the nearest known one."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; there are {', '.join(PRESETS)}")


def check_fields(fields: Iterable[str], known: Collection[str] | None = None) -> None:
    """Raise UsageError for an unknown field of `DynamaskConfig`; the message names the nearest known one.

    Args:
        fields: names given for fields.
        known: the fields; None: as the source files name them, without an import of torch or transformers. Where those
            are missing, nothing is refused.
    """
    names = field_names() if known is None else known
    for field in fields:
        if names is not None and field not in names:
            raise UsageError(f"unknown model field {field!r}{did_you_mean(field, names)}")


def preset(name: str, **overrides: Any) -> DynamaskConfig:
    """Make a configuration by name, with fields overridden.

    Args:
        name: one of `PRESETS`.
        **overrides: fields of `DynamaskConfig`.

    Raises:
        UsageError: an unknown preset or field; the message names the nearest known one.
    """
    check_preset(name)
    from dynamask.models.configuration import DynamaskConfig

    checked = DynamaskConfig.__annotations__.keys() - {"eos_token_id"}
    fields = {field.name: field for field in dataclasses.fields(DynamaskConfig)}
    check_fields(overrides, fields)
    for field in overrides:
        default = fields[field].default
        # A field whose default is None is one of DynamaskConfig's optional numbers, or a token id transformers checks.
        kinds: Any = _LISTS.get(field, (int, float) if default is None or isinstance(default, float) else type(default))
        given = overrides[field]
        fits = isinstance(given, kinds) and (isinstance(default, bool) or not isinstance(given, bool))
        if field in checked and not fits and not (given is None and default is None):
            wanted = _WANTED.get(kinds) or kinds.__name__
            raise UsageError(f"the model field {field} must be {wanted}; got {given!r}")
    return DynamaskConfig(**(PRESETS[name] | overrides))
