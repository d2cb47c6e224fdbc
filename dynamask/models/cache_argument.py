"""The name under which transformers hands a cache over: `past_key_values`, since 5.24 `cache`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from transformers.modeling_outputs import CausalLMOutputWithPast

from dynamask.errors import InvalidInputError

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name in this transformers: of the arguments of `generate()` and of the field of model outputs."""

_OTHER_NAMES = ("cache", "cache_params")

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def takes_cache(forward: _Forward) -> _Forward:
    """Let a forward with an argument `past_key_values` take the cache under its other names, too.

    Raises (the decorated function):
        InvalidInputError: two caches.
    """

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        for name in _OTHER_NAMES:
            if name in kwargs:
                cache = kwargs.pop(name)
                if cache is None:
                    continue
                if kwargs.get("past_key_values") is not None and kwargs["past_key_values"] is not cache:
                    raise InvalidInputError(f"give one cache: both past_key_values and {name} were given")
                kwargs["past_key_values"] = cache
        return forward(*args, **kwargs)

    return renamed  # type: ignore[return-value]


def given_cache(arguments: dict[str, Any]) -> Any:
    """Return the cache among keyword arguments of `generate()`, whatever its name, or None."""
    for name in ("past_key_values", *_OTHER_NAMES):
        if arguments.get(name) is not None:
            return arguments[name]
    return None
