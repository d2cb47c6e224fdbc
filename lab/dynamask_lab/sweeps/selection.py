"""Some of a sweep's runs, by their settings: `corpus=code`, `seed=0`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dynamask.errors import UsageError, did_you_mean
from dynamask_lab.sweeps.registry import Config


def parse_conditions(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Setting -> its wanted values, from NAME=VALUE each; a setting named twice may have either value.

    A value is read as JSON where it is some (1, 0.5, true, null), and as itself elsewhere.

    Raises:
        UsageError: not of this form.
    """
    wanted: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UsageError(f"{text!r} is not a condition: write NAME=VALUE, such as corpus=code")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        wanted.setdefault(name, []).append(parsed)
    return wanted


def select(configs: Sequence[Config], wanted: dict[str, list[Any]]) -> list[Config]:
    """The runs whose settings have wanted values.

    Raises:
        UsageError: a setting that none of the runs has, with the nearest known one.
    """
    known = sorted({name for config in configs for name in config})
    for name in wanted:
        if configs and name not in known:
            raise UsageError(f"no run has a setting {name!r}{did_you_mean(name, known)}")
    return [config for config in configs if all(config.get(name) in values for name, values in wanted.items())]
