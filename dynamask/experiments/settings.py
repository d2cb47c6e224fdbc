"""What the experiments' settings share: reading them from plain JSON, and which mixers have a window."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from dynamask.errors import InvalidInputError, did_you_mean
from dynamask.experiments.registry import Config

_Settings = TypeVar("_Settings")

WINDOWLESS = ("mha", "mla")
"""Mixers that see their whole prefix: a sweep over windows need run them once only."""


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
