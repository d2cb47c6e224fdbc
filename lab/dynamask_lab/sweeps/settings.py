"""What the experiments' settings share: plain JSON in and out, which mixers have a window, names of how keys rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from dynamask.errors import InvalidInputError, did_you_mean
from dynamask_lab.sweeps.registry import Config

_Settings = TypeVar("_Settings")

WINDOWLESS = ("mha", "mla")
"""Mixers that see their whole prefix: a sweep over windows need run them once only."""

SHARP: Config = {"ranking": "attention", "rank_power": 4.0, "recency_spread": 8.0}
"""dma whose ranks learn who is looked at sharply, for models that attend already."""
WIDE_FIRST: Config = {"window_schedule": [[0.0, 4.0], [0.5, 2.0], [0.7, 1.0]]}
"""The window that such a model trains with: where most of an example fits at first, then down to the one it is tested
at. With keys that no query sees there is nothing to learn of them."""

CPU_SHAPE: Config = {
    **{"layers": 2, "width": 96, "heads": 4, "groups": 2, "feed_forward": 256},
    **{"length": 512, "steps": 300, "batch_tokens": 2048, "validation_tokens": 32_768},
}
"""Of language runs that a CPU does in three minutes each: 0.2M parameters."""


def read_settings(kind: type[_Settings], config: Config, whose: str) -> _Settings:
    """Settings from plain JSON.

    Args:
        kind: their dataclass.
        config: its fields.
        whose: what they are settings of, as the message names it.

    Raises:
        InvalidInputError: an unknown setting, with the nearest known one; or what `kind` itself refuses.
    """
    known = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in config:
        if name not in known:
            raise InvalidInputError(f"unknown setting {name!r} of {whose}{did_you_mean(name, known)}")
    return kind(**config)


def plain_settings(settings: Any, younger: Sequence[str]) -> Config:
    """Settings as plain JSON, from which they are read again.

    Args:
        settings: a dataclass.
        younger: names of settings that came after runs had been recorded. They are written where they are not the
            default: a run's key is made of its settings, and those of recorded runs are to stay.
    """
    config: Config = dataclasses.asdict(settings)
    for entry in dataclasses.fields(settings):
        factory = entry.default_factory
        default = entry.default if factory is dataclasses.MISSING else factory()
        if entry.name in younger and config[entry.name] == default:
            del config[entry.name]
    return config


def ranked_by(ranking: str, power: float) -> list[str]:
    """What a mechanism's name says of ranks that are not its scores: "ranked by attention^4"; of scores, nothing."""
    if ranking == "score":
        return []
    return [f"ranked by {ranking}" if power == 1 else f"ranked by {ranking}^{power:g}"]
